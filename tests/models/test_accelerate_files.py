"""The accelerate files of the examples are ones that the installed accelerate reads, with the layers of the models they are for."""

from pathlib import Path

import pytest
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "accelerate"


@pytest.mark.parametrize(("name", "kind"), [("fsdp", DistributedType.FSDP), ("zero2", DistributedType.DEEPSPEED)])
def test_accelerate_reads_them(name: str, kind: DistributedType) -> None:
    found = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert found.distributed_type == kind and found.num_processes == 2 and found.mixed_precision == "bf16"
    assert bool(found.fsdp_config) == (name == "fsdp") and bool(found.deepspeed_config) == (name == "zero2")


def test_the_layers_that_are_wrapped_exist() -> None:
    named = (
        load_config_from_file(str(EXAMPLES / "fsdp.yaml")).fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    )
    models = (transformers.GemmaModel, transformers.CLIPVisionModel, transformers.ConvNextModel)
    small = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    configs = (
        {**small, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 8},
        small,
        {"hidden_sizes": [8] * 4, "depths": [1] * 4},
    )
    for name, model, options in zip(named, models, configs, strict=True):
        built = model(model.config_class(**options))
        assert name in {type(module).__name__ for module in built.modules()}
