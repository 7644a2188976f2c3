"""`cdistill.CompoDistillTrainer`: the losses of CompoDistill in transformers' Trainer, in the habits of TRL's trainers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoModelForImageTextToText, PreTrainedModel, Trainer, TrainerCallback

from cdistill.choices import KDConfig, VATConfig
from cdistill.data.pairs import PREFIX, RELATION
from cdistill.data.samples import IGNORE_INDEX
from cdistill.data.templates import Template
from cdistill.errors import InputError
from cdistill.models.processor import add_stop_tokens, save_chat_template
from cdistill.train.compodistill_config import COMPILED, CompoDistillConfig, made
from cdistill.train.conversation_collator import ConversationCollator
from cdistill.train.distillation import distill
from cdistill.train.reply_server import SERVED, ReplyServer
from cdistill.train.resampling import pair_encoder
from cdistill.train.rollout import COUNTS, CountingCollator, Rollouts, rolled_out
from cdistill.train.terms import Term
from cdistill.train.terms.alignment import Alignment

SERVER_SECONDS = 300.0  # that a server of replies is waited for

__all__ = ["CompoDistillConfig", "CompoDistillTrainer", "ConversationCollator"]


class CompoDistillTrainer(Trainer):
    """Distils a teacher into a student by transformers' Trainer (paper section 4):

        trainer = CompoDistillTrainer(model=student, teacher_model=teacher, args=CompoDistillConfig("out"),
                                      train_dataset=dataset, processing_class=processor)
        trainer.train()

    The student is the trainer's model: what is wrapped, evaluated, saved and pushed. The teacher is frozen, follows the
    batches to their device and is in no checkpoint. ``ar`` and ``kd`` are means over the labels of the global batch (all
    processes, all accumulated batches), ``vat`` over its samples; each is logged beside ``loss``, and evaluation gives
    ``eval_loss``, ``eval_ar``, ``eval_kd`` and ``eval_vat``, means over the whole set. One process, DistributedDataParallel,
    FSDP 2 and DeepSpeed's ZeRO give the same gradients.

    Args:
        model: the student, or a name for ``AutoModelForImageTextToText.from_pretrained``; it may be a peft model.
        teacher_model: the teacher, or its name; or several by names of your own, where batches have ``kind_weights``
            (`cdistill.distill`).
        args: by default `CompoDistillConfig` with ``output_dir`` "compodistill".
        data_collator: makes what `Distillation.forward` takes, labels included; by default, with ``processing_class``, a
            `ConversationCollator`.
        processing_class: the student's processor, saved beside it, with ``args.template`` as its chat template. What ends
            answers there ends generation of the student, too.
        peft_config: of the adapters that the student is to get, by ``peft.get_peft_model``.
        vat: a `cdistill.vat.VAT` in place of ``args.vat``, for adaptive matching.
        terms: further terms of the loss, as for `cdistill.distill`; each is logged and evaluated under its name.
        teacher_processing_class: the teacher's processor, where it sees images through other visual tokens than the student
            (``args.vat`` with visual resample).
        options: Trainer's own: train_dataset, eval_dataset, compute_metrics, callbacks, optimizers,
            preprocess_logits_for_metrics, ...

    Raises:
        ValueError: models that cannot be distilled (`cdistill.distill`), or ways to train that cannot work: several GPUs in one
            process, FSDP 1, tensor, context or sequence parallelism, a loss function of one's own, uneven batches or the
            evaluation of a stream on several processes.
    """

    _tag_names = ["cdistill", "compodistill"]  # noqa: RUF012 (as in TRL)

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        teacher_model: PreTrainedModel | nn.Module | str | Mapping[str, Any],
        args: CompoDistillConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | Any | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | Any | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        vat: Any = None,
        terms: Sequence[Term | str] = (),
        teacher_processing_class: Any = None,
        **options: Any,
    ) -> None:
        args = CompoDistillConfig("compodistill") if args is None else args
        _check_arguments(args, options)
        student = _with_adapters(_loaded(model, args.model_init_kwargs), peft_config)
        self.distillation = distill(
            _loaded_teachers(teacher_model, args.teacher_model_init_kwargs),
            student,
            vat=made(VATConfig, "vat", args.vat) if vat is None else vat,
            kd=made(KDConfig, "kd", args.kd),
            vat_weight=args.vat_weight,
            terms=terms,
            train_vision=args.train_vision,
        )
        if data_collator is None:
            data_collator = self._collator(processing_class, teacher_processing_class, args)
        self.rollouts: Rollouts | None = None
        if args.on_policy:
            data_collator = self._generating(args, data_collator, processing_class)
        self._template: Template | None = None
        if isinstance(data_collator, ConversationCollator):  # what is learned is what the saved student generates
            self._template = data_collator.encoder.template
            add_stop_tokens(self.distillation.losses.student, data_collator.encoder.contract.end_ids)
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **options,
        )
        self._refuse_ways()
        self._refuse_streams(eval_dataset)
        # compute_loss divides by the global batch (the second says so since transformers 5.20)
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.label_names = ["labels"]
        self._samples: Tensor | None = None  # of the global batch, beside Trainer's num_items_in_batch
        self._train_terms: dict[str, Tensor] = {}
        self._eval_terms: dict[str, Tensor] = {}
        self._logged_step = 0
        if hasattr(student, "add_model_tags"):
            student.add_model_tags(self._tag_names)

    def _collator(self, ours: Any, theirs: Any, args: CompoDistillConfig) -> ConversationCollator:
        """Makes batches of conversations, with the teacher's own encoding where it needs one."""
        if ours is None:
            raise InputError("data_collator or processing_class must be given, to make batches of the rows")
        losses = self.distillation.losses
        if losses.reads_apart is (theirs is None):
            wanted, others = ("be given", "other") if theirs is None else ("be None", "the same")
            raise InputError(
                f"teacher_processing_class must {wanted}: student and teacher see images through {others} visual tokens"
            )
        if theirs is None:
            return ConversationCollator(ours, args.template, args.max_length)
        aligned = next((term.vat.config for term in losses.terms if isinstance(term, Alignment)), None)
        pair = partial(pair_encoder, configs=(losses.student.config, self.teacher_model.config), vat=aligned)
        return ConversationCollator(ours, args.template, args.max_length, teacher_processor=theirs, pair=pair)

    def _generating(self, args: CompoDistillConfig, collator: Any, processor: Any) -> Any:
        """Make ready what lets the student answer, and have the collator say whose images are whose."""
        if self.distillation.losses.reads_apart:
            raise InputError(
                "on_policy must be 0 for teacher and student with other visual tokens: replies are encoded once"
            )
        if isinstance(collator, ConversationCollator):
            encoder, collator = collator.encoder, copy.copy(collator)
            collator.collate = CountingCollator(collator.collate)
            processor, tokenizer = encoder.processor, encoder.tokenizer
            stops, length = encoder.contract.end_ids, encoder.max_length
            if not stops:
                raise InputError(f"template must end answers by a token with on_policy, and {args.template} does not")
        elif processor is None:
            raise InputError(
                "processing_class must be given with on_policy, whose tokenizer says what the student may write"
            )
        else:
            tokenizer, stops, length = getattr(processor, "tokenizer", processor), (), args.max_length
        student, config, server = self.distillation.losses.student, args.generation, None
        if config.vllm_server is not None:
            folder = Path(args.output_dir or ".") / SERVED
            server = ReplyServer(config.vllm_server, folder, processor, seconds=SERVER_SECONDS, key="vllm_server")
        self.rollouts = Rollouts(
            student,
            tokenizer,
            config,
            seed=args.seed,
            stops=stops,
            max_length=length,
            key="processing_class",
            server=server,
        )
        return collator

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As of Trainer; a share of the samples ends with replies of the student, before their labels are counted."""
        if self.rollouts is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return super().get_batch_samples(iter(rolled_out(self, self.rollouts, batches)), num_batches, device)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != COUNTS})

    def _refuse_ways(self) -> None:
        if self.accelerator.state.dynamo_plugin.backend.value != "NO":  # of accelerate launch
            raise InputError(COMPILED)
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise InputError(
                "FSDP 1 flattens the weights that the losses read: set fsdp_config's version (accelerate's fsdp_version) to 2"
            )
        batches: Any = self.args.accelerator_config
        if self.args.world_size > 1 and not batches.even_batches:
            raise InputError(
                "accelerator_config: even_batches must be True: a process that has no batch left lets the others wait forever"
            )
        sizes = {"tensor": self.get_tp_size(), "context": self.get_cp_size(), "sequence": self.get_sp_size()}
        for kind, size in sizes.items():
            if size > 1:
                raise InputError(f"{kind} parallelism of {size} is not supported: use FSDP 2 or DeepSpeed")

    def _refuse_streams(self, data: Any) -> None:
        """Of a stream nobody knows which samples the processes get twice, so that all have whole batches at the end."""
        sets = data.values() if isinstance(data, dict) else [data]
        if self.args.world_size > 1 and any(isinstance(one, IterableDataset) for one in sets):
            raise InputError(
                "eval_dataset must not be a stream on several processes, which would take samples of its end twice: load it "
                "whole (streaming=False), or evaluate in one process"
            )

    @property
    def teacher_model(self) -> Any:
        """The teacher."""
        teacher = self.distillation.losses.teacher
        return None if teacher is None else teacher.model

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Labels of the batches and, kept for `compute_loss`, their samples, over all processes that average them."""
        if not batch_samples or batch_samples[0].get("labels") is None:
            return None
        counts = [torch.stack(self.distillation.count(batch)) for batch in batch_samples]
        total = torch.stack(counts).sum(0).to(device)
        if self._over_processes:
            total = self.accelerator.reduce(total, "sum")
        self._samples = total[1]
        return total[0]

    @property
    def _over_processes(self) -> bool:
        return self.args.world_size > 1 and self.args.average_tokens_across_devices

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the losses of a batch, by a call of whatever has been wrapped around the student."""
        counted = num_items_in_batch is not None
        losses = self.distillation.compute_losses(
            model, inputs, tokens=num_items_in_batch, samples=self._samples if counted else None
        )
        if counted and self._over_processes:  # which average gradients
            losses = {name: value * self.args.world_size for name, value in losses.items()}
        if model.training:
            for term in self.distillation.losses.terms:
                _add(self._train_terms, term.name, losses[term.name])
                for i, name in enumerate(term.teachers):
                    _add(self._train_terms, f"{term.name}/{name}", losses[term.of_teachers][i])
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and beside a training loss the mean of each of its terms since the last time."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._logged_step)
            self._logged_step = self.state.global_step
            terms, self._train_terms = self._train_terms, {}
            for name, value in terms.items():
                logs[name] = self.accelerator.reduce(value / steps, "mean").item()
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Losses of a batch and, where metrics ask for them, the student's logits."""
        inputs = self._prepare_inputs(inputs)
        labels, loss = inputs.get("labels"), None
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels is not None:
                once = self._without_repeated(inputs)
                loss, losses = self.compute_loss(model, once, return_outputs=True)
                tokens, samples = self.distillation.count(once)
                counts = {"label": tokens, "sample": samples}
                for term in self.distillation.losses.terms:
                    value, count = losses[term.name], counts[term.per]
                    _add(self._eval_terms, term.name, torch.stack((value * count, count)))
            if prediction_loss_only:
                return loss, None, None
            own = self.distillation.losses.own_inputs | {"labels"}
            others = (PREFIX, RELATION) if self.distillation.losses.reads_apart else ()
            ours = {name: value for name, value in inputs.items() if name not in own and not name.startswith(others)}
            logits = model(**ours).logits
        return loss, logits.detach(), labels

    def _without_repeated(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch in which samples do not count that accelerate takes twice, to give all processes whole batches at the end.

        Rows that a collator has packed do.
        """
        state, labels = self.accelerator.gradient_state, inputs["labels"]
        world = self.args.world_size
        if world == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        if len(labels) * world != state.active_dataloader.total_batch_size:
            return inputs
        places = torch.arange(len(labels), device=labels.device) + self.args.process_index * len(labels)
        counted = places < state.remainder
        labelled = [name for name in ("labels", f"{PREFIX}labels") if name in inputs]
        masked = {name: inputs[name].masked_fill(~counted[:, None], IGNORE_INDEX) for name in labelled}
        return inputs | masked | {"counted": counted}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As of Trainer; loss and terms are means over all labels and samples of the set, and not of its batches."""
        self._eval_terms = {}
        loader: Any = args[0] if args else kwargs["dataloader"]
        self._refuse_streams(loader.dataset)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        terms = {}
        for name, value in self._eval_terms.items():
            total, count = self.accelerator.reduce(value, "sum").tolist()
            terms[name] = total / max(count, 1)
        if terms:
            loss = sum(self.distillation.weights[name] * value for name, value in terms.items())
            metrics: Any = output.metrics
            metrics.update({f"{prefix}_{name}": value for name, value in {"loss": loss, **terms}.items()})
        return output

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self._template is not None and self._template.replaces_own and self.processing_class is not None:
            save_chat_template(
                Path(str(self.args.output_dir if output_dir is None else output_dir)), self._template.source
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._holds_weights_whole:
            self._load_weights(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._holds_weights_whole:
            self._load_weights(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    @property
    def _holds_weights_whole(self) -> bool:
        """Whether checkpoints hold the student as ``save_pretrained`` writes it, and not adapters, nor parts of an engine."""
        adapted = hasattr(self.distillation.student, "peft_config")
        return not (adapted or self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _load_weights(self, folder: str) -> None:
        """Read weights as ``from_pretrained`` does: files name them otherwise than many models do (LLaVA), and Trainer, which
        compares the names, would go on with the weights that are there."""
        student = self.distillation.losses.student
        dtypes = [value.dtype for value in student.state_dict().values() if value.is_floating_point()]
        options = {"dtype": reduce(torch.promote_types, dtypes), "local_files_only": True}
        saved, info = type(student).from_pretrained(folder, output_loading_info=True, **options)
        state = {name: value for name, value in saved.state_dict().items() if name not in info["missing_keys"]}
        for name, value in student.state_dict().items():
            if name not in state or state[name].shape != value.shape:
                raise InputError(
                    f"the checkpoint {folder} is of another student: it has no {name} {tuple(value.shape)}"
                )
        student.load_state_dict(state)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does."""
        self._train_terms = {}
        try:
            return super().train(*args, **kwargs)
        finally:
            self._logged_step = 0

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._init_training_state(*args, **kwargs)
        self._logged_step = self.state.global_step  # where a resumed run goes on
        return result


def _check_arguments(args: Any, options: dict[str, Any]) -> None:
    if not isinstance(args, CompoDistillConfig):
        raise InputError(f"args must be a CompoDistillConfig, got {type(args).__name__}")
    if options.get("compute_loss_func") is not None:
        raise InputError("compute_loss_func must be None: the losses are CompoDistill's (args.kd, args.vat)")
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} GPUs, and torch.nn.DataParallel cannot split a teacher: start one process for "
            "each (torchrun, accelerate launch), or let this one see a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )


def _with_adapters(student: Any, config: Any) -> Any:
    """The student, as a peft model if there is a configuration of its adapters."""
    if config is None:
        return student
    if hasattr(student, "peft_config"):
        raise InputError("peft_config must be None: the model is a peft model already")
    from peft import get_peft_model

    return get_peft_model(student, config)


def _loaded(model: Any, options: Any) -> Any:
    if isinstance(model, str):
        return AutoModelForImageTextToText.from_pretrained(model, **(options or {}))
    if options:
        raise InputError("model_init_kwargs and teacher_model_init_kwargs are for models given by name")
    return model


def _loaded_teachers(given: Any, options: Any) -> Any:
    """One, or several by name."""
    if not isinstance(given, Mapping):
        return _loaded(given, options)
    return {name: _loaded(model, options if isinstance(model, str) else None) for name, model in given.items()}


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach()
    sums[name] = sums[name] + value if name in sums else value
