"""TokenRows on a whole model: new rows equal a base whose table has grown, which stays as large as it was."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from core import tiny
from torch import Tensor

import deltaw
from deltaw import LoRA, TokenRows
from deltaw.core.attach import adapters
from deltaw.core.errors import MergeError, UseError
from deltaw.core.state import delta

NEW = (64, 5, 65)  # 64 rows in the base: two are new
TABLES = {"llama": ["embed_tokens", "lm_head"], "tied": ["embed_tokens"]}


def ids() -> Tensor:
    return torch.tensor([[1, 64, 5, 9, 65, 2], [65, 65, 3, 64, 5, 8]])


def tuned(family: str, *, beside: bool = True) -> Any:
    model = tiny.model(family)
    deltaw.attach(model, TokenRows(tokens=NEW), targets=TABLES[family])
    if beside:
        deltaw.attach(model, LoRA(rank=3, alpha=5.0), targets=["q_proj"])
    stir(model)
    return model


def stir(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))


def grown(family: str, model: Any) -> Any:
    """The same function with plain weights: the tables have 66 rows, those of NEW are the adapter's."""
    state = deltaw.extract(model)
    other = tiny.model(family)
    other.resize_token_embeddings(66, mean_resizing=False)
    deltaw.insert(other, state)
    deltaw.merge(other)
    return other


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "tied"])
def test_new_rows_are_those_of_a_grown_table(family: str) -> None:
    model = tuned(family)
    logits = model(ids()).logits
    assert logits.shape == (2, 6, 66)
    assert float((grown(family, model)(ids()).logits - logits).abs().max()) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "tied"])
def test_the_base_keeps_its_size(family: str) -> None:
    model, plain = tuned(family), tiny.model(family)
    seen = torch.randint(0, 64, (2, 6))
    assert model.get_input_embeddings().weight.shape == (64, 32) and model.config.vocab_size == 64
    with deltaw.use(model, {}):
        assert torch.equal(model(seen).logits, plain(seen).logits)
    deltaw.detach(model)
    assert torch.equal(model(seen).logits, plain(seen).logits)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_gradients_reach_the_rows_that_are_read_and_scored() -> None:
    model = tuned("tied", beside=False)
    rows = next(p for p in model.parameters() if p.requires_grad)
    torch.nn.functional.cross_entropy(model(ids()).logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    assert rows.grad is not None and bool((rows.grad.abs().sum(1) > 0).all())


@torch.no_grad()
def test_strength_of_a_new_row_scales_the_row(tmp_path: Path) -> None:
    model = tuned("tied", beside=False)
    table, embed = model.get_input_embeddings(), torch.tensor([64, 5, 0])
    rows = next(p for p in model.parameters() if p.requires_grad)
    with deltaw.use(model, {"default": 0.5}):
        found = table(embed)
    torch.testing.assert_close(found[0], 0.5 * rows[0])  # the base has no row: W + 0.5·(W' − W) from nothing
    torch.testing.assert_close(found[1], 0.5 * (table.weight[5] + rows[1]))
    assert torch.equal(found[2], table.weight[0])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "tied"])
def test_files_and_peft_on_a_grown_base(family: str, tmp_path: Path) -> None:
    model = tuned(family)
    logits = model(ids()).logits
    deltaw.save(model, tmp_path / "rows")
    again = tiny.model(family)
    report = deltaw.load(again, tmp_path / "rows")
    assert report.base == "match" and torch.equal(again(ids()).logits, logits)
    other = tiny.model(family)
    other.resize_token_embeddings(66, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(other, str(tmp_path / "rows")).eval()
    assert float((theirs(ids()).logits - logits).abs().max()) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "tied"])
def test_an_adapter_on_the_same_tables_leaves_new_rows_alone(family: str) -> None:
    model, seen = tuned(family, beside=False), torch.randint(6, 64, (2, 6))
    deltaw.attach(
        model, LoRA(rank=3, alpha=5.0), targets=TABLES["llama"] if family == "llama" else ["embed_tokens"], name="low"
    )
    stir(model)
    with deltaw.use(model, "low"):
        low = model(seen).logits
    others = [token for token in range(64) if token not in NEW]
    for route in ({"default": 1.0, "low": 1.0}, {"low": 1.0, "default": 1.0}):  # the rows go around, in any order
        with deltaw.use(model, route):
            both = model(seen).logits
            row = model.get_input_embeddings()(torch.tensor([64]))[0]
        assert both.shape[-1] == 66
        torch.testing.assert_close(both[..., others], low[..., others], atol=1e-5, rtol=1e-5)
        assert torch.equal(row, next(iter(deltaw.extract(model).tensors.values()))["rows"][0])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "tied"])
@pytest.mark.parametrize("second", [(64, 5, 65), (64,), (5, 64, 65, 66)], ids=str)
def test_two_adapters_with_the_same_new_tokens_add_up(family: str, second: tuple[int, ...]) -> None:
    """As one adapter would, whose rows are the sums: of new tokens from nothing, of others from the base's row."""
    model, strengths = tiny.model(family), {"a": 0.5, "b": 0.75}
    for name, tokens in {"a": NEW, "b": second}.items():
        deltaw.attach(model, TokenRows(tokens=tokens), targets=TABLES[family], name=name)
        stir(model)
    states = {name: deltaw.extract(model, name) for name in strengths}
    both = tiny.model(family)
    deltaw.attach(both, TokenRows(tokens=tuple(dict.fromkeys(NEW + second))), targets=TABLES[family])
    for site, one in adapters(both).items():
        table = both.get_submodule(site.path).weight
        for place, token in enumerate(one.tokens):
            one.rows[place] = base = table[token] if token < 64 else torch.zeros(32)
            for name, state in states.items():
                tokens = state.methods[site].tokens
                if token in tokens:
                    one.rows[place] += strengths[name] * (state.tensors[site]["rows"][tokens.index(token)] - base)
    for route in (strengths, dict(reversed(strengths.items()))):
        with deltaw.use(model, route):
            torch.testing.assert_close(model(ids()).logits, both(ids()).logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                torch.compile(model.get_input_embeddings(), fullgraph=True, backend="eager")(ids()),
                both.get_input_embeddings()(ids()),
            )


def test_an_id_that_nobody_has_is_an_error() -> None:
    """It was read as row 0 once."""
    with pytest.raises(IndexError):
        tuned("tied")(torch.tensor([[1, 66]]))


def test_what_has_no_place_is_refused() -> None:
    model = tuned("tied")
    with pytest.raises(MergeError, match="it brings rows that the weight has no place for"):
        deltaw.merge(model)
    state = deltaw.extract(model)
    site = next(s for s, m in state.methods.items() if isinstance(m, TokenRows))
    with pytest.raises(UseError, match="brings rows that the weight does not have"):
        delta(state, site, model.get_input_embeddings().weight.T)
