"""File by file: equal to the merge in memory to the bit, in every layout of a checkpoint; what fails leaves nothing."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import deltaw
from deltaw.core.host import host_of
from deltaw.core.method import Method, get
from deltaw.core.state import delta
from deltaw.formats import directory
from deltaw.models.mapped import class_of
from deltaw.ship.merge import merge_to_folder

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "max_position_embeddings": 64}


def llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **HEADS, **changes}))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    for path, parameter in model.named_parameters():
        if path.endswith("bias"):
            nn.init.normal_(parameter)  # new ones are zero: nothing to scale
    return model


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, **HEADS, num_local_experts=3))


def qwen2_moe() -> nn.Module:
    more = {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 3,
        "num_experts_per_tok": 2,
    }
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SMALL, **HEADS, **more))


def gpt_oss() -> nn.Module:
    """Stores its experts as transposes, all of a layer in one tensor; 32 = hidden = inner, so that shapes tell nothing."""
    sizes = {
        **SMALL,
        **HEADS,
        "intermediate_size": 32,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, eos_token_id=1))


def llava() -> nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}
    text = transformers.LlamaConfig(**SMALL, **HEADS)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=text, image_token_index=95
    )
    return transformers.LlavaForConditionalGeneration(config)


def stored(model: nn.Module, folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "12KB") -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def adapter(
    base: Path, folder: Path, method: Method, targets: Any = "all-linear", std: float = 0.05, seed: int = 1
) -> Path:
    """An adapter that does something, without paying for training."""
    model = opened(base)
    deltaw.attach(model, method, targets=targets)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * std)
    deltaw.save(model, folder)
    return folder


def opened(folder: Path, dtype: Any = "auto") -> nn.Module:
    return class_of(str(folder)).from_pretrained(folder, dtype=dtype).eval()


def in_memory(base: Path, folder: Path) -> Mapping[str, Tensor]:
    model = opened(base)
    deltaw.load(model, folder)
    deltaw.merge(model, keep_base=True)
    with torch.no_grad():
        merged = {path: tensor.clone() for path, tensor in model.state_dict().items() if ".adapters." not in path}
    return merged


def raw(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


PARTS = dict.fromkeys(("vision", "projector", "language"), "all-linear")
CASES: dict[str, tuple[Callable[[], nn.Module], Method, Any]] = {
    "lora": (llama, deltaw.LoRA(rank=4, alpha=12), "all-linear"),
    "rslora": (llama, deltaw.LoRA(rank=8, alpha=8, rslora=True), "all-linear"),
    "untied head and table": (llama, deltaw.LoRA(rank=4, alpha=12), ["embed_tokens", "lm_head", "q_proj"]),
    "dora": (llama, deltaw.DoRA(rank=4, alpha=12), "all-linear"),
    "loha": (llama, get("loha")(), "mlp"),
    "trained copies": (llama, deltaw.LoRA(rank=4, modules_to_save=("norm", "lm_head")), "attention"),
    "transposes": (gpt2, deltaw.LoRA(rank=4, alpha=12), "all-linear"),
    "scaled biases": (gpt2, get("ia3")(), "all-linear"),
    "experts, w1 w2 w3": (mixtral, deltaw.LoRA(rank=4, alpha=12), "all-linear"),
    "experts, gate up down": (qwen2_moe, deltaw.LoRA(rank=4, alpha=12), "all-linear"),
    "experts, one tensor, transposed": (gpt_oss, deltaw.LoRA(rank=4, alpha=12), "all-linear"),
    "vision and language": (llava, deltaw.LoRA(rank=4, alpha=12), PARTS),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_merge_in_memory_to_the_bit(case: str, tmp_path: Path) -> None:
    build, method, targets = CASES[case]
    base = stored(build(), tmp_path / "base")
    wanted = in_memory(base, adapter(base, tmp_path / "a", method, targets))
    done = merge_to_folder(str(base), tmp_path / "a", tmp_path / "m")
    assert done.way == "shards" and not done.vanished and done.effect > 0
    found = opened(tmp_path / "m").state_dict()
    assert found.keys() == wanted.keys()
    assert [path for path in wanted if not torch.equal(found[path], wanted[path])] == []
    before, after = raw(base), raw(tmp_path / "m")
    assert sum(not torch.equal(before[key], after[key]) for key in before) >= done.weights


def test_same_files_names_dtypes_and_metadata(tmp_path: Path) -> None:
    base = stored(llama(), tmp_path / "base")
    assert len(list(base.glob("*.safetensors"))) > 3
    done = merge_to_folder(str(base), adapter(base, tmp_path / "a", deltaw.LoRA(rank=2), "q_proj"), tmp_path / "m")
    assert {f.name for f in (tmp_path / "m").iterdir()} == {f.name for f in base.iterdir()} | {"merge.json"}
    for file in base.iterdir():
        written = tmp_path / "m" / file.name
        assert written.stat().st_size == file.stat().st_size
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as old, safe_open(written, "pt") as new:
                assert old.metadata() == new.metadata() and old.keys() == new.keys()
                moved = {key for key in old.keys() if not torch.equal(old.get_tensor(key), new.get_tensor(key))}  # noqa: SIM118
                assert moved == {key for key in old.keys() if "q_proj" in key}  # noqa: SIM118
        else:
            assert written.read_bytes() == file.read_bytes()
    record = json.loads((tmp_path / "m/merge.json").read_text())
    assert record["files"] == done.files and set(record["seconds"]) == {"plan", "compare", "write", "check"}
    for name, digest in done.files.items():
        assert hashlib.sha256((tmp_path / "m" / name).read_bytes()).hexdigest() == digest
    assert record["base"]["layer"] == "LlamaForCausalLM" and record["adapters"][0]["digest"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_another_dtype(dtype: str, tmp_path: Path) -> None:
    base = stored(llama(), tmp_path / "base")
    folder = adapter(base, tmp_path / "a", deltaw.LoRA(rank=2))
    merge_to_folder(str(base), folder, tmp_path / "m", dtype=dtype)
    model = opened(base, torch.float32)
    deltaw.load(model, folder)
    deltaw.merge(model)
    found, kind = raw(tmp_path / "m"), {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    assert all(torch.equal(tensor.to(kind), found[path]) for path, tensor in model.state_dict().items())
    assert opened(tmp_path / "m").dtype == kind
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())


def test_several_with_strengths_are_the_sum_of_their_changes(tmp_path: Path) -> None:
    base = stored(llama(), tmp_path / "base", torch.float32)
    parts = {
        adapter(base, tmp_path / "a", deltaw.LoRA(rank=4, alpha=12), seed=1): 0.7,
        adapter(base, tmp_path / "b", deltaw.LoRA(rank=2, rslora=True), "mlp", seed=2): -0.3,
        adapter(base, tmp_path / "c", deltaw.DoRA(rank=3), "attention", seed=3): 0.5,
    }
    done = merge_to_folder(str(base), list(parts.items()), tmp_path / "m")
    assert done.max_logit_difference < 1e-4 < done.effect
    model, found = opened(base), raw(tmp_path / "m")
    for folder, strength in parts.items():
        state, _ = directory.read(folder)
        for site in state.methods:
            weight = host_of(model.get_submodule(site.path)).weight.detach().double()
            found[f"{site.path}.weight"] = found[f"{site.path}.weight"].double() - strength * delta(state, site, weight)
    for path, tensor in model.state_dict().items():
        torch.testing.assert_close(found[path].double(), tensor.double(), rtol=0, atol=2e-7)
    again = json.loads((tmp_path / "m/merge.json").read_text())["adapters"]
    assert [one["strength"] for one in again] == [0.7, -0.3, 0.5]
