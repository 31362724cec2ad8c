"""transformers' Trainer with our loss, our checkpoints and our evaluation: we own the adapter, not the loop.

Overridden, and why:
    compute_loss            cross-entropy on supervised positions only, normalised over the whole accumulation; and the
                            terms that methods add (`Method.penalty`)
    evaluate                token-weighted held-out loss; never more than one chunk of logits in memory
    _save_checkpoint        adapter only; written whole or not at all; own names and rotation; no pickled arguments
    _load_from_checkpoint   back into the same tensors, which the optimizer holds
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments, get_scheduler
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from deltaw.config.schema import TrainConfig
from deltaw.core.attach import adapters, extract, kinds
from deltaw.core.base import identify
from deltaw.core.errors import BaseMismatchError, TrainError
from deltaw.core.files import whole_folder
from deltaw.data.store import lengths
from deltaw.formats import directory
from deltaw.infer.loss import SFTLoss, mean_loss
from deltaw.runs.directory import RunDirectory

NAME = "default"  # of the adapter in training, inside the model
MEMORY = "memory.safetensors"
"""In a checkpoint, where a method remembers something from step to step (`Adapter.memory`)."""


class _Grouped(LengthGroupedSampler):
    """Rows of like lengths together, in an order that depends on seed and epoch only: a resumed run sees the same."""

    def __init__(self, batch: int, lengths: list[int], seed: int):
        super().__init__(batch, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        self.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return super().__iter__()


class AdapterTrainer(Trainer):
    def __init__(
        self,
        model: nn.Module,
        run: RunDirectory,
        config: TrainConfig,
        steps: int,
        every: int,
        rows: list[Any],
        held_out: list[Any],
        collate: Callable[[list[Any]], dict[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        callbacks: Iterable[Any],
        score: Callable[[], Mapping[str, float]] | None = None,
        beside: Mapping[str, str] | None = None,
    ):
        """beside: further text files of the adapter, for a run that is resumed."""
        self.run, self.config, self.held_out, self.sft = run, config, held_out, SFTLoss(model)
        self.every, self.score, self.beside = every, score, beside or {}
        self.last_eval: tuple[int, float] | None = None
        self.features = False  # has a batch held more than text (images)?
        self.kinds = kinds(model, NAME, trained=True)
        scheduler = get_scheduler(
            "constant_with_warmup" if config.schedule == "constant" else config.schedule,
            optimizer,
            num_warmup_steps=int(config.warmup * steps),
            num_training_steps=steps,
        )
        one = arguments(run.path, config, steps, every, bool(held_out), next(model.parameters()).device)
        one._n_gpu = min(1, one.n_gpu)  # several cards in one process would be DataParallel, which our loss bypasses
        with _admitted(model):
            super().__init__(
                model=model,
                args=one,
                train_dataset=rows,
                eval_dataset=held_out or None,
                data_collator=collate,
                optimizers=(optimizer, scheduler),
                callbacks=list(callbacks),
            )
        rounded = [path for path, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if rounded:
            raise TrainError(f"the trainer made {rounded[0]} and {len(rounded) - 1} more coarser than fp32")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.logging_dir = str(run.path / "tensorboard")  # else the first evaluation writes beside the run
        self.remove_callback(PrinterCallback)  # it writes to stdout, which belongs to results
        self.model_accepts_loss_kwargs = True  # our loss is normalised by the tokens of the whole accumulation

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        self.features = self.features or any(tensor.is_floating_point() for tensor in inputs.values())
        total, count = self.sft(inputs)
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        for method, there in self.kinds:
            penalty = method.penalty(there)
            if penalty is not None:  # once a step, whatever the accumulation
                loss = loss + penalty.to(loss.device) / self.current_gradient_accumulation_steps
        if torch.is_grad_enabled() and not loss.requires_grad:  # text alone runs no tower: it has nothing to teach it
            return loss.detach().requires_grad_()
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.config.group_by_length:
            return super()._get_train_sampler(train_dataset)
        size = self.config.batch_size * self.config.gradient_accumulation
        return _Grouped(size, lengths(self.train_dataset), self.config.seed)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        size = self.config.batch_size
        batches = (self.data_collator(self.held_out[i : i + size]) for i in range(0, len(self.held_out), size))
        metrics = {"eval_loss": mean_loss(self.sft, batches)}
        self.log(metrics)
        if self.score is not None:
            self.run.log("scores", step=self.state.global_step, **self.score())
        self.last_eval = (self.state.global_step, metrics["eval_loss"])
        if self.state.global_step > 0:
            self._compare(metrics["eval_loss"])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _compare(self, loss: float) -> None:
        """Keep the adapter of the best evaluation so far; stop after too many that are no better."""
        state, config = self.state, self.config
        if not all(method.settled(state.global_step, state.max_steps) for method, _ in self.kinds):
            return
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, state.best_global_step = loss, state.global_step
            if config.best:
                directory.write(extract(self.model, NAME), self.run.best, finished=False)
        elif (
            config.early_stopping
            and not self.control.should_training_stop
            and state.global_step - (state.best_global_step or 0) >= config.early_stopping * self.every
        ):
            self.run.log("stopped", step=state.global_step, best=state.best_global_step, loss=state.best_metric)
            self.control.should_training_stop = True

    def finish(self) -> float | None:
        """Held-out loss of the finished adapter, which is that of the best evaluation where the configuration asks for it."""
        if not self.held_out:
            return None
        step = self.state.global_step
        self.control.should_training_stop = True
        if self.last_eval is None or self.last_eval[0] != step:
            self.evaluate()
        assert self.last_eval is not None
        if not self.config.best or self.state.best_global_step in (None, step):
            return self.last_eval[1]
        self._put(self.run.best)
        return self.state.best_metric

    def take(self, checkpoint: Path) -> None:
        """The state of a run that had come to its end, without another step."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))

    def _put(self, folder: Path) -> None:
        state, _ = directory.read(folder)
        there = adapters(self.model, NAME)
        if there.keys() != state.methods.keys():
            raise TrainError(
                f"{folder} holds another adapter than this configuration builds: resume with the run's own config.yaml"
            )
        difference = state.base.difference(identify(self.model)) if state.base is not None else None
        if difference:
            raise BaseMismatchError(f"the base is not the one this run began with: {difference}")
        for site, adapter in there.items():
            adapter.load_state_dict(dict(state.tensors[site]))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        with whole_folder(self.run.checkpoint(step)) as folder:
            directory.write(extract(self.model, NAME), folder / "adapter", beside=self.beside, finished=False)
            memory = self._memory()
            if memory:
                save_file({key: buffer.contiguous().cpu() for key, buffer in memory.items()}, folder / MEMORY)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self.run.rotate(self.config.keep)
        self.run.log("checkpoint", step=step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._put(Path(resume_from_checkpoint) / "adapter")
        memory, file = self._memory(), Path(resume_from_checkpoint) / MEMORY
        kept = load_file(file) if file.is_file() else {}
        if kept.keys() != memory.keys():
            raise TrainError(
                f"{file} does not hold what {', '.join(m.name for m, _ in self.kinds)} had learnt: start anew"
            )
        for key, buffer in memory.items():
            buffer.copy_(kept[key])

    def _memory(self) -> dict[str, Tensor]:
        """What the methods remember from step to step, by site and name."""
        there = adapters(self.model, NAME)
        return {f"{s.path}:{s.slot}:{name}": buffer for s, a in there.items() for name, buffer in a.memory().items()}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        raise AssertionError("the model is saved as an adapter, by _save_checkpoint")


@contextlib.contextmanager
def _admitted(model: nn.Module) -> Iterator[None]:
    """The Trainer takes a quantised model only with PEFT's mark on it. Left there, it would break `save_pretrained`."""
    mark = "_hf_peft_config_loaded"
    if not getattr(model, "is_quantized", False):
        yield
        return
    before = model.__dict__.get(mark)
    model.__dict__[mark] = True
    try:
        yield
    finally:
        del model.__dict__[mark]
        if before is not None:
            model.__dict__[mark] = before


def arguments(
    output: Path, config: TrainConfig, steps: int, every: int, evaluates: bool, device: torch.device
) -> TrainingArguments:
    """Every argument whose default could change what a run does, set explicitly; a test freezes the result."""
    save = every if config.save_every == "auto" else config.save_every
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.clip,
        seed=config.seed,
        data_seed=config.seed,
        bf16=False,  # the base is loaded in its dtype and the adapter casts itself: no autocast
        fp16=False,
        activation_checkpointing=config.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.checkpointing else None,
        neftune_noise_alpha=config.neftune,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=save,
        save_total_limit=None,
        load_best_model_at_end=False,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN must be seen
        report_to=list(config.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_drop_last=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        average_tokens_across_devices=True,
        use_cpu=device.type == "cpu",
        push_to_hub=False,
    )
