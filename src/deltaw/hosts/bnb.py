"""bitsandbytes' quantised layers: Linear4bit (NF4, FP4) and Linear8bitLt (int8), y = x Wᵀ + b with W decoded.

    4 bit    W = code[q] · c            one c for 64 values    QLoRA, Dettmers et al. 2023, arXiv 2305.14314
    double   c = mean + map[q₂] · c₂    one c₂ for 256 of them
    int8     W = q · c / 127            one c for a row        LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339

The canonical weight is the decoded one, [out, in], in fp32 whatever the layer computes in: a norm, a merge or a change
must not be rounded a second time. `op` rounds it to the activations' dtype, as the layer itself does. `write` encodes
anew, which loses what 4 or 8 bits cannot hold; `rounded` says beforehand what will be left.

Where the CPU has AVX512-bf16, a Linear4bit lays its bytes out anew at its first evaluation forward, rounds its scales to
bf16, computes in bf16, lets no gradient through from then on, and refuses `out` that 32 does not divide. That is
switched off while adapters are attached, and undone where it has happened (exactly; its rounding of the scales stays).
In evaluation a Linear8bitLt rounds its input to 8 bits as well; the adapters beside it see the input itself.
A layer that was pickled comes back with a plain Parameter: it computes the same, but bitsandbytes cannot move it to
another device.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.host import HostSpec, Map, WeightHost, register
from deltaw.kernels.grouped import grouped


class QuantizedHost(WeightHost):
    """What both kinds have in common. Codes and scales are together a form: what `encode` gives and `decode` takes."""

    module: Any

    @property
    def spec(self) -> HostSpec:
        return HostSpec((self.module.out_features, self.module.in_features))

    @property
    def weight(self) -> Tensor:
        return self.decode(self.parameter, self.scales(self.parameter))

    def rounded(self, weight: Tensor) -> Tensor:
        return self.decode(*self.encode(weight))

    def op(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype))

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(x, a), b)  # [T, in] → [T, r] → [T, out]

    def act(
        self, x: Tensor, dense: Callable[[], Tensor], vectors: Map | None = None, columns: Map | None = None
    ) -> Tensor:
        return self.op(x, dense()) if vectors is None else vectors(x)

    def scales(self, parameter: Tensor) -> Any:
        """What belongs to the codes in `parameter`; None where it is not quantised yet."""
        raise NotImplementedError

    def encode(self, weight: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def decode(self, codes: Tensor, scales: Any) -> Tensor:
        raise NotImplementedError

    def fault(self) -> str | None:
        if self.scales(self.parameter) is None:
            return "its weight is not quantised yet: move the model to its device first, model.to(…)"
        return super().fault()


@register("bitsandbytes.nn.modules.Linear4bit")
class Linear4bitHost(QuantizedHost):
    grouped = staticmethod(grouped)

    @property
    def quantized(self) -> str | None:
        state = self.scales(self.parameter)
        if state is None:
            return None
        double = state.nested or getattr(state, "original_nested", False)
        return f"{state.quant_type}-double" if double else str(state.quant_type)

    def scales(self, parameter: Tensor) -> Any:
        return getattr(parameter, "quant_state", None)

    def encode(self, weight: Tensor) -> tuple[Tensor, Any]:
        from bitsandbytes import functional

        old, stored = self.scales(self.stored), self.stored
        codes, state = functional.quantize_4bit(
            weight.detach().to(stored.device, torch.float32).contiguous(),
            blocksize=old.blocksize, compress_statistics=old.nested, quant_type=old.quant_type, quant_storage=stored.dtype,
        )  # fmt: skip
        state.dtype = old.dtype  # the one the layer was made in, not that of our arithmetic
        return codes, state

    def decode(self, codes: Tensor, scales: Any) -> Tensor:
        ops = torch.ops.bitsandbytes
        if getattr(scales, "packing_format_for_cpu", False):
            codes, scales = _unpacked(codes, scales)
        largest = scales.absmax  # [blocks]
        if scales.nested:
            inner = scales.state2
            largest = ops.dequantize_blockwise(largest, inner.absmax, inner.code, inner.blocksize, torch.float32)
            largest = largest + scales.offset
        return ops.dequantize_4bit(  # type: ignore[no-any-return]
            codes, largest.float(), scales.blocksize, scales.quant_type, scales.shape, torch.float32
        )

    def write(self, weight: Tensor) -> None:
        self._store(*self.encode(weight))

    def keep(self) -> Tensor:
        from bitsandbytes.nn import Params4bit

        stored = self.stored
        state = copy.deepcopy(self.scales(stored))
        return Params4bit(  # type: ignore[no-any-return]
            stored.detach().clone(), requires_grad=False, quant_state=state, blocksize=state.blocksize,
            quant_type=state.quant_type, quant_storage=stored.dtype, bnb_quantized=True,
        )  # fmt: skip

    def restore(self, kept: Tensor) -> None:
        self._store(kept.detach().clone(), copy.deepcopy(self.scales(kept)))

    def _store(self, codes: Tensor, state: Any) -> None:
        stored: Any = self.stored
        stored.data, stored.quant_state = codes, state
        self.module.quant_state = state

    def steady(self) -> tuple[str, Any] | None:
        state, flag = self.scales(self.stored), "support_avx512bf16_for_cpu"
        if getattr(state, "packing_format_for_cpu", False):
            self._store(*_unpacked(self.stored.detach(), state))
        if not getattr(self.module, flag, False):
            return None
        setattr(self.module, flag, False)
        return flag, True


def _unpacked(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and scales in the common layout, of a layer that was packed for the CPU.

    Packed: [out, in/2] bytes, 32 rows interleaved; scales [in/64, out] in bf16, not doubly quantised any more.
    """
    from bitsandbytes import functional

    state = copy.deepcopy(state)
    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # else they would be quantised a second time
    codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
    state.absmax = scales
    return codes, state


@register("bitsandbytes.nn.modules.Linear8bitLt")
class Linear8bitHost(QuantizedHost):
    grouped = staticmethod(grouped)

    @property
    def quantized(self) -> str | None:
        return None if self.scales(self.parameter) is None else "int8"

    def scales(self, parameter: Tensor) -> Any:
        """[out], the largest |w| of each row: on the parameter until the first forward, then on the layer."""
        own = getattr(parameter, "SCB", None)
        return self.module.state.SCB if own is None and parameter.dtype == torch.int8 else own

    def encode(self, weight: Tensor) -> tuple[Tensor, Any]:
        half = weight.detach().to(self.stored.device, torch.float16)  # as the layer does when it is made
        codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(half, 0.0)
        return codes, scales

    def decode(self, codes: Tensor, scales: Any) -> Tensor:
        return codes.float() * (scales.float() * (1.0 / 127.0)).unsqueeze(1)

    def write(self, weight: Tensor) -> None:
        self._store(*self.encode(weight))

    def keep(self) -> Tensor:
        from bitsandbytes.nn import Int8Params

        scales = self.scales(self.stored).clone()
        return Int8Params(self.stored.detach().clone(), requires_grad=False, SCB=scales)  # type: ignore[no-any-return]

    def restore(self, kept: Tensor) -> None:
        self._store(kept.detach().clone(), self.scales(kept).clone())

    def _store(self, codes: Tensor, scales: Any) -> None:
        stored: Any = self.stored
        stored.data = codes
        holder = stored if self.module.state.CB is None else self.module.state
        holder.CB, holder.SCB = codes, scales

    def fault(self) -> str | None:
        if self.module.state.has_fp16_weights:
            return "it keeps an fp16 weight and rounds it anew in every forward (has_fp16_weights=True): make it with False"
        return super().fault()
