"""What a run will train, before any weight is loaded: its targets on the base's modules and shapes (meta device)."""

from deltaw.config.schema import Config
from deltaw.core import targets
from deltaw.core.plan import TargetPlan
from deltaw.models.base import outline


def outlook(config: Config) -> TargetPlan | None:
    """The plan that attaching will carry out; None where the run goes on from an adapter, which brings its own.

    Raises TargetError for targets that cannot be adapted, FileError for a base whose configuration cannot be read.
    """
    chosen = config.adapter
    if chosen.start is not None:
        return None
    model = outline(config.model)
    return targets.plan(model, chosen.method, chosen.targets, exclude=chosen.exclude, layers=chosen.layers)
