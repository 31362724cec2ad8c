"""A base over its files: the same weights and identity as the loaded model; loaded whole, and said so, where names differ."""

import json
from pathlib import Path

import pytest
import torch
from core import tiny

from deltaw.core.base import by_path, identify
from deltaw.core.errors import FileError
from deltaw.core.host import host_of
from deltaw.models.mapped import open_base


@pytest.mark.parametrize("family", ["llama", "gpt2", "tied"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_modules_are_those_of_the_model(family: str, shard: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    base = open_base(str(tmp_path), by_path(model))
    assert base.remark is None
    for path, module in by_path(model).items():
        read = by_path(base.model)[path]
        assert type(read) is type(module)
        for slot, parameter in module._parameters.items():
            assert parameter is None or torch.equal(read._parameters[slot], parameter)  # type: ignore[arg-type]
        host = host_of(module)
        assert host is None or torch.equal(host_of(read).weight, host.weight)  # a Conv1D is turned as the model's is
    assert identify(model).difference(base.identity) is None
    other = tiny.model(family)
    other.get_input_embeddings().weight.data.add_(1.0)
    assert "values of" in str(identify(other).difference(base.identity))


def test_the_class_of_a_prefix_and_what_is_none_of_these(tmp_path: Path) -> None:
    """A bare GPT-2 has names without `transformer.`; what has another shape on disk is not read so."""
    model = tiny.model("gpt2")
    model.transformer.save_pretrained(tmp_path / "bare")
    base = open_base(str(tmp_path / "bare"), ["transformer.h.0.attn.c_attn"])
    assert base.remark is None and base.model.get_submodule("transformer.h.0.attn.c_attn").weight.shape == (32, 96)
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps({**config, "n_inner": 77}))
    assert open_base(str(tmp_path / "bare"), ["transformer.h.0.attn.c_attn"]).remark is None
    with pytest.raises(FileError, match="cannot be loaded"):  # a table of another shape: loading it whole says so
        open_base(str(tmp_path / "bare"), ["transformer.h.0.mlp.c_fc"])
