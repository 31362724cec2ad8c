"""What a step with images takes: counted on an outline, on real tensors, and beside a process that trains."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pictured
import pytest
import torch
import vlm

import deltaw
from deltaw.core import targets
from deltaw.core.attach import attach
from deltaw.infer.loss import SFTLoss
from deltaw.models.base import outline
from deltaw.training.forecast import ROWLESS, TOWER
from deltaw.training.meter import Meter
from deltaw.training.rehearsal import Counted, dress, rehearse
from deltaw.training.watch import THRESHOLD

WHERE = {"vision": "all-linear", "language": "all-linear"}


def counted(family: str) -> tuple[Counted, dict[str, Any]]:
    model, batch = vlm.hollow(family).requires_grad_(False), vlm.inputs(family)
    dress(model, targets.plan(model, deltaw.LoRA(rank=4), WHERE).targets)
    rows, length = batch["input_ids"].shape
    labels = batch.pop("labels")
    return rehearse(model, rows, length, given=batch, supervised=4 / (length - 1)), {**batch, "labels": labels}


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_a_step_with_images_takes_what_the_model_takes(family: str) -> None:
    found, batch = counted(family)
    real = vlm.model(family)
    attach(real, deltaw.LoRA(rank=4), targets=WHERE)
    real.train()
    loss = SFTLoss(real)
    with deltaw.fused(real), Meter(real) as metered:
        total, count = loss(batch)
        (total / count).backward()
    assert found.features and found.peak == pytest.approx(metered.peak, rel=0.06)


def test_a_few_layers_stand_for_all_beside_a_tower(tmp_path: Path) -> None:
    """Of the language model alone, though the tower is larger: it is read after a layer of a certain number."""
    tower = {"num_hidden_layers": 9, "hidden_size": 128, "intermediate_size": 256}
    base, found = pictured.base(tmp_path, num_hidden_layers=7, vision=tower), []
    for few in (True, False):
        model = outline(str(base)).requires_grad_(False)
        dress(model, targets.plan(model, deltaw.LoRA(rank=4), {"language": "all-linear"}).targets)
        if not few:
            model.model.language_model.layers[4].self_attn.scaling = 0.1
        ids = torch.full((2, 40), 7)
        ids[:, 4:20] = model.config.image_token_id
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(2, 3, 16, 16)}
        found.append(rehearse(model, 2, 40, given=batch))
    assert all(one.features for one in found)
    for name in ("saved", "forward", "backward", "evaluation"):
        assert getattr(found[0], name) == pytest.approx(getattr(found[1], name), rel=1e-3), name


def test_plan_says_what_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.config import parse
    from deltaw.training import rehearsal
    from deltaw.training.forecast import costs
    from deltaw.training.outlook import outlook
    from deltaw.training.prepare import prepare

    base, rows = pictured.base(tmp_path / "base"), pictured.rows(tmp_path)
    config = parse.parse(pictured.config(base, rows, tmp_path / "run", {"language": "lora"}))
    real = rehearsal._rehearse

    def asks(*args: Any, given: Any = None, **options: Any) -> Counted:
        if given is not None:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        return real(*args, **options)

    monkeypatch.setattr(rehearsal, "_rehearse", asks)
    look = outlook(config)
    assert look is not None
    found = costs(config, look, prepare(config), ["here"])
    assert found["notes"] == [TOWER] and f"note: {TOWER}" in found["text"]
    assert costs(config, look, None, ["here"])["notes"] == [ROWLESS]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much a process has taken since a moment")
def test_a_process_takes_what_is_predicted_of_images(tmp_path: Path) -> None:
    """The resident size above a loaded LLaVA of 14 MB, of `deltaw train` in a process that gives back what it frees."""
    base = pictured.base(
        tmp_path / "base", pixels=128, patch=8, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        max_position_embeddings=512, vision={"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4},
    )  # fmt: skip
    parts = {"vision": "lora", "projector": "full", "language": "lora"}
    rows = pictured.rows(tmp_path, pictured=16)
    config = pictured.config(base, rows, tmp_path / "run", parts, batch_size=8, max_steps=2)
    code = "import json, sys, deltaw; deltaw.train(json.loads(sys.stdin.read()), quiet=True)"
    subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(config), text=True, check=True, stdout=subprocess.DEVNULL,
        env={**os.environ, THRESHOLD: "65536"},
    )  # fmt: skip
    predicted = json.loads((tmp_path / "run/plan.json").read_text(encoding="utf-8"))["predicted"]
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = next(event for event in events if event["event"] == "end")["memory_increment"]
    foreseen = predicted["memory"]["increment_bytes"]
    weights = predicted["memory"]["weights_bytes"]
    said = f"weights {weights / 1e6:.1f} MB, predicted {foreseen / 1e6:.1f} MB above them, measured {measured / 1e6:.1f} MB"
    print(said)
    assert foreseen == pytest.approx(measured, rel=0.15), said
