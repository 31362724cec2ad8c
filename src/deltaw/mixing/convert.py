"""Any weight method → plain LoRA, for readers that know nothing else.

exact    where ΔW has factors: LoRA itself, PiSSA and OLoRA (rank 2r), AdaLoRA (without the λ that are zero), …
svd      else ΔW = UΣVᵀ cut at `rank`: B = U√Σ, A = √ΣVᵀ, scale 1; relative error √(Σ_{i>r} σᵢ²) / ‖ΔW‖
kept     changes of a parameter itself (trained copies, token rows, a scaled bias), which PEFT holds beside LoRA
"""

from dataclasses import replace

from deltaw.core.state import AdapterState
from deltaw.mixing.base import Weights
from deltaw.mixing.through import Conversion, Rank, through


def to_lora(
    state: AdapterState, weights: Weights | None = None, rank: Rank = None, *, energy: float | None = None
) -> tuple[AdapterState, Conversion]:
    """`state` as plain LoRA, and what that cost. Exact where the algebra allows, within `rank` where one is given.

    weights: the base, as the model, or as path → canonical weight [out, in, *kernel]; needed where ΔW depends on it
    (DoRA, OFT, …). rank: needed where ΔW has no factors; a lower one than the exact one cuts that too; "full" cuts nothing.
    energy: instead of a rank, or below it, the smallest ones that keep this share of ‖ΔW‖², module by module.
    """
    head = "this adapter cannot be made a LoRA"
    made, report = through([state], [1.0], rank=rank, energy=energy, base=weights, head=head)
    return replace(made, base=state.base, meta=state.meta), report
