"""The parts of a model that sees or hears: which modules are its vision encoder, projector, language model and head.

    model.visual                      vision       what get_encoder(modality="image") gives
    model.visual.merger               projector    by the names projectors have, inside the tower too; it is the deeper root
    model.language_model              language     what get_decoder() gives
    lm_head                           head         what get_output_embeddings() gives
    model.image_newline               unowned      what none of these owns is said, never guessed

A module belongs to the part of the longest root at it or above it. Where the model says nothing of a part, the user does:
`given` names modules of any part (audio, output_projector, …), and what it names is no other part's.

The accessors are those of transformers' models (≥ 5); any model that has them is read the same. They give the model itself
where they find nothing, or a body with all parts in it: what holds another part's root is none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from deltaw.core.base import base_modules, base_parameters, unwrapped
from deltaw.core.errors import TargetError, did_you_mean, faults

PARTS = ("vision", "projector", "language", "head")
SEEING = ("vision", "projector")
"""Parts that get a gradient from rows with images alone."""
PROJECTORS = frozenset((
    "multi_modal_projector", "mm_projector", "connector", "merger", "deepstack_merger_list", "merger_list", "aligner",
    "projector", "mlp1", "resampler", "resampler_model", "vision_adapter", "vision_projection", "embed_vision",
    "language_projection", "image_to_text_projection", "qformer", "modality_projection", "patch_merger",
))  # fmt: skip
"""Last names of the modules that stand between a tower and a language model."""
ENCODERS = {"vision": "image", "audio": "audio"}
"""Part → what its encoder reads, in the accessor's words."""


@dataclass(frozen=True)
class Parts:
    roots: Mapping[str, tuple[str, ...]]
    """Part → paths of the modules where it begins."""
    unowned: tuple[str, ...]
    """Full names of the parameters that no part owns."""

    def of(self, path: str) -> str | None:
        """The part of a module, or of a parameter by its full name: that of the longest root which is it or above it."""
        above = ((root, part) for part, roots in self.roots.items() for root in roots if _within(path, root))
        return max(above, key=lambda found: len(found[0]), default=("", None))[1]


def find(model: nn.Module, given: Mapping[str, Sequence[str]] | None = None) -> Parts | None:
    """The parts of `model`, which may be on the meta device and may carry adapters; None where it has one part only.

    given: part → paths of modules or parameters, or their names; these win over what is found here. Raises TargetError for
    what names nothing, and for one module said to be of two parts.
    """
    model = unwrapped(model)
    modules = dict(base_modules(model))
    names = [name for name, _ in base_parameters(model)]
    said = _said(given or {}, modules, names)
    found = {part: roots for part, roots in _found(model, modules, names).items() if roots}
    if not found and not said:
        return None
    mine = [root for roots in said.values() for root in roots]
    roots = {
        part: tuple(dict.fromkeys([*said.get(part, ()), *(r for r in found.get(part, ()) if not _any(r, mine))]))
        for part in [*found, *(part for part in said if part not in found)]
    }
    parts = Parts({part: paths for part, paths in roots.items() if paths}, ())
    return Parts(parts.roots, tuple(name for name in names if parts.of(name) is None))


def _found(model: nn.Module, modules: Mapping[str, nn.Module], names: Sequence[str]) -> dict[str, list[str]]:
    """Roots by the model's own accessors; nothing where it has no encoder beside a decoder."""
    paths = {id(module): path for path, module in modules.items() if path}
    language, head = (_asked(model, paths, ask) for ask in ("get_decoder", "get_output_embeddings"))
    of_text = _asked(model, paths, "get_encoder")  # not asked for images, and given when asked: it is no tower
    asked = {part: _asked(model, paths, "get_encoder", modality=reads) for part, reads in ENCODERS.items()}
    towers = {part: path for part, path in asked.items() if path is not None and path != of_text}
    if language is None or any(_within(a, b) for t in towers.values() for a, b in ((language, t), (t, language))):
        return {}
    projectors = list(_projectors(modules, names, language))
    if not towers or (head is None and not projectors):  # two encoders side by side, compared by what they give
        return {}
    found = {"projector": projectors, "language": [language], "head": [] if head is None else [head]}
    return {part: [path] for part, path in towers.items()} | found


def _asked(model: nn.Module, paths: Mapping[int, str], accessor: str, **how: str) -> str | None:
    """Path of the module that an accessor of the model gives; None where it has none, or gives the model itself."""
    ask = getattr(model, accessor, None)
    try:
        found = ask(**how) if callable(ask) else None
    except (NotImplementedError, TypeError, AttributeError):  # accessors of models that cannot say, or of another kind
        return None
    return paths.get(id(found))


def _projectors(modules: Mapping[str, nn.Module], names: Sequence[str], language: str) -> Iterator[str]:
    """Modules outside the language model that have a projector's name and parameters, the outermost of them."""
    taken: list[str] = []
    for path in modules:
        named = path.rpartition(".")[2] in PROJECTORS and not _any(path, [*taken, language])
        if named and any(_within(name, path) for name in names):
            taken.append(path)
            yield path


def _said(
    given: Mapping[str, Sequence[str]], modules: Mapping[str, nn.Module], names: Sequence[str]
) -> dict[str, list[str]]:
    """The roots that a user gave, as paths."""
    known, found = list(dict.fromkeys([*modules, *names])), []
    said: dict[str, list[str]] = {}
    for part, listed in given.items():
        for name in [listed] if isinstance(listed, str) else listed:
            paths = [name] if name and name in known else [p for p in known if name and p.endswith(f".{name}")]
            inner = [p for p in paths if any(p != other and _within(p, other) for other in paths)]
            if not paths:
                near = did_you_mean(name, [*known, *(path.rpartition(".")[2] for path in known)], 1)
                found.append(f"part {part!r}: no module or parameter is called {name!r}{near}")
            said.setdefault(part, []).extend(path for path in paths if path not in inner)
    of: dict[str, str] = {}
    for part, paths in said.items():
        for path in paths:
            if of.setdefault(path, part) != part:
                found.append(f"{path} is said to be of {of[path]!r} and of {part!r}: leave one out")
    if found:
        raise faults(TargetError, "the parts of the model", found)
    return said


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def _any(path: str, roots: Sequence[str]) -> bool:
    return any(_within(path, root) for root in roots)
