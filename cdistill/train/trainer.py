"""DistillTrainer: transformers.Trainer on a `DistillationModel`, with losses logged one by one and resumable stages."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from cdistill.data.samples import IGNORE_INDEX
from cdistill.errors import InputError
from cdistill.models.load import not_finite
from cdistill.runtime import checkpoints, pulse
from cdistill.runtime.agreement import RanksAgree
from cdistill.runtime.bad_samples import BadSamples
from cdistill.runtime.collectives import gathered
from cdistill.runtime.errors import NonFiniteError, ProcessError
from cdistill.runtime.finite import FiniteAdamW, FiniteSteps, poisoned
from cdistill.runtime.launch import launched
from cdistill.train.lora import merged_state
from cdistill.train.model import DistillationModel
from cdistill.train.recipes import LoRAConfig, StageConfig
from cdistill.train.rollout import Rollouts, rolled_out
from cdistill.train.rounding import rounded_state
from cdistill.train.run_log import TENSORBOARD

WEIGHTS = "model.pt"
PROGRESS = "progress_{}.pt"  # of one process: sums of losses not yet logged, and counters


class DistillTrainer(Trainer):
    """Trains the student inside a `DistillationModel`.

    Losses over labels are divided by the labels of the global batch, alignment by its samples, whatever the numbers of
    processes and of accumulation steps. Samples come in the order of the dataset. `FiniteSteps` says what happens to
    steps that are not finite, `checkpoints` how what is saved survives.
    """

    def __init__(
        self,
        model: DistillationModel,
        args: TrainingArguments,
        stage: StageConfig,
        *,
        lora: LoRAConfig | None = None,
        log_layers: bool = False,
        finite: FiniteSteps,
        bad: BadSamples,
        rollouts: Rollouts | None = None,
        train_dataset: Dataset,
        data_collator: Any,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=data_collator, callbacks=callbacks
        )
        self.remove_callback(PrinterCallback)
        self.stage, self.distillation, self.lora, self.log_layers = stage, model, lora, log_layers
        self.weights = {term.name: term.weight for term in model.terms} | {"idle": 1.0}
        # Both say that compute_loss has already divided by the whole global batch (the second since transformers 5.20).
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.finite, self.bad, self.rollouts = finite, bad, rollouts
        finite.watch(self)
        if stage.data.path is not None:  # the built-in task has no bad samples to tell each other of
            self.add_callback(bad)
        zero = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0
        self.add_callback(RanksAgree(model, finite.label, ordered=zero >= 2))
        self._logged_step = 0
        self.tokens: Any = 0  # of all processes since the last log, padding left out

    @property
    def sharers(self) -> int:
        """Processes that are given the same samples."""
        return 1 if self.distillation.shards is None else self.distillation.shards.size

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.sharers > 1:
            return _Repeated(len(dataset), self.args.per_device_train_batch_size, self.sharers)
        return SequentialSampler(dataset)

    def get_train_dataloader(self) -> DataLoader:
        """As of Trainer, but signals to the run's group of processes do not reach those that read samples."""
        loader = super().get_train_dataloader()
        inner: Any = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the trained parameters; matrices decay, vectors (biases, norms) do not. No group is empty."""
        if self.optimizer is None:
            trained = [p for p in self.distillation.parameters() if p.requires_grad]
            if self.stage.weight_decay:
                split = ([p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1])
                decays = (self.stage.weight_decay, 0.0)
                groups = [{"params": ps, "weight_decay": d} for ps, d in zip(split, decays, strict=True) if ps]
            else:
                groups = [{"params": trained, "weight_decay": 0.0}]
            unchecked = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 0
            adamw = FiniteAdamW if unchecked else torch.optim.AdamW
            self.optimizer = adamw(groups, lr=self.stage.learning_rate, betas=self.stage.betas, fused=True)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """The micro-batches of one step and the number of labels in it over all processes."""
        batches = [self.bad.take(batch) for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return batches, None
        if self.rollouts is not None:
            batches = rolled_out(self, self.rollouts, batches)
        # Position 0 predicts nothing and is never labelled; the patches of objective vision are all labelled.
        counts = [torch.stack([(batch["labels"] != IGNORE_INDEX).sum(), _tokens(batch)]) for batch in batches]
        count = torch.stack(counts).sum(0).to(device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count, "sum") // self.sharers
        self.tokens = self.tokens + count[1]
        return batches, count[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Weighted sum of the stage's losses; gradients are averaged over processes later, hence the factor."""
        assert num_items_in_batch is not None
        losses = model(**inputs)
        world, total = self.args.world_size, None
        counts: dict[str, Any] = {"label": num_items_in_batch, "sample": self.stage.global_batch_size}
        per = {name: term.per for term in self.distillation.terms for name in (term.name, *term.details)}
        for name, value in losses.items():
            mean: Tensor = value * (world / counts[per.get(name, "label")])
            if name in self.weights:
                total = mean * self.weights[name] if total is None else total + mean * self.weights[name]
            if name in per:
                self.finite.add(name, mean)
        assert total is not None
        self.finite.add("loss", total)
        total = poisoned(total)
        return (total, losses) if return_outputs else total

    def tell(self, values: dict[str, float]) -> None:
        """Hand what was measured, by names, to trackers (`cdistill.train.run_log.RunLog` has its own); on the first process."""
        due = self.control.should_log  # which transformers takes back where something is logged
        self.callback_handler.on_log(self.args, self.state, self.control, values)
        self.control.should_log = due

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of the losses since the last logging step, without skipped steps, and the skipped steps so far.

        A vector's values are logged one by one, as ``vat_layers/0``. Trainer's summary at the end is left out.
        """
        if "loss" not in logs:
            return
        steps = self.state.global_step - self._logged_step
        self._logged_step = self.state.global_step
        tokens, self.tokens = int(self.tokens), 0
        means: dict[str, Any] = self.finite.means(steps)
        numbers = {name: value for name, value in means.items() if not isinstance(value, list)}
        for term in self.distillation.terms:
            if term.teachers and isinstance(of := means.get(term.of_teachers), list):
                numbers |= {f"{term.name}/{name}": each for name, each in zip(term.teachers, of, strict=True)}
        numbers |= {} if self.rollouts is None else self.rollouts.lengths()
        if self.log_layers:
            told = {term.of_teachers for term in self.distillation.terms if term.teachers}
            vectors = {name: value for name, value in means.items() if isinstance(value, list) and name not in told}
            numbers |= {f"{name}/{i}": each for name, value in vectors.items() for i, each in enumerate(value)}
        super().log({**logs, **numbers, "tokens": tokens, "skipped": self.finite.skipped}, start_time)

    def save_student(self, folder: Path) -> None:
        """Write the student by ``save_pretrained`` (safetensors), LoRA merged. Every process must call it."""
        self.save_model(str(folder))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        assert output_dir is not None
        prefix = "student."
        whole = self.distillation.state_dict() if state_dict is None else state_dict
        student = {name.removeprefix(prefix): t for name, t in whole.items() if name.startswith(prefix)}
        if self.lora is not None:
            student = merged_state(student, self.lora)
        student = rounded_state(self.distillation.student, student)
        self.distillation.student.save_pretrained(output_dir, state_dict=student)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student to a folder; Trainer's own call for a checkpoint is left out, which holds it anyway."""
        if not _internal_call:
            super().save_model(output_dir)

    def bytes_to_save(self, *, optimizer: bool) -> int:
        """About how many bytes the model takes on a disk, with the ``optimizer`` state or without."""
        parameters = [*self.distillation.parameters()]
        size = {p: getattr(p, "ds_numel", p.numel()) for p in parameters}  # ZeRO-3 keeps shards
        state = 12 if self.is_deepspeed_enabled else 8  # two moments in fp32, for DeepSpeed the weights in fp32
        trained = sum(size[p] for p in parameters if p.requires_grad)
        return sum(size[p] * p.element_size() for p in parameters) + optimizer * state * trained

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        parent, rank = Path(str(self.args.output_dir)), self.args.process_index
        folder = parent / f"{checkpoints.PREFIX}{self.state.global_step}"
        progress = {**self.finite.state_dict(), "bad": self.bad.state_dict(), "logged_step": self._logged_step}
        if self.rollouts is not None:
            progress["rollouts"] = self.rollouts.state_dict()
        with checkpoints.saving(folder, self.bytes_to_save(optimizer=True)), pulse.paused():
            if self.args.should_save:
                checkpoints.remove(folder)
                folder.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.args.should_save and not self.is_deepspeed_enabled:
                torch.save(self.distillation.state_dict(), folder / WEIGHTS)
            torch.save(progress, folder / PROGRESS.format(rank))
            checkpoints.seal(folder, step=self.state.global_step, processes=self.args.world_size)
        if self.args.should_save:
            checkpoints.rotate(parent)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = torch.load(Path(resume_from_checkpoint) / WEIGHTS, map_location="cpu", weights_only=True)
        self.distillation.load_state_dict(state)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train, from a checkpoint of `checkpoints.choose` if one is given."""
        if resume_from_checkpoint is not None:
            path = Path(resume_from_checkpoint) / PROGRESS.format(self.args.process_index)
            progress = torch.load(path, map_location="cpu", weights_only=True)
            self._logged_step = progress["logged_step"]
            self.finite.load_state_dict(progress)
            self.bad.load_state_dict(progress["bad"])
            if self.rollouts is not None:
                self.rollouts.load_state_dict(progress["rollouts"])
        with in_one_line():  # a signal reports the death of a process that reads samples, at any time
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def refuse_broken_result(self, name: str) -> None:
        """Raise NonFiniteError for a student that the stage ``name`` has left without a use, rather than publish it."""
        done, skipped = self.state.global_step, self.finite.skipped
        advice = f"lower stage.{name}.learning_rate, or look at the teacher and the data"
        if 2 * skipped > done:
            raise NonFiniteError(
                f"{self.finite.label}: {skipped:,} of {done:,} steps were skipped (not finite), so little was learned: {advice}"
            )
        broken = not_finite(self.distillation.student)
        if any(gathered(int(broken is not None))):
            raise NonFiniteError(
                f"{self.finite.label}: {broken or 'a weight'} is not finite after step {done:,}, and nothing is saved: {advice}"
            )

    def destroy_engine(self) -> None:
        """Remove DeepSpeed's hooks from the model, if it has trained under DeepSpeed; it cannot be trained or saved then."""
        wrapper = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if wrapper is not None:
            wrapper.engine.destroy()


class _Repeated(Sampler[int]):
    """Samples in order, every micro-batch as often as processes share it: these are neighbours, and take one each."""

    def __init__(self, samples: int, batch: int, times: int) -> None:
        self.samples, self.batch, self.times = samples, batch, times

    def __len__(self) -> int:
        return self.samples * self.times

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.samples, self.batch):
            for _ in range(self.times):
                yield from range(start, min(start + self.batch, self.samples))


def _tokens(batch: dict[str, Tensor]) -> Tensor:
    """Tokens of a micro-batch, padding left out; of patches, all."""
    if "attention_mask" in batch:
        return (batch["attention_mask"] != 0).sum()
    return torch.tensor(batch["labels"].numel(), device=batch["labels"].device)


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    """Start a process that reads samples, in a group of its own: a SIGTERM of the run's would end it at once."""
    os.setpgrp()
    if start is not None:
        start(worker)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Errors of the processes that read samples, without the traceback that torch puts into their messages."""
    try:
        yield
    except ValueError as error:
        name = f"\n{InputError.__module__}.{InputError.__qualname__}: "
        _, found, message = str(error).replace("\nValueError: ", name).rpartition(name)
        if not found:
            raise
        raise InputError(message.strip()) from None
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise ProcessError(f"a process that reads samples has died: {str(error).splitlines()[0]}") from None


def training_arguments(
    output: Path,
    stage: StageConfig,
    *,
    micro_batch_size: int,
    accumulation: int,
    precision: str,
    deepspeed: dict[str, Any] | None,
    logging_steps: int,
    save_steps: int,
    seed: int,
    workers: int,
    on_cpu: bool,
    name: str | None = None,
    trackers: Sequence[str] = (),
) -> TrainingArguments:
    """What Trainer needs to know of a stage; everything it would print or report is switched off, but named ``trackers``."""
    warmup = -int(-stage.warmup_ratio * stage.steps // 1)
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=stage.steps,
        num_train_epochs=1,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=warmup,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        deepspeed=deepspeed,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and launched() else None,
        ddp_find_unused_parameters=False,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        seed=seed,
        report_to=[tracker for tracker in trackers if tracker != TENSORBOARD] or "none",
        run_name=name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        dataloader_drop_last=True,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=4 if workers else None,
        label_names=["labels"],
    )
    assert args.device is not None  # reading it sets up the devices
    args._n_gpu = min(args.n_gpu, 1)  # one GPU per process; Trainer would wrap the model in DataParallel otherwise
    return args
