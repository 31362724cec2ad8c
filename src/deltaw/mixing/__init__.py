"""Several states into one. `exact` is the weighted sum of their changes."""

from deltaw.mixing.exact import exact

__all__ = ["exact"]
