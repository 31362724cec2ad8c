"""deltaw: adapt pretrained PyTorch models by a small low-rank change beside frozen weights, W' = W + (α/r)·B·A.

    import deltaw
    deltaw.attach(model, deltaw.LoRA(rank=16, alpha=32), targets="all-linear", name="sql")

Names are imported on first use, so that `import deltaw` costs nothing.
"""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "AdaLoRA": "deltaw.methods.adalora",
    "AdapterState": "deltaw.core.state",
    "BOFT": "deltaw.methods.boft",
    "Bottleneck": "deltaw.methods.bottleneck",
    "DeltawError": "deltaw.core.errors",
    "DoRA": "deltaw.methods.dora",
    "Full": "deltaw.methods.full",
    "IA3": "deltaw.methods.ia3",
    "Library": "deltaw.library.store",
    "LlamaAdapter": "deltaw.methods.llama_adapter",
    "LoHa": "deltaw.methods.loha",
    "LoKr": "deltaw.methods.lokr",
    "LoRA": "deltaw.methods.lora",
    "MoRA": "deltaw.methods.mora",
    "OFT": "deltaw.methods.oft",
    "TargetPlan": "deltaw.core.plan",
    "TokenRows": "deltaw.methods.token_rows",
    "VeRA": "deltaw.methods.vera",
    "analysis": "deltaw.analysis",
    "assemble": "deltaw.models.assemble",
    "attach": "deltaw.core.attach",
    "convert": "deltaw.ship.convert",
    "detach": "deltaw.core.attach",
    "evaluate": "deltaw.infer.evaluate",
    "export": "deltaw.ship.export",
    "extract": "deltaw.core.attach",
    "fused": "deltaw.fusion.fused",
    "generate": "deltaw.infer.generate",
    "insert": "deltaw.core.attach",
    "load": "deltaw.models.adapters",
    "load_base": "deltaw.models.base",
    "merge": "deltaw.core.merge",
    "mixing": "deltaw.mixing",
    "nn": "deltaw.nn",
    "resume": "deltaw.training.run",
    "save": "deltaw.models.adapters",
    "to_lora": "deltaw.mixing.convert",
    "train": "deltaw.training.run",
    "unmerge": "deltaw.core.merge",
    "use": "deltaw.core.route",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from deltaw import analysis, mixing, nn
    from deltaw.core.attach import attach, detach, extract, insert
    from deltaw.core.errors import DeltawError
    from deltaw.core.merge import merge, unmerge
    from deltaw.core.plan import TargetPlan
    from deltaw.core.route import use
    from deltaw.core.state import AdapterState
    from deltaw.fusion.fused import fused
    from deltaw.infer.evaluate import evaluate
    from deltaw.infer.generate import generate
    from deltaw.library.store import Library
    from deltaw.methods.adalora import AdaLoRA
    from deltaw.methods.boft import BOFT
    from deltaw.methods.bottleneck import Bottleneck
    from deltaw.methods.dora import DoRA
    from deltaw.methods.full import Full
    from deltaw.methods.ia3 import IA3
    from deltaw.methods.llama_adapter import LlamaAdapter
    from deltaw.methods.loha import LoHa
    from deltaw.methods.lokr import LoKr
    from deltaw.methods.lora import LoRA
    from deltaw.methods.mora import MoRA
    from deltaw.methods.oft import OFT
    from deltaw.methods.token_rows import TokenRows
    from deltaw.methods.vera import VeRA
    from deltaw.mixing.convert import to_lora
    from deltaw.models.adapters import load, save
    from deltaw.models.assemble import assemble
    from deltaw.models.base import load_base
    from deltaw.ship.convert import convert
    from deltaw.ship.export import export
    from deltaw.training.run import resume, train


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        near = difflib.get_close_matches(name, __all__, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'deltaw' has no attribute {name!r}{hint}")
    module = importlib.import_module(_WHERE[name])
    value = module if _WHERE[name] == f"deltaw.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
