"""Would a smaller rank do? On the bundled base, with an adapter that a few steps taught to answer."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import deltaw
from deltaw.core.errors import UseError
from deltaw.core.route import live, names, use
from deltaw.data.collate import Collator
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import Policy
from deltaw.data.rows import Rows, read_rows
from deltaw.infer.evaluate import held_out_loss
from deltaw.infer.loss import SFTLoss
from deltaw.infer.truncate import Cut, Truncation, halves, highest, truncation
from deltaw.methods.dora import DoRA
from deltaw.methods.full import Full
from deltaw.methods.lora import LoRA
from deltaw.models.base import Base, load_base

WORDS = ("river", "castle", "garden", "church")


def rows(folder: Path) -> tuple[Rows, Rows]:
    """Rows to learn, and rows that are held out."""
    pairs, found = [(a, b) for a in WORDS for b in WORDS], []
    for start in (0, 1):
        file = folder / f"{start}.jsonl"
        lines = (json.dumps({"prompt": f"say {a} {b}", "completion": f"{b} {a}"}) for a, b in pairs[start::2])
        file.write_text("\n".join(lines) + "\n")
        found.append(read_rows(str(file)))
    return found[0], found[1]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Rows]:
    """tiny with adapter `a` of rank 4, after a few steps; and held-out rows."""
    torch.manual_seed(0)
    learnt, held_out = rows(tmp_path_factory.mktemp("rows"))
    base = load_base("tiny", dtype="fp32")
    deltaw.attach(base.model, LoRA(rank=4, alpha=8), targets=["q_proj", "v_proj", "down_proj"], name="a")
    batch = Collator(base.tokenizer)(encode_rows(learnt, base.tokenizer, Policy(64))[0])
    trained = [p for p in base.model.parameters() if p.requires_grad]
    optimizer, loss = torch.optim.Adam(trained, lr=1e-2), SFTLoss(base.model)
    for _ in range(8):
        summed, count = loss(batch)
        (summed / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, held_out


def test_the_curve_goes_from_the_adapter_to_its_base(taught: tuple[Base, Rows]) -> None:
    base, held_out = taught
    encoded, _ = encode_rows(held_out, base.tokenizer, Policy(64))
    before, told = deltaw.extract(base.model, "a"), list[str]()
    with use(base.model, {"a": 0.5}):
        found = truncation(base.model, base.tokenizer, held_out, name="a", max_length=64, say=told.append)
        assert live(base.model) == {"a": 0.5} and names(base.model) == ["a"]  # as it was
    losses = {}
    for name, route in (("a", {"a": 1.0}), ("base", {})):
        with use(base.model, route):
            losses[name] = held_out_loss(base.model, base.tokenizer, encoded)
    assert [cut.rank for cut in found.cuts] == [4, 2, 1, 0] and found.rows == 8
    assert found.loss == pytest.approx(losses["a"]) and found.cuts[-1].loss == pytest.approx(losses["base"])
    assert found.cuts[0].loss == pytest.approx(found.loss, abs=1e-5) and found.cuts[0].lost == pytest.approx(
        0, abs=1e-6
    )
    lost = [cut.lost for cut in found.cuts]
    assert lost == sorted(lost) and found.gain > 0.1
    assert found.kept(found.cuts[-1]) == 0 and found.kept(found.cuts[0]) == pytest.approx(1, abs=1e-3)
    assert told == ["as it is", "rank 4", "rank 2", "rank 1", "the base"]
    after = deltaw.extract(base.model, "a")
    assert all(torch.equal(t, after.tensors[s][n]) for s, group in before.tensors.items() for n, t in group.items())


def test_a_change_of_one_direction_needs_no_more(taught: tuple[Base, Rows]) -> None:
    """What the curve says of an adapter whose ranks are three quarters unused."""
    base, held_out = taught
    cut, _ = deltaw.to_lora(deltaw.extract(base.model, "a"), rank=1)
    wide = cut + 0.0 * (cut + cut + cut)
    deltaw.insert(base.model, wide, name="wide")
    try:
        found = truncation(base.model, base.tokenizer, held_out, name="wide", max_length=64)
    finally:
        deltaw.detach(base.model, "wide")
        use(base.model, "a")
    assert highest(wide) == 4 and found.enough == 1 and found.said.startswith("yes: cut to rank 1")
    assert all(one.loss == pytest.approx(found.loss, abs=1e-4) for one in found.cuts[:-1])


def curve(whole: float, *losses: float) -> Truncation:
    ranks = [*halves(2 ** (len(losses) - 2)), 0]
    return Truncation(9, whole, tuple(Cut(r, loss, 0.1) for r, loss in zip(ranks, losses, strict=True)))


def test_what_is_said_of_a_curve() -> None:
    assert curve(1.0, 1.0, 1.005, 1.2, 2.0).enough == 2  # 8 / 4 … of a gain of 1: 0.5 % lost, then 20 %
    assert curve(1.0, 1.0, 1.5, 1.001, 2.0).enough == 4  # a lucky cut below a bad one does not count
    assert "no: below rank 4" in curve(1.0, 1.0, 1.5, 1.8, 2.0).said
    assert "no: already rank 4" in curve(1.0, 1.4, 1.5, 1.8, 2.0).said
    for base in (1.9, 2.0, 2.01):  # worse, equal, and a gain that chance may make
        assert "no better than its base" in curve(2.0, 2.0, 2.0, 2.0, base).said
        assert curve(2.0, 2.0, 2.0, 2.0, base).enough is None
    record = curve(1.0, 1.0, 1.5, 1.8, 2.0).to_dict()
    assert json.dumps(record) and [c["kept"] for c in record["cuts"]] == pytest.approx([1.0, 0.5, 0.2, 0.0])
    assert "0, the base" in str(curve(1.0, 1.0, 1.5, 1.8, 2.0))


def test_where_cuts_begin() -> None:
    assert halves(12) == [12, 6, 3, 1] and halves(1) == [1]
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 100))
    deltaw.attach(model, DoRA(rank=2), targets="all-linear", name="d")
    assert highest(deltaw.extract(model, "d")) == 30  # its change has no rank of its own
    deltaw.attach(model, LoRA(rank=4, init="pissa"), targets="0", name="p")
    assert highest(deltaw.extract(model, "p")) == 8  # A, B and what they started from
    deltaw.attach(model, Full(), targets="1", name="f")
    with pytest.raises(UseError, match="could be cut to a rank"):
        highest(deltaw.extract(model, "f"))
