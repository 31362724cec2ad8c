"""Several states into one, and one into a plain LoRA. `exact` is the weighted sum of their changes, `svd` that in a given rank."""

from deltaw.mixing.convert import to_lora
from deltaw.mixing.exact import exact
from deltaw.mixing.svd import svd

__all__ = ["exact", "svd", "to_lora"]
