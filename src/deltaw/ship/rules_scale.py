"""Questions about scales, layers and groups: where an engine loads an adapter and computes something else.

the true scale of a module    α_i/r_i, with rsLoRA α_i/√r_i; α_i by alpha_pattern, r_i by its tensors (PEFT's rules)
what an engine makes of it    α/r or α/√r of the config for all modules, or α over the rank of each tensor
layers                        all of one kind stacked, so that one without factors loses the kind
groups                        q, k, v and gate, up joined to one matrix, so that ranks and members must agree
"""

from collections.abc import Callable, Collection, Mapping

from deltaw.methods.patterns import first_hit
from deltaw.ship.acceptance import Facts, Question
from deltaw.ship.rules import folded, kinds, leaf, some

QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
GROUPS = (QKV, GATED)
"""Modules that engines compute as one."""
LLAMA = {*QKV, "o_proj", *GATED, "down_proj"}
PATTERNS = ("rank_pattern", "alpha_pattern")

Scale = Callable[[Facts, str], float | None]


def true_scale(f: Facts, path: str) -> float | None:
    alpha = first_hit(f.config.get("alpha_pattern") or {}, path) or f.config.get("lora_alpha") or 8
    return _over(alpha, f.ranks.get(path), bool(f.config.get("use_rslora")))


def global_scale(f: Facts, path: str) -> float | None:
    """α/r of the config."""
    return _over(f.config.get("lora_alpha"), f.config.get("r"))


def global_rslora(f: Facts, path: str) -> float | None:
    """α/r or α/√r of the config."""
    return _over(f.config.get("lora_alpha") or 8, f.config.get("r") or 8, bool(f.config.get("use_rslora")))


def tensor_scale(f: Facts, path: str) -> float | None:
    """α of the config over the rank of the tensor; 1 where α is 0 or not there."""
    return _over(f.config.get("lora_alpha"), f.ranks.get(path)) if f.config.get("lora_alpha") else 1.0


def _over(alpha: object, rank: object, root: bool = False) -> float | None:
    if not isinstance(alpha, int | float) or not isinstance(rank, int | float) or rank <= 0:
        return None
    return float(alpha) / (float(rank) ** 0.5 if root else float(rank))


def scaled_by(theirs: Scale, unread: Collection[str]) -> Question:
    """Modules whose scale becomes another one; unread: options that say so and are not looked at."""

    def trips(f: Facts) -> str | None:
        said: dict[tuple[float, float], set[str]] = {}
        for path in f.factors:
            mine, got = true_scale(f, path), theirs(f, path)
            if mine is not None and got is not None and abs(mine - got) > 1e-6 * abs(mine):
                said.setdefault((got, mine), set()).add(leaf(path))
        lines = [f"{some(names)} by {got:.4g} instead of {mine:.4g}" for (got, mine), names in sorted(said.items())]
        on = [key for key in unread if f.config.get(key)]
        reason = f"{' and '.join(on)} {'are' if len(on) > 1 else 'is'} not read" if on else "α is read otherwise"
        return f"{reason}: it scales {'; '.join(lines[:3])}{'; …' if len(lines) > 3 else ''}" if lines else None

    return trips


def padded(rank: int, gpus: int = 1) -> int:
    """The rank that SGMV kernels work with: at least 8 for each GPU, above that a multiple of 16."""
    return 8 * gpus if rank <= 8 * gpus else -(-rank // 16) * 16


def scaled_after_padding(f: Facts) -> str | None:
    """The padded rank is written back into the config while the first kind of module loads."""
    rank, names = f.config.get("r"), {leaf(path) for path in f.factors}
    if type(rank) is not int or rank < 1 or padded(rank) == rank or len(names) < 2:
        return None
    return f"rank {rank} is padded to {padded(rank)}, and α divided by that from the second kind of module on"


def padded_on_more(f: Facts) -> str | None:
    """The same, where only tensor parallelism makes it so."""
    rank = f.config.get("r")
    most = rank // 8 if type(rank) is int and padded(rank) == rank else 0
    beyond = f"tensor parallelism over more than {most} GPU{'s' if most > 1 else ''} pads its rank of {rank}"
    return f"{beyond}, and α is then divided by that" if 0 < most < 8 else None


def layers_missing(f: Facts) -> str | None:
    """Kinds of modules that some layers lack: of the base's layers, or of those up to the highest in the file."""
    have: dict[str, set[str]] = {}
    for path in f.factors:
        have.setdefault(folded(path), set()).add(path)
    last = max((_layer(path) for path in f.factors), default=-1)
    want = {kind: {kind.replace("*", str(n)) for n in range(last + 1)} for kind in have if kind.count("*") == 1}
    if f.linear is not None:
        want = {kind: {path for path in f.linear if folded(path) == kind} for kind in have}
    partial = {leaf(kind) for kind, paths in have.items() if want.get(kind, set()) - paths}
    return f"some layers have no {some(partial)}, so that it leaves them out in all layers" if partial else None


def _layer(path: str) -> int:
    """The number in a path that has one."""
    numbers = [part for part in path.split(".")[1:-1] if part.isdigit()]
    return int(numbers[0]) if len(numbers) == 1 else -1


def ranks_uneven(f: Facts) -> str | None:
    """Within one kind of module, over the layers: they are stacked."""
    found: dict[str, set[int]] = {}
    for path, rank in f.ranks.items():
        found.setdefault(folded(path), set()).add(padded(rank))
    wrong = {leaf(kind) for kind, ranks in found.items() if len(ranks) > 1}
    return f"the layers of {some(wrong)} have unlike ranks, and it stacks them" if wrong else None


def _members(f: Facts, group: Collection[str]) -> Mapping[str, dict[str, int]]:
    """Path of the parent → members of the group that are adapted there, with their ranks."""
    found: dict[str, dict[str, int]] = {}
    for path, rank in f.ranks.items():
        if leaf(path) in group:
            found.setdefault(path.rpartition(".")[0], {})[leaf(path)] = rank
    return found


def q_without_v(f: Facts) -> str | None:
    found = [parent for parent, has in _members(f, QKV).items() if "q_proj" in has and "v_proj" not in has]
    return f"q_proj without v_proj at {kinds(found)}: it looks for v_proj and fails" if found else None


def without_its_first(f: Facts) -> str | None:
    """k or v without q, up without gate: not joined, and then never applied."""
    found = {
        f"{name} without {group[0]}"
        for group in GROUPS
        for has in _members(f, group).values()
        for name in has
        if group[0] not in has
    }
    return f"{some(found)}: not joined to the fused layer, and so never applied" if found else None


def group_ranks(f: Facts) -> str | None:
    found = [parent for group in GROUPS for parent, has in _members(f, group).items() if len(set(has.values())) > 1]
    return f"unlike ranks among q, k, v or gate, up at {kinds(found)}: it cannot join them" if found else None
