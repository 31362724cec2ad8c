"""Several states into one, and one into a plain LoRA. `exact` is the weighted sum of their changes."""

from deltaw.mixing.convert import to_lora
from deltaw.mixing.exact import exact

__all__ = ["exact", "to_lora"]
