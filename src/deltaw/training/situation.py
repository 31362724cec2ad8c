"""A configuration → the facts that advice goes by: layers and shapes from the base's outline, rows and tokens from its data.

No weight is read: modules are on the meta device. Rows are read and encoded as `deltaw plan` does it.
"""

import dataclasses
from collections import Counter

from torch import nn

from deltaw.config.schema import Config
from deltaw.core import targets
from deltaw.core.errors import TargetError, UseError
from deltaw.core.host import WeightHost
from deltaw.core.plan import Target, TargetPlan
from deltaw.methods.lora import LoRA
from deltaw.planner.advice import Situation
from deltaw.planner.arithmetic import Layer
from deltaw.training.outlook import outlook
from deltaw.training.prepare import prepare


def situation(config: Config, *, data: bool = True) -> Situation:
    """data: whether the configuration names rows; without them nothing is said of steps and capacity."""
    chosen, train = config.adapter, config.train
    if config.stages or chosen.parts is not None:
        given = "stages" if config.stages else "adapter.parts"
        raise UseError(f"advice is for one run of one method: leave {given} out to be advised")
    look = outlook(config)
    if look is None:
        raise UseError(
            "an adapter to go on from brings its rank, alpha and targets: leave adapter.from out to be advised"
        )
    model, planned = look.model, look.plan
    method, layers = chosen.method, tuple(_layer(t) for t in planned.targets if _matrix(t))
    resolved = [t.method for t in planned.targets if _matrix(t)] or [method]
    pairs = Counter((getattr(one, "rank", None), getattr(one, "alpha", None)) for one in resolved)
    rank, alpha = pairs.most_common(1)[0][0]  # of most modules
    found = Situation(
        method=method.name,
        rank=rank,
        alpha=alpha,
        rslora=bool(getattr(method, "rslora", False)),
        init=str(getattr(method, "init", "")),
        dropout=float(getattr(method, "dropout", 0.0)),
        merges=method.name == "full" or issubclass(type(method).host, WeightHost),
        targets=(chosen.targets,) if isinstance(chosen.targets, str) else tuple(chosen.targets),
        layers=layers,
        left=_left(model, planned),
        base_parameters=planned.base_parameters,
        trainable=planned.trainable,
        quantize=config.quantize,
        learning_rate=train.learning_rate,
        batch=train.batch_size * train.gradient_accumulation,
        epochs=train.epochs,
        max_steps=train.max_steps,
    )
    if not data:
        return found
    report = prepare(config).report
    return dataclasses.replace(found, rows=report.kept, tokens=report.supervised_tokens)


def _matrix(target: Target) -> bool:
    """A weight that is one matrix, or a stack of them, and no companion (a bias, a norm, a copy) of another method."""
    return target.spec.linear and not target.spec.lookup and len(target.spec.shape) == 2


def _layer(target: Target) -> Layer:
    out, into = target.spec.shape
    return Layer(str(target.site), out, into, getattr(target.method, "rank", None), target.spec.stack or 1)


def _left(model: nn.Module, planned: TargetPlan) -> tuple[Layer, ...]:
    """Linear layers of the body that no target is, or is above (a sublayer)."""
    try:
        whole = targets.plan(model, LoRA(rank=1), "all-linear")
    except TargetError:  # a model without linear layers has none left out
        return ()
    there = set(planned.paths)

    def taken(path: str) -> bool:
        names = path.split(".")
        return any(".".join(names[:count]) in there for count in range(1, len(names) + 1))

    return tuple(_layer(t) for t in whole.targets if not taken(t.site.path))
