"""Training: only A and B move, runs repeat and resume to the bit, Ctrl-C leaves a checkpoint, arguments are frozen."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deltaw
from deltaw.core.attach import adapters, attach
from deltaw.core.errors import DataError, TrainError, UseError
from deltaw.core.method import Method
from deltaw.data.collate import Collator
from deltaw.data.dataset import encode_rows
from deltaw.data.encode import Policy
from deltaw.data.rows import read_rows
from deltaw.infer.loss import SFTLoss, Summed, mean_loss
from deltaw.methods.adalora import AdaLoRA
from deltaw.methods.lora import LoRA
from deltaw.models.base import load_base
from deltaw.runs.directory import RunDirectory
from deltaw.training import callbacks
from deltaw.training import run as training


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["river", "castle", "garden", "church", "mill", "bridge"]
    text = [{"prompt": f"say {a} then {b}", "completion": f"{b}, {a} and {b}."} for a in words for b in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in text))
    return file


def config(rows: Path, output: Path, **train: object) -> dict:
    defaults = {
        "max_steps": 8,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "save_every": 4,
        "eval_every": 4,
        "log_every": 1,
    }
    return {
        "model": "tiny",
        "data": {"train": str(rows), "eval": 0.2},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {**defaults, **train},
        "output": str(output),
    }


@pytest.fixture(scope="module")
def finished(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> training.Run:
    return deltaw.train(config(rows, tmp_path_factory.mktemp("runs") / "whole"), quiet=True)


def test_run_directory_holds_everything(finished: training.Run, rows: Path) -> None:
    run = RunDirectory(finished.path)
    assert finished.losses["held_out"] < finished.losses["base"]
    assert sorted(p.name for p in run.path.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "events.jsonl",
        "plan.json",
        "report.html",
    ]
    assert json.loads((run.path / "plan.json").read_text())["trainable"] == finished.plan.trainable
    assert run.steps() == [4, 8]
    assert [e["step"] for e in run.events("step")] == list(range(1, 9))
    assert run.events("end")[0]["losses"] == finished.losses
    assert {p.name for p in run.checkpoint(4).iterdir()} == {
        "adapter", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    }  # fmt: skip
    manifest = json.loads((finished.adapter / "deltaw.json").read_text())
    assert manifest["base"]["name"] == "tiny"


def test_only_the_adapter_moves(rows: Path) -> None:
    base = load_base("tiny")
    before = {path: p.clone() for path, p in base.model.named_parameters()}
    attach(base.model, LoRA(rank=4), targets="all-linear")
    encoded, _ = encode_rows(read_rows(rows), base.tokenizer, Policy(512))
    loss, collate = SFTLoss(base.model), Collator(base.tokenizer)
    optimizer = torch.optim.AdamW([p for p in base.model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        total, count = loss(collate(encoded[:8]))
        (total / count).backward()
        if step == 0:
            assert callbacks.check_gradients(base.model, "default") == []
            assert all(not p.grad.any() for n, p in base.model.named_parameters() if n.endswith("lora_A"))  # B = 0
        optimizer.step()
        optimizer.zero_grad()
    after = dict(base.model.named_parameters())
    assert all(torch.equal(after[path], p) for path, p in before.items())


@pytest.mark.parametrize("method", [LoRA(rank=2), AdaLoRA(rank=2)])
def test_a_leak_and_a_dead_adapter_are_named(method: Method) -> None:
    """A gradient from the method's own penalty is none from the loss."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    attach(model, method, targets="all-linear")
    penalty = method.penalty(list(adapters(model).values()))
    (model[0](torch.randn(2, 4)).sum() + (0.0 if penalty is None else penalty)).backward()
    assert callbacks.check_gradients(model, "default") == ["1"]
    model[1].weight.grad = torch.ones(4, 4)
    with pytest.raises(TrainError, match=r"1\.weight is of the base and has a gradient"):
        callbacks.check_gradients(model, "default")
    model[1].weight.grad = None
    for p in model.parameters():
        p.grad = None
    with pytest.raises(TrainError, match="no gradient reaches the adapter"):
        callbacks.check_gradients(model, "default")


def test_loss_on_supervised_positions_equals_full_logits(rows: Path) -> None:
    base = load_base("tiny")
    encoded, _ = encode_rows(read_rows(rows), base.tokenizer, Policy(512))
    batch = Collator(base.tokenizer)(encoded[:6])
    loss = SFTLoss(base.model)
    assert loss.gathers
    total, count = loss(batch)
    reference = base.model(**batch).loss
    assert torch.allclose(total / count, reference, atol=1e-5) and int(count) < batch["labels"].numel()
    parts = [loss(Collator(base.tokenizer)(encoded[i : i + 2])) for i in (0, 2, 4)]
    assert torch.allclose(sum(t for t, _ in parts), total, rtol=1e-5)  # padding and batching change nothing
    assert mean_loss(loss, [batch]) == pytest.approx(float(total / count), rel=1e-6)


def test_chunked_loss_is_the_same(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base("tiny")
    attach(base.model, LoRA(rank=4), targets=["lm_head", "q_proj"])
    encoded, _ = encode_rows(read_rows(rows), base.tokenizer, Policy(512))
    batch, loss = Collator(base.tokenizer)(encoded), SFTLoss(base.model)
    whole, _ = loss(batch)
    whole.backward()
    gradients = [p.grad.clone() for p in base.model.parameters() if p.requires_grad]
    for p in base.model.parameters():
        p.grad = None
    monkeypatch.setattr("deltaw.infer.loss.CHUNK_VALUES", 64 * 4096)
    chunked, count = loss(batch)
    assert int(count) > 64 and torch.allclose(chunked, whole, rtol=1e-5)
    chunked.backward()
    for p, g in zip((p for p in base.model.parameters() if p.requires_grad), gradients, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5)
    assert any(bool(g.any()) for g in gradients)

    with torch.no_grad():
        assert torch.allclose(loss(batch)[0], whole, rtol=1e-5)
    x = torch.randn(5, 3, requires_grad=True)
    total = Summed.apply(lambda rows, _: rows.square().sum(), 2, x, torch.zeros(5))
    (slope,) = torch.autograd.grad(total.square(), x, create_graph=True)
    assert torch.allclose(slope, 4 * total * x)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # and not half of it, without a word
        slope.sum().backward()


class Heads(torch.nn.Module):
    """Two biases whose gradients are one tensor, and one that is expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(50, 8))
        self.one, self.two, self.all = (torch.nn.Parameter(torch.zeros(n)) for n in (50, 50, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.one + self.two + self.all.sum()


@pytest.mark.parametrize("hooked", [False, True])
def test_every_gradient_of_the_head_is_that_of_one_chunk(hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = load_base("tiny")
    loss, head = SFTLoss(base.model), Heads()
    loss.head = head
    factor = torch.nn.Parameter(torch.ones(8))
    if hooked:
        head.register_forward_pre_hook(lambda _, args: (args[0] * factor,))
    monkeypatch.setattr(loss, "body", lambda **_: (hidden,))
    hidden = torch.randn(2, 301, 8, requires_grad=True)
    batch = {"input_ids": torch.zeros(2, 301), "labels": torch.randint(0, 50, (2, 301))}
    wanted = (hidden, *head.parameters(), *((factor,) if hooked else ()))
    found = []
    for values in (1 << 22, 64 * 50):
        monkeypatch.setattr("deltaw.infer.loss.CHUNK_VALUES", values)
        found.append(torch.autograd.grad(loss(batch)[0] / 600, wanted))
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-5)
    half, slope = hidden[0].detach().bfloat16().requires_grad_(), torch.randn(301, 8)
    total = Summed.apply(lambda rows, _: (rows.float() * slope).sum(), 301, half, torch.zeros(301))
    norm = torch.autograd.grad(total / 1234, half)[0].float().norm()
    assert float(norm) == pytest.approx(float(slope.norm()) / 1234, rel=5e-4)  # 1/1234 is not rounded to bf16


def test_interrupted_and_resumed_is_bit_identical(
    finished: training.Run, rows: Path, tmp_path: Path, monkeypatch
) -> None:
    class Ctrl_C(callbacks.CleanStop):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)
            super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(training, "CleanStop", Ctrl_C)
        with pytest.raises(TrainError, match="interrupted at step 3 of 8; continue with: deltaw train --resume"):
            deltaw.train(config(rows, tmp_path / "part"), quiet=True)
    run = RunDirectory(tmp_path / "part")
    assert run.steps() == [3] and not run.adapter.exists()
    assert signal.getsignal(signal.SIGINT) is not None
    resumed = deltaw.resume(tmp_path / "part", quiet=True)
    whole, part = (load_file(each.adapter / "adapter_model.safetensors") for each in (finished, resumed))
    assert whole.keys() == part.keys() and all(torch.equal(whole[k], part[k]) for k in whole)


def test_accumulated_equals_large_batch(rows: Path, tmp_path: Path) -> None:
    results = []
    for name, sizes in (("large", (8, 1)), ("accumulated", (2, 4))):
        given = config(rows, tmp_path / name, batch_size=sizes[0], gradient_accumulation=sizes[1], max_steps=3)
        given["adapter"]["dropout"] = 0.0
        run = deltaw.train(given, quiet=True)
        results.append([e["loss"] for e in RunDirectory(run.path).events("step")])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_bf16_base_keeps_fp32_masters(rows: Path, tmp_path: Path) -> None:
    run = deltaw.train(config(rows, tmp_path / "bf16", dtype="bf16", max_steps=3), quiet=True)
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert run.losses["held_out"] < run.losses["base"]


def test_faults_stop_before_anything_is_written(rows: Path, tmp_path: Path, finished: training.Run) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"')
    with pytest.raises(DataError, match="2"):
        deltaw.train(config(broken, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UseError, match="already holds a run"):
        deltaw.train(config(rows, finished.path))


def test_not_finite_loss_stops(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"lower train\.learning_rate"):
        deltaw.train(config(rows, tmp_path / "run", learning_rate=1e30, clip=0, warmup=0, eval_every=100), quiet=True)


def test_trainer_arguments_are_frozen(tmp_path: Path) -> None:
    from deltaw.config.schema import TrainConfig
    from deltaw.training.trainer import arguments

    resolved = arguments(tmp_path, TrainConfig(), steps=10, every=2, evaluates=True, device=torch.device("cpu"))
    frozen = {
        "max_steps": 10, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 2e-4,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0, "bf16": False, "fp16": False, "activation_checkpointing": False,
        "eval_steps": 2, "save_steps": 2, "logging_nan_inf_filter": False, "report_to": [], "disable_tqdm": True,
        "remove_unused_columns": False, "label_names": ["labels"], "torch_compile": False, "neftune_noise_alpha": None,
        "label_smoothing_factor": 0.0, "use_liger_kernel": False, "group_by_length": None, "push_to_hub": False,
    }  # fmt: skip
    there = {key: getattr(resolved, key) for key in frozen if hasattr(resolved, key)}
    assert there == {key: value for key, value in frozen.items() if key in there} and len(there) >= 22
