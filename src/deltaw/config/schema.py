"""The one schema of a training configuration: a dataclass per section, a sentence per field, one set of defaults.

`deltaw.config.parse` validates files against it, `deltaw.config.describe` writes it out for editors and documentation.
The `adapter` section takes the fields of whichever Method its `method` names, from the registry.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deltaw.config.parts import FROZEN, PartConfig
from deltaw.config.stages import Stage
from deltaw.core.method import Method, get

STRICT: dict[str, Any] = {"extra": "forbid", "arbitrary_types_allowed": True}


def invalid_pattern(pattern: str | None) -> list[str]:
    """What is wrong with a pattern that takes texts apart."""
    if pattern is None:
        return []
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        return [f"pattern={pattern!r} is not a regular expression: {error}"]
    return [] if groups else [f"pattern={pattern!r} has no named groups: write (?P<prompt>…) and (?P<completion>…)"]


@dataclass(frozen=True, kw_only=True)
class Source:
    __pydantic_config__ = STRICT
    path: str
    """A file, a folder, a hub id (owner/name), or dataset_info.json#entry."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our field → the file's name for it; `instances.0.output` looks into lists and objects."""
    pattern: str | None = None
    """Regular expression with named groups for the lines of a .txt file, or the field `text`."""
    weight: float = 1.0
    """How often each row is taken: 2 is twice, 0.5 a fixed half of the rows."""
    rows: int | None = None
    """Only the first so many rows."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    images: str | None = None
    """Folder that the names of images are seen from. Default: that of the file of rows."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Names that turns use, e.g. {role: speaker, content: said, user: customer, assistant: agent}."""

    def invalid(self) -> list[str]:
        """Values of the right type that are still impossible, a sentence each."""
        found = [] if 0 < self.weight < math.inf else [f"weight={self.weight!r} must be above 0"]
        found += [f"rows={self.rows!r} must be at least 1"] if self.rows is not None and self.rows < 1 else []
        return found + invalid_pattern(self.pattern)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    __pydantic_config__ = STRICT
    train: str | Source | tuple[str | Source, ...]
    """Training rows: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder, a hub id, dataset_info.json#entry, or several."""
    eval: float | str | Source | tuple[str | Source, ...] | None = 0.05
    """Held-out rows: a share of the training rows (0.05), a source like train, or null for none."""
    general: str | Source | tuple[str | Source, ...] | None = None
    """A general text or rows, never trained on: measured before and after, to see what the run forgets; null for none."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our field → the files' name for it, e.g. {prompt: question, completion: answer}; for sources without their own."""
    pattern: str | None = None
    """Regular expression with named groups that takes the lines of .txt files, or the field `text`, apart."""
    template: str | None = None
    """Chat template: a name (chatml, plain), a file, or null for the base's own; kept with the adapter."""
    tokens: tuple[str, ...] = ()
    """Tokens whose rows are trained with the adapter, e.g. [<|call|>, <|done|>]; those that the vocabulary lacks are added."""
    max_length: int | None = None
    """Longest row in tokens. Default: what the model can read, at most 2048."""
    overflow: Literal["drop", "cut"] = "drop"
    """A longer row: drop it, or cut its beginning away. Both are counted; the stop token always stays."""
    train_on_prompt: bool = False
    """Supervise the prompt too, not only the answers."""
    turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns are learnt; a turn with `train: false` never is."""
    pairs: Literal["chosen"] | None = None
    """Of preference and judged rows learn the wanted answers; without it such rows are refused."""
    streaming: bool = False
    """Read rows one at a time and keep their tokens on disk, for data larger than memory; the run is the same to the bit."""
    packing: bool | Literal["auto"] = "auto"
    """Let short rows of a batch share a line: auto = where the model keeps them apart. Changes speed, never what a step learns."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    __pydantic_config__ = STRICT
    method: Method
    """Any registered method with its fields beside it, e.g. method: lora, rank: 16, alpha: 32."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules to adapt: all-linear, attention, mlp, names, full paths or regular expressions."""
    exclude: str | tuple[str, ...] = ()
    """Modules taken away from the targets."""
    layers: int | str | tuple[int, ...] | None = None
    """Only these layers: "0-3,7"."""
    parts: Mapping[str, PartConfig | None] | None = None
    """Of a model made of parts (vision, projector, language, head): how each is trained; one that is not named is frozen."""
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parts that are not found by themselves, {output_projector: [path]}, for `parts`."""
    start: str | None = None
    """Go on from this adapter folder; it brings its own method and targets, or is trained part by part, as `parts` says."""

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {} if self.start is None else {"from": self.start}
        if self.parts is None and record:
            return record
        record |= {"method": self.method.name, **dataclasses.asdict(self.method)}
        if self.parts is None:
            return record | {"targets": self.targets, "exclude": self.exclude, "layers": self.layers}
        parts = {name: FROZEN if part is None else part.to_dict() for name, part in self.parts.items()}
        return record | {"parts": parts} | ({"modules": self.modules} if self.modules else {})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    __pydantic_config__ = STRICT
    objective: Literal["sft", "text"] = "sft"
    """What is learnt, by cross-entropy: sft = the answers of the rows, text = raw texts from their first word on."""
    epochs: float = 1.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimizer steps; overrides epochs."""
    learning_rate: float = 2e-4
    """Peak learning rate; about ten times that of full fine-tuning."""
    batch_size: int = 8
    """Rows per step and process."""
    gradient_accumulation: int = 1
    """Batches summed into one optimizer step; the loss is normalised by supervised tokens over all of them."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warm-up."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW on the adapter's tensors."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
    seed: int = 0
    """Seed of initial values, order of rows and dropout."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of the frozen base: auto = bf16 on an accelerator that has it, else fp32. Adapters are fp32 always."""
    eval_every: int | Literal["auto"] = "auto"
    """Steps between evaluations: auto = about five in a run."""
    save_every: int | Literal["auto"] = "auto"
    """Steps between checkpoints: auto = as often as evaluation."""
    log_every: int = 10
    """Steps between lines of the event log."""
    keep: int = 2
    """Checkpoints kept, newest last."""
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = "adamw"
    """AdamW with fp32 states, or with 8-bit ones (bitsandbytes)."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Factors of the learning rate for some modules: {regular expression over the path: factor}; the first hit wins."""
    group_by_length: bool = False
    """Put rows of like lengths into one batch. Less padding, another order of rows."""
    neftune: float | None = None
    """Noise on the embeddings in training (NEFTune), e.g. 5; its size is this over √(length × width)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    best: bool = False
    """Finish with the adapter of the best evaluation, not with that of the last step."""
    generate: int = 0
    """Held-out rows to answer at every evaluation, for the metrics; 0 for none."""
    metrics: tuple[str, ...] = ("exact_match",)
    """Metrics of those answers: exact_match, rouge_l, bleu."""
    early_stopping: int | None = None
    """Stop after so many evaluations without a better one."""
    report_to: tuple[str, ...] = ()
    """Other loggers of the trainer, e.g. [tensorboard] or [wandb]; events.jsonl is always written."""


@dataclass(frozen=True, kw_only=True)
class Config:
    __pydantic_config__ = STRICT
    model: str
    """The base: a folder, a hub id, or `tiny` (bundled)."""
    quantize: Literal["none", "nf4", "nf4-double", "int8"] = "none"
    """Load the base's linear layers in 4 bits (QLoRA; double: the scales in 8 bits too) or in 8 (bitsandbytes)."""
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig(method=get("lora")()))
    train: TrainConfig = field(default_factory=TrainConfig)
    output: str = "runs/latest"
    """The run directory; must not hold another run."""

    stages: tuple[Stage, ...] = ()
    """Runs after each other, each going on from the adapter of the one before; each says what is other than above."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `parse` reads back to an equal Config."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for section in ("data", "train"):
            record[section] = dataclasses.asdict(record[section])
        record["adapter"] = self.adapter.to_dict()
        record["stages"] = [stage.to_dict() for stage in self.stages]
        if not self.stages:
            del record["stages"]
        return _plain(record)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
