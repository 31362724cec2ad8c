"""What an engine makes of an adapter folder: a table of rules, each a pure question about what the folder says.

    Facts (config, names and shapes of the tensors, files, optionally the base) → Rule → a sentence where it trips
    any rule that refuses                                 → the engine refuses it
    else any that mis-scales, mis-reads or ignores        → it loads, and computes something else
    else any about what the rules do not know             → unknown
    else                                                  → it takes it; `needs` are options to start the engine with

The tables are in `deltaw.ship.engines`, the questions in `deltaw.ship.rules` and `rules_scale`. No engine runs here: a rule
is as good as its evidence, which every finding names.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from deltaw.core.errors import FileError, faults
from deltaw.core.files import read_json
from deltaw.core.parts import Parts
from deltaw.core.text import columns
from deltaw.formats.directory import CONFIG
from deltaw.formats.peft_experts import is_stack, sites
from deltaw.formats.peft_valid import ALPHAS, NAMES, TARGETS, Check, number, patterns
from deltaw.formats.weights import PICKLED, WEIGHTS, read_tensors

Effect = Literal["refuses", "mis-scales", "mis-reads", "ignores", "unknown", "needs"]
Verdict = Literal["takes it", "refuses", "computes something else", "unknown"]
VERDICTS: Mapping[Effect, Verdict] = {
    "refuses": "refuses",
    "mis-scales": "computes something else",
    "mis-reads": "computes something else",
    "ignores": "computes something else",
    "unknown": "unknown",
    "needs": "takes it",
}
"""The worst first."""
KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.(?P<end>lora_[AB]\.weight|lora_embedding_[AB])")
"""The keys that every engine reads as factors."""
UNSURE = ("inferred", "not verified")
AGAIN = "fetch the folder again"
SOUND: Mapping[str, Check] = {
    "target_modules": TARGETS,
    "target_parameters": NAMES,
    "modules_to_save": NAMES,
    "rank_pattern": patterns(number, "a table {pattern: number}"),
    "alpha_pattern": ALPHAS,
}
"""Options that rules look into: their values must be of the kind that PEFT writes."""


@dataclass(frozen=True)
class Base:
    """What rules may know of the base: its config.json, the shape [out, in] of every linear layer by path, and its parts."""

    config: Mapping[str, Any]
    linear: Mapping[str, tuple[int, ...]]
    parts: Parts | None = None


@dataclass(frozen=True)
class Facts:
    """All that rules look at."""

    config: Mapping[str, Any]
    """adapter_config.json; empty where there is none (see files)."""
    header: Mapping[str, tuple[str, tuple[int, ...]]]
    """Key → dtype and shape."""
    files: frozenset[str]
    base: Base | None = None
    added: Mapping[str, int] = field(default_factory=dict)
    """added_tokens.json: {token: id}."""
    nonfinite: tuple[str, ...] = ()
    """Keys whose tensors hold NaN or infinite values."""

    @functools.cached_property
    def factors(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Path of every adapted module → end of the key → shape."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, (_, shape) in self.header.items():
            if hit := KEY.fullmatch(key):
                found.setdefault(hit["path"], {})[hit["end"]] = shape
        return found

    @functools.cached_property
    def others(self) -> list[str]:
        """Keys that are no factors."""
        return [key for key in self.header if not KEY.fullmatch(key)]

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """Path → rank of its A; without stacks of experts."""
        a = {path: ends.get("lora_A.weight", ends.get("lora_embedding_A")) for path, ends in self.factors.items()}
        return {path: shape[0] for path, shape in a.items() if shape and path not in self.stacks}

    @functools.cached_property
    def stacks(self) -> set[str]:
        """Paths whose factors are those of a stack of experts, flattened (`formats.peft_experts`)."""
        return {path for path, site in sites(self.config, self.factors)[0].items() if is_stack(site)}

    @property
    def linear(self) -> Mapping[str, tuple[int, ...]] | None:
        """Shapes of the base's linear layers, where it was looked at."""
        return None if self.base is None else self.base.linear

    def about(self, key: str) -> Any:
        """A value of the base's config, where it was looked at."""
        return None if self.base is None else self.base.config.get(key)

    @property
    def architectures(self) -> Sequence[str]:
        return self.about("architectures") or ()

    @property
    def rank(self) -> int:
        """The largest that the config or a tensor has."""
        told = [self.config.get("r"), *dict(self.config.get("rank_pattern") or {}).values()]
        return max([*(r for r in told if type(r) is int), *self.ranks.values()], default=0)


Question = Callable[[Facts], str | None]


@dataclass(frozen=True)
class Rule:
    name: str
    effect: Effect
    trips: Question
    """A sentence where the rule says something of this folder, else None."""
    evidence: str = "code"
    """measured, code or doc: of the version that the engine names, or of one that is named here; else one of UNSURE."""
    stays: bool = False
    """It is the base that trips it, or what cannot be read at all: another form of the adapter does not help."""


@dataclass(frozen=True)
class Finding:
    rule: str
    effect: Effect
    why: str
    evidence: str
    stays: bool


@dataclass(frozen=True)
class Engine:
    name: str
    version: str
    """What the rules were read from."""
    rules: Sequence[Rule]


@dataclass(frozen=True)
class Opinion:
    """One engine on one folder."""

    engine: str
    version: str
    verdict: Verdict
    findings: tuple[Finding, ...]

    @property
    def takes(self) -> bool:
        return self.verdict == "takes it"


def judge(engine: Engine, facts: Facts) -> Opinion:
    """Ask all rules of an engine."""
    asked = [(rule, rule.trips(facts)) for rule in engine.rules]
    found = tuple(
        Finding(rule.name, rule.effect, why, rule.evidence, rule.stays) for rule, why in asked if why is not None
    )
    effects = {finding.effect for finding in found}
    verdict: Verdict = next((verdict for effect, verdict in VERDICTS.items() if effect in effects), "takes it")
    return Opinion(engine.name, engine.version, verdict, found)


def table(opinions: Sequence[Opinion]) -> str:
    """The opinions for people: a row for each engine, its reasons below."""
    rows = columns([("engine", "verdict", "read from"), *((one.engine, one.verdict, one.version) for one in opinions)])
    head, *lines = rows.splitlines()
    for line, one in zip(lines, opinions, strict=True):
        head += "\n" + line
        for found in one.findings:
            head += f"\n    {found.effect}: {found.why}{f' [{found.evidence}]' if found.evidence in UNSURE else ''}"
    return head


def way_out(opinions: Sequence[Opinion], adapter: Path) -> list[str]:
    """What helps with engines that do not take a folder, and with which nothing does; a line each."""
    wrong = [one for one in opinions if not one.takes]
    stay = [one.engine for one in wrong if any(found.stays for found in one.findings)]
    helped = [one.engine for one in wrong if one.engine not in stay]
    them = ", ".join(helped) if stay else "all of them"
    lines = [f"deltaw export {adapter} --output FOLDER writes a form for {them}, where the adapter has one."]
    return [
        *(lines if helped else []),
        *([f"No other form of the adapter helps with {', '.join(stay)}: see the reasons above."] if stay else []),
    ]


def read_facts(folder: Path, base: Base | None = None, *, allow_pickle: bool = False) -> Facts:
    """What is in an adapter folder. FileError where it holds none, or where its files cannot be read at all."""
    if not folder.is_dir():
        raise FileError(f"no adapter folder {str(folder)!r}")
    files = frozenset(file.name for file in folder.iterdir())
    if not files & {CONFIG, WEIGHTS, PICKLED}:
        below = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
        hint = f"; there is one in {folder / below[0]}" if below else ""
        raise FileError(f"{folder} holds no adapter in PEFT's form, neither {CONFIG} nor {WEIGHTS}{hint}")
    config = read_json(folder / CONFIG, AGAIN) if CONFIG in files else {}
    wrong = [
        f"{key}={config[key]!r} is not {words}" for key, check in SOUND.items() if (words := check(config.get(key)))
    ]
    if wrong:
        raise faults(FileError, f"{folder / CONFIG} is not PEFT's", wrong)
    added = read_json(folder / "added_tokens.json", AGAIN) if "added_tokens.json" in files else {}
    header, nonfinite = _header(folder, files, allow_pickle)
    return Facts(config, header, files, base, added, nonfinite)


def _header(
    folder: Path, files: frozenset[str], allow_pickle: bool
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], tuple[str, ...]]:
    """Names, dtypes and shapes, one tensor in memory at a time; and the keys of those that are not finite."""
    header: dict[str, tuple[str, tuple[int, ...]]] = {}
    wrong: list[str] = []
    if WEIGHTS in files:
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  not a mapping
                    tensor = opened.get_tensor(key)
                    header[key] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                    wrong += [] if bool(torch.isfinite(tensor).all()) else [key]
        except SafetensorError as error:
            raise FileError(f"{folder / WEIGHTS} is not a safetensors file ({error}): {AGAIN}") from None
    elif PICKLED in files:
        for key, tensor in read_tensors(folder, allow_pickle).items():
            header[key] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    return header, tuple(wrong)
