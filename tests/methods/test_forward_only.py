"""Methods without a ΔW on whole models: training, cached generation, files, checkpointing, threads, refusals."""

import importlib
import inspect
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from formats.families import GQA, IDS, SMALL, build, randomise

import deltaw
from deltaw.core.adapter import Adapter
from deltaw.core.attach import extract
from deltaw.core.block import shadowed
from deltaw.core.errors import FileError, MergeError, UseError
from deltaw.core.method import Method
from deltaw.core.state import delta
from deltaw.hosts.block import BERT, LLAMA
from deltaw.methods.bottleneck import Bottleneck
from deltaw.methods.llama_adapter import LlamaAdapter
from deltaw.mixing import exact

METHODS = {
    "houlsby": Bottleneck(rank=8),
    "pfeiffer": Bottleneck(rank=8, placement="pfeiffer"),
    "parallel": Bottleneck(rank=8, placement="parallel"),
    "llama_adapter": LlamaAdapter(length=4),
}
DECODERS = ["llama", "qwen2", "qwen3", "gpt2"]
FAMILIES = [*DECODERS, "bert"]
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
THREE = [name for name in METHODS if name != "pfeiffer"]  # one serial placement is enough for what takes long
LONG = pytest.mark.parametrize("method", [METHODS[name] for name in THREE], ids=THREE)


def model_of(family: str) -> Any:
    if family == "qwen3":
        torch.manual_seed(7)
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GQA, head_dim=12)).eval()
    return build("qwen" if family == "qwen2" else family)


def adapted(family: str, method: Method) -> Any:
    model = model_of(family)
    deltaw.attach(model, method, targets="all-linear")
    randomise(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@LONG
def test_thirty_steps_lower_the_loss(family: str, method: Method) -> None:
    model = model_of(family)
    deltaw.attach(model, method, targets="all-linear")
    labels = torch.tensor([2, 0]) if family == "bert" else IDS
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-2, weight_decay=0.0)
    losses = []
    for _ in range(30):
        loss = model(input_ids=IDS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("family", DECODERS)
@LONG
@torch.no_grad()
def test_generation_with_a_cache_is_the_same(family: str, method: Method) -> None:
    model = adapted(family, method)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0  # a padded row
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    options |= {"output_scores": True, "return_dict_in_generate": True, "eos_token_id": None}
    cached, plain = (model.generate(IDS, use_cache=cache, **options) for cache in (True, False))
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(plain.scores), rtol=1e-4, atol=1e-4)
    with deltaw.use(model, {}):
        base = model.generate(IDS, use_cache=True, **options)
    assert float((torch.stack(cached.scores) - torch.stack(base.scores)).abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@EVERY
@torch.no_grad()
def test_files_hold_it_to_the_bit(family: str, method: Method, tmp_path: Path) -> None:
    model = adapted(family, method)
    live = model(input_ids=IDS).logits
    deltaw.save(model, tmp_path / "it")
    theirs = json.loads((tmp_path / "it" / "adapter_config.json").read_text())["peft_type"]
    assert theirs == f"DELTAW_{method.name.upper()}"  # nobody takes it for something of PEFT's
    assert json.loads((tmp_path / "it" / "deltaw.json").read_text())["layout"] == "native"
    fresh = model_of(family)
    report = deltaw.load(fresh, tmp_path / "it")
    assert report.base == "match" and torch.equal(fresh(input_ids=IDS).logits, live)
    assert extract(fresh).methods == extract(model).methods
    other = build("bert" if family != "bert" else "llama")
    with pytest.raises(FileError, match=r"does not fit this model"):
        deltaw.load(other, tmp_path / "it", allow_base_mismatch=True)


@pytest.mark.parametrize("family", FAMILIES)
@LONG
def test_gradient_checkpointing_is_the_same(family: str, method: Method) -> None:
    model = adapted(family, method).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(input_ids=IDS).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(bool(gradient.any()) for gradient in gradients[0])


@EVERY
def test_no_weight_can_hold_it(method: Method) -> None:
    model = adapted("llama", method)
    with pytest.raises(MergeError, match=rf"model.layers.0.*{method.name} has no ΔW, no weight can hold it"):
        deltaw.merge(model)
    with pytest.raises(UseError, match=r"its strength is 0 or 1, not 0.5"):
        deltaw.use(model, {"default": 0.5})
    state = extract(model)
    with pytest.raises(UseError, match=rf"{type(method).__name__} at one site cannot be mixed exactly"):
        exact([state, state], [0.5, 0.5])
    with pytest.raises(UseError, match=r"has no ΔW, its change cannot be written into a weight"):
        delta(state, next(iter(state.methods)), torch.zeros(state.specs[next(iter(state.methods))].shape))


@pytest.mark.parametrize(("family", "name"), [("bert", "houlsby"), ("llama", "llama_adapter")])
@torch.no_grad()
def test_threads_take_turns(family: str, name: str) -> None:
    """What stands in a child's place for one call is not seen by another thread's call."""
    model = adapted(family, METHODS[name])
    rows = [torch.randint(1, 60, (1, 9)) for _ in range(4)]
    expected = [model(input_ids=row).logits for row in rows]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(15):
            with torch.no_grad():
                if not torch.equal(model(input_ids=rows[number]).logits, expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("family", "name"), [("bert", "houlsby"), ("gpt2", "llama_adapter")])
@torch.no_grad()
def test_an_interrupted_call_leaves_nothing_behind(family: str, name: str) -> None:
    model = adapted(family, METHODS[name])
    live = model(input_ids=IDS).logits
    seams = re.compile(r"output\.dropout|attn\.resid_dropout")  # after the functions took their places
    inside = [m for path, m in model.named_modules() if isinstance(m, Adapter) or seams.search(path)]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for module in inside:
        handle = module.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=IDS)
        handle.remove()
        assert torch.equal(model(input_ids=IDS).logits, live)


def test_functions_in_a_childs_place_nest() -> None:
    net = torch.nn.Sequential(torch.nn.Identity())
    net.first = torch.nn.Identity()
    child = net.first
    with shadowed(net, first=lambda x: x + 1):
        outer = net.first
        with shadowed(net, first=lambda x: 10 * outer(x)):
            assert net.first(1) == 20
        assert net.first(1) == 2
        assert "first" in dict(net.named_children())  # the child stays where it is
    assert net.first is child and "first" not in net.__dict__


def renamed(cls: type, family: str) -> str:
    source = inspect.getsource(cls.forward).replace(family, "X")  # type: ignore[attr-defined]
    source = re.sub(r"#.*", "", source).replace("FlashAttentionKwargs", "K").replace("TransformersKwargs", "K")
    source = re.sub(r"sliding_window=.*?\),\s*$|sliding_window=self.sliding_window,", "", source, flags=re.M)
    return re.sub(r"\s+", "", source.replace(" | None", "").replace(" = None", ""))


@pytest.mark.parametrize(
    ("families", "parts"), [(LLAMA, ("Attention", "MLP")), (BERT, ("SelfAttention", "SelfOutput", "Output"))]
)
def test_families_of_one_host_run_the_same_forward(families: list[tuple[str, str]], parts: tuple[str, ...]) -> None:
    """A host speaks for several families because their code is the same: a release that changes one fails here."""
    for part in parts:
        texts: dict[str, set[str]] = {}
        for room, family in families:
            module = importlib.import_module(f"transformers.models.{room}.modeling_{room}")
            normed = family == "Qwen3" and part == "Attention"
            text = renamed(getattr(module, family + part), family)
            texts.setdefault(re.sub(r"self\.[qk]_norm\((.*?)\)\.transpose", r"\1.transpose", text), set()).add(family)
            assert ("q_norm" in text) == normed
        assert len(texts) == 1, f"{part}: {sorted(texts.values(), key=len)}"


@pytest.mark.parametrize("family", ["Mistral", "Roberta", "XLMRoberta", "Camembert"])
@EVERY
@torch.no_grad()
def test_relatives_of_the_families(family: str, method: Method) -> None:
    sizes = GQA if family == "Mistral" else SMALL
    model = getattr(transformers, f"{family}Model")(
        getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0)
    ).eval()
    before = model(IDS).last_hidden_state
    planned = deltaw.attach(model, method, targets="all-linear")
    assert len(planned) == (4 if method is METHODS["houlsby"] else 2)
    assert torch.equal(model(IDS).last_hidden_state, before)
    randomise(model)
    assert not torch.equal(model(IDS).last_hidden_state, before)
    deltaw.detach(model)
    assert torch.equal(model(IDS).last_hidden_state, before)
