"""Several states into one, and one into a plain LoRA.

exact     Σ wᵢΔWᵢ, by concatenating factors
svd       the same in a given rank, or in the smallest ones that keep a share of the energy
ties      trimmed, signs elected, mean of those that agree; on ΔW
dare      numbers dropped by chance and the rest rescaled; on ΔW
blocks    other weights for some modules, with any of these
to_lora   any weight method as plain LoRA
"""

from deltaw.mixing.blocks import blocks
from deltaw.mixing.convert import to_lora
from deltaw.mixing.dare import dare
from deltaw.mixing.exact import exact
from deltaw.mixing.svd import svd
from deltaw.mixing.through import Conversion, Converted
from deltaw.mixing.ties import ties

__all__ = ["Conversion", "Converted", "blocks", "dare", "exact", "svd", "ties", "to_lora"]
