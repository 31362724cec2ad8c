"""A base with quantised weights: transformers and bitsandbytes encode the linear layers while they load.

    nf4          4 bits a weight and a scale for 64 of them: 4.5 bits      QLoRA, Dettmers et al. 2023, arXiv 2305.14314
    nf4-double   the scales in 8 bits: 4.13 bits
    int8         8 bits a weight and a scale for each row                  LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339

The head, embeddings and norms stay in the dtype of the base, which is also what the layers compute in; of a model that reads
images too, all but its language model: towers and projectors are small, and may be trained in full.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deltaw.core.base import base_modules, quantization
from deltaw.core.errors import UseError, did_you_mean
from deltaw.core.host import host_of
from deltaw.core.parts import find

LANGUAGE = "language"
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def known(quantize: str) -> None:
    """UseError for a kind of quantisation that is not one."""
    if quantize not in KINDS:
        raise UseError(f"quantize {quantize!r} is none of {', '.join(KINDS)}{did_you_mean(quantize, KINDS)}")


def loading(
    name: str, quantize: str, config: Any, dtype: torch.dtype, device: torch.device, transformers: Any,
    outline: Callable[[], nn.Module],
) -> dict[str, Any]:  # fmt: skip
    """Options of `from_pretrained` for this kind. UseError where it cannot be: already quantised, or not installed.

    outline: gives the model without its weights, where it has to be asked for its parts.
    """
    own = method_of(config)
    if own is not None:
        if quantize != "none":
            raise UseError(f"the base {name!r} is quantised already ({own}, by its config.json): leave quantize out")
        return {"device_map": {"": str(device)}}  # such a model cannot be moved afterwards
    if quantize == "none":
        return {}
    require_bitsandbytes(quantize)
    options = {**KINDS[quantize], **({} if quantize == "int8" else {"bnb_4bit_compute_dtype": dtype})}
    parts = find(outline())
    if parts is not None:
        options["llm_int8_skip_modules"] = [r for part, roots in parts.roots.items() for r in roots if part != LANGUAGE]
    return {
        "quantization_config": transformers.BitsAndBytesConfig(**options),
        "device_map": {"": str(device)},
    }


def layers(model: nn.Module) -> list[nn.Module]:
    """What is quantised of a model that is not yet: the linear layers of the language model, but for the head."""
    ask: Any = getattr(model, "get_output_embeddings", None)
    parts, head = find(model), ask() if ask is not None else None
    linear = [(path, m) for path, m in base_modules(model) if type(m) is nn.Linear and m is not head]
    return [module for path, module in linear if parts is None or parts.of(path) == LANGUAGE]


def method_of(config: Any) -> str | None:
    """How a base's own files are quantised, by its config; None where they are not."""
    own = getattr(config, "quantization_config", None)
    if own is None:
        return None
    record = own if isinstance(own, dict) else own.to_dict()
    return str(record.get("quant_method") or "an unnamed method").rpartition(".")[2]


def require_bitsandbytes(quantize: str) -> None:
    """UseError, in one line, where bitsandbytes is not installed."""
    for noisy in ("backends.cpu.ops", "autograd._functions"):  # on kernels that are not needed, casts that are meant
        logging.getLogger(f"bitsandbytes.{noisy}").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UseError(f"quantize: {quantize} needs bitsandbytes: pip install 'deltaw[quant]'") from None


def settle(model: nn.Module, name: str, quantize: str) -> None:
    """Have layers that would rewrite their weight on the CPU stop it for good: base and tuned compute alike then."""
    for module in model.modules():
        host = host_of(module)
        if host is not None:
            host.steady()
    if quantize != "none" and quantization(model) is None:
        raise UseError(f"nothing in the base {name!r} can be quantised, it has no linear layers beside its head")
