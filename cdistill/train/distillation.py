"""`cdistill.distill`: the losses of CompoDistill for people with their own trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cdistill.choices import KDConfig
from cdistill.data.samples import IGNORE_INDEX
from cdistill.errors import InputError
from cdistill.models.load import Model
from cdistill.models.pair import (
    CommonEncoder,
    check_apart,
    check_configurations,
    check_frozen,
    check_pair,
    common_parameters,
    unwrapped,
    visual_difference,
)
from cdistill.models.parts import parameters_of, require_known_parts
from cdistill.train.callers import Window, WrapperCheck, folder_of_trainer, items_of_trainer, window_of_trainer
from cdistill.train.inside import instead_of_forward, make_replaceable
from cdistill.train.left_out import refuse_left_out
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.recipes.teachers import NAME
from cdistill.train.several import alignments, held, settings_of
from cdistill.train.terms import Settings, Term, configured
from cdistill.train.terms.alignment import Alignment
from cdistill.vat import VAT, VATConfig


class Distillation(nn.Module):
    """Two models as one module from a batch to its losses; made by `cdistill.distill`.

    It stands in the student's place, for an optimizer, an accelerator, an engine or transformers' Trainer: parameters,
    modules and ``state_dict`` are the student's alone, under the student's names, and what is not defined here
    (``config``, ``save_pretrained``, ``generate``, ``gradient_checkpointing_enable``, ...) is the student's, too.
    The student is ``distillation.student``, the teacher in none of the lists.
    """

    accepts_loss_kwargs = True  # transformers' Trainer: losses are divided by num_items_in_batch
    loss_type = "ForCausalLM"  # and labels are shifted here

    def __init__(
        self,
        losses: DistillationModel,
        student: Model,
        *,
        common: Mapping[str, nn.Parameter],
        shares_images: Sequence[Callable[[], bool]],
    ) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[name] = student.__dict__[name]  # the same objects: what is replaced there is replaced here
        self.training = student.training
        self._sharing = (common, shares_images)
        # a tuple, because nn.Module would list them, and it has the student's modules already
        self._losses_and_student = (losses, student)
        for module in {id(m): m for m in (student, losses.student)}.values():
            make_replaceable(module)
        self._wrapper_check = WrapperCheck(student)
        self._window: Window | None = None
        self._has_run = False

    @property
    def student(self) -> Model:
        """The trained model, as it was given."""
        return self._losses_and_student[1]

    @property
    def losses(self) -> DistillationModel:
        """What computes the losses, as sums."""
        return self._losses_and_student[0]

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.student.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the student."""
        return self.student.dtype

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_losses_and_student" not in self.__dict__:
                raise
            return getattr(self.student, name)

    def train(self, mode: bool = True) -> Distillation:
        """Put the student into training mode; the teacher stays in eval mode."""
        super().train(mode)
        self.student.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of the student. While transformers' Trainer saves it, tied weights have one name and the configuration lies beside
        it, as where the student is the trainer's model."""
        state = super().state_dict(*args, **kwargs)
        folder = None if kwargs.get("prefix") else folder_of_trainer()
        if folder is not None:
            self.student.save_pretrained(folder, **({} if hasattr(self.student, "peft_config") else {"state_dict": {}}))
            once = dict(self.student.named_parameters())
            for name, _ in self.student.named_parameters(remove_duplicate=False):
                if name not in once:
                    state.pop(name, None)
        return state

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the student as its own ``save_pretrained`` does."""
        self.student.save_pretrained(save_directory, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._has_run = False
        result = super().__call__(*args, **kwargs)
        if not self._has_run:
            raise InputError(
                "the forward pass of what distill() returned has been replaced by one whose loss has no teacher (as TRL's "
                "trainers do): use cdistill.CompoDistillTrainer, or give the trainer the student and call "
                "distill()'s result in its compute_loss"
            )
        return result

    def forward(
        self,
        batch: Mapping[str, Tensor] | None = None,
        *,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_samples_in_batch: Tensor | int | None = None,
        **inputs: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of a batch, given as a mapping or as keywords.

        Args:
            batch: what the models' processor made, for both models: ``input_ids`` and ``attention_mask`` (B, T), padded on
                either side, pixel values and whatever else the family takes; and ``labels`` (B, T), not shifted, -100 outside
                the answers. Samples packed into rows come without ``attention_mask`` but with the ``position_ids`` that tell
                them apart (`cdistill.vat.packed_regions`), and with labels -100 at their first tokens. Where teacher and
                student see images by different visual tokens, the teacher's own encoding of the same samples is there, too:
                ``teacher_input_ids``, ``teacher_labels``, ``teacher_attention_mask``, ``teacher_pixel_values`` and so on.
            num_items_in_batch: labels (from each row's second token on) of the whole batch where this is a part of it, as
                with accumulated gradients: ``ar`` and ``kd`` are divided by it. By default the labels given or, in a
                ``transformers.Trainer`` that has counted them, its number.
            num_samples_in_batch: samples of the whole batch, by which ``vat`` is divided. By default those given or, in a
                ``transformers.Trainer``, those of the batches whose gradients it accumulates.

        Returns:
            fp32 scalars ``loss`` = ar + kd.weight * kd + vat_weight * vat, to be differentiated, and its terms: ``ar`` and
            ``kd`` in nats, means over the labels of the batch, ``vat``, the mean over its samples (those without image count
            0); ``vat_layers`` (L,), detached, vat of every matched student layer. A batch without labels gives zeros. Further
            terms of `distill` are added with their weights, and stand under their names.

        Raises:
            ValueError: labels or input_ids are missing; only one of the two numbers is given; or the call goes around what
                wraps the student (DistributedDataParallel, an engine).
        """
        named = {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "pixel_values": pixel_values,
        }
        self._has_run = True
        given: dict[str, Any] = {**(batch or {}), **{k: v for k, v in named.items() if v is not None}, **inputs}
        tokens = given.pop("num_items_in_batch", num_items_in_batch)
        samples = given.pop("num_samples_in_batch", num_samples_in_batch)
        if getattr(self, "_is_replica", False):
            raise InputError(
                "torch.nn.DataParallel splits a batch between threads, which cannot share a teacher: start one process for "
                "each GPU (torchrun, accelerate launch), or let this one see a single GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        return self.compute_losses(self.student, given, **self._counts(given, tokens, samples))

    def _counts(self, batch: Mapping[str, Tensor], tokens: Any, samples: Any) -> dict[str, Any]:
        """What losses are divided by: the numbers that are given, or a Trainer's; None for the batch's own."""
        processes: int = 1
        if torch.is_grad_enabled():
            self._wrapper_check.check()
            if tokens is None and (found := items_of_trainer()) is not None:
                tokens, processes = found
        if tokens is not None and samples is None and self.losses.counts_samples:
            samples = self._samples_of_window(batch)
        counts = {"tokens": tokens, "samples": samples}
        if processes > 1:  # whose gradients are averaged
            counts = {name: None if n is None else n / processes for name, n in counts.items()}
        return counts

    @torch.compiler.disable
    def compute_losses(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        *,
        tokens: Tensor | int | None = None,
        samples: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """As `forward`, by a call of ``model``: the student, or whatever has been wrapped around it.

        ``tokens`` and ``samples`` are those of the whole batch where this is a part.
        """
        for name in ("input_ids", "labels"):
            if batch.get(name) is None:
                raise InputError(f"{name} must be in the batch")
        base, has_run = self.losses.student, False

        def means(**given: Any) -> dict[str, Tensor]:
            nonlocal has_run
            has_run = True
            self._move_to(given["input_ids"].device)
            self._check_sharing()
            return self._means(self.losses(**given), given["labels"], tokens, samples)

        def of_base(**given: Any) -> dict[str, Tensor]:
            return base(**given, **instead_of_forward(means))

        result = model(**batch, **instead_of_forward(means if base is self.student else of_base))
        if not has_run:
            raise InputError(
                "the student's forward pass has been replaced since distill() (use_liger_kernel does so) by one that gives "
                "other losses: leave it as it is, or replace it before"
            )
        return result

    def count(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Labels and samples of a batch, as the losses are divided by them."""
        labels = batch["labels"]
        return (labels[:, 1:] != IGNORE_INDEX).sum(), self.losses.count_samples(**batch)

    def _means(
        self, sums: dict[str, Tensor], labels: Tensor, tokens: Tensor | int | None, samples: Tensor | int | None
    ) -> dict[str, Tensor]:
        if tokens is None:
            tokens = (labels[:, 1:] != IGNORE_INDEX).sum()
        if samples is None:
            samples = sums.get("samples", torch.ones(()))
        tokens, samples = (torch.as_tensor(n, device=labels.device) for n in (tokens, samples))
        tokens, samples = (torch.where(n > 0, n, 1) for n in (tokens, samples))  # n of one process may be a fraction
        counts = {"label": tokens, "sample": samples}
        result: dict[str, Tensor] = {}
        for term in self.losses.terms:
            result |= {name: sums[name] / counts[term.per] for name in (term.name, *term.details)}
        terms = [result[name] * weight for name, weight in self.weights.items()]
        return {"loss": torch.stack([*terms, sums["idle"]] if "idle" in sums else terms).sum()} | result

    @property
    def weights(self) -> dict[str, float]:
        """Of each term in the loss."""
        return {term.name: term.weight for term in self.losses.terms}

    @property
    def vat_weight(self) -> float:
        """Of the alignment, 0 without one; it may be changed between batches."""
        return self.weights.get(Alignment.name, 0.0)

    @vat_weight.setter
    def vat_weight(self, value: float) -> None:
        term = next((term for term in self.losses.terms if isinstance(term, Alignment)), None)
        if term is None or not 0 <= value < float("inf"):
            needs = (
                "an alignment (distill() with vat_weight above 0)" if term is None else "a finite number of at least 0"
            )
            raise InputError(f"vat_weight needs {needs}, got {value}")
        term.weight = float(value)

    @torch.compiler.disable
    def _samples_of_window(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Samples of the batches whose gradients a Trainer accumulates, over all processes, for its number of items."""
        window = window_of_trainer(batch)
        if window is None:
            names = ", ".join(term.name for term in self.losses.terms if term.per == "sample")
            raise InputError(
                f"num_samples_in_batch must be given beside num_items_in_batch: {names} is a mean over the samples of the "
                "whole batch (in transformers.Trainer it is found; cdistill.CompoDistillTrainer counts both)"
            )
        if self._window is None or self._window.batches is not window.batches:
            count = torch.stack([self.count(b)[1] for b in window.batches]).sum()
            self._window = Window(window.batches, window.reduce(count))  # without the trainer, which holds this module
        assert self._window.samples is not None
        return self._window.samples

    def _check_sharing(self) -> None:
        """What the models have in common may have changed since they were given, by training or by loading weights."""
        common, shares_images = self._sharing
        check_frozen(common)
        for teacher, shares in zip(self.losses.teachers, shares_images, strict=False):  # none where nothing distils
            teacher.shares_vision = shares() and not self.losses.reads_apart

    def _move_to(self, device: torch.device) -> None:
        """Bring the teachers and what terms have of their own to the batch: an accelerator moves the student alone."""
        for module in self.losses.modules_of_terms.values():
            module.to(device)
        for model in (teacher.model for teacher in self.losses.teachers):
            if model.device == device or getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None):
                continue
            if not any(p.is_meta for p in model.parameters()):  # meta: offloaded
                model.to(device)


def distill(
    teacher: Model | Mapping[str, Model],
    student: Model,
    *,
    vat: VATConfig | VAT | None = None,
    kd: KDConfig | None = None,
    vat_weight: float = 1.0,
    terms: Sequence[Term | str] = (),
    train_vision: bool = False,
    visual_token_ids: int | Sequence[int] | None = None,
) -> Distillation:
    """Wrap a teacher and a student for training with any loop (SPEC section 4: L_ar + L_kd + L_vat):

        distillation = cdistill.distill(teacher, student)
        losses = distillation(batch)
        losses["loss"].backward()

    The teacher is frozen, put into eval mode and follows the batches to their device. The student's vision encoder is frozen,
    as in the paper; what else is trained is up to the caller, and so is all of a peft model. Two LLaVAs look at the images
    once while their vision encoders are equal and frozen; other models each look for themselves.

    Args:
        teacher, student: multimodal models of transformers with one tokenizer, in whatever dtypes; either may be a peft model.
            With ``vat.visual`` resample, or ``vat_weight`` 0, their visual tokens may differ (`cdistill.train.resampling`).
            Several teachers are a mapping of their names: batches then say in ``kind_weights`` (B, teachers) how much each
            sample learns of whom (docs/how-to/teachers.md).
        vat: visual attention alignment (paper section 4.1), by default `VATConfig()`; a `VAT` where something must be measured.
        kd: divergence over the vocabulary and its weight, by default `KDConfig()`; with weight 0 it is left out.
        vat_weight: weight of the alignment; with 0 it is left out.
        terms: further terms of the loss: instances of `cdistill.Term`, or names given to `cdistill.register_term`.
        train_vision: leave the student's vision encoder as it is given, instead of freezing it.
        visual_token_ids: ids of both models' visual tokens, by default what the student's configuration names.

    Raises:
        ValueError: the models cannot be distilled: other visual tokens or vocabularies, attention that cannot be aligned,
            layers that cannot be matched, a head that is more than a linear layer, a peft method that does more than change
            layers, hooks of one's own on a whole model, a replaced forward pass of the teacher, a trained parameter that is
            the teacher's, too; or terms that are not complete, do not go together, or have parameters to train, which no
            optimizer of the student's would.
    """
    _require_weights(vat_weight, kd)
    given, student = student, _unwrapped(student, "student")
    teachers = _teachers(teacher)
    names = tuple(teachers) if isinstance(teacher, Mapping) else ()
    config = vat.config if isinstance(vat, VAT) else vat or VATConfig()
    allowed = not vat_weight or config.visual == "resample"
    apart = [_reads_apart(student, one, allowed=allowed, alone=not names) for one in teachers.values()]
    encoder = [] if train_vision or hasattr(given, "peft_config") else parameters_of(student, "vision")
    common = {name: p for t in teachers.values() for name, p in common_parameters(student, t, frozen=encoder).items()}
    shares_images = [CommonEncoder(student, one) for one in teachers.values()]
    aligned = alignments(config, vat, student, teachers) if vat_weight else ()
    ids = (visual_token_ids,) if isinstance(visual_token_ids, int) else visual_token_ids
    source = held(student, teachers, shares_images, apart=any(apart), several=bool(names))
    settings = settings_of(kd or KDConfig(), aligned, vat_weight, names)
    model = DistillationModel(student, _terms(terms, settings), teacher=source, visual_tokens=ids, pads_right=False)
    require_known_parts(student)
    _refuse_trained(model)
    for parameter in encoder:
        parameter.requires_grad_(False)
    return Distillation(model, given, common=common, shares_images=shares_images)


def _teachers(teacher: Model | Mapping[str, Model]) -> dict[str, Model]:
    """The models inside of what is given, by name. Raises ValueError for names that cannot be told."""
    if not isinstance(teacher, Mapping):
        return {"teacher": _unwrapped(teacher, "teacher")}
    if not teacher or not all(isinstance(name, str) and NAME.fullmatch(name) for name in teacher):
        raise InputError(f"teacher must be a model or a mapping of names (letters, digits, _), got {[*teacher]}")
    return {name: _unwrapped(model, f"teacher {name}") for name, model in teacher.items()}


def _reads_apart(student: Model, teacher: Model, *, allowed: bool, alone: bool) -> bool:
    """Whether each model needs an encoding of its own. Raises ValueError for a pair that cannot be distilled, or not so.

    Teachers that are not ``alone`` have none, and a student has fetched the adapter of one of them.
    """
    if not alone:
        check_configurations(student, teacher)
        return False
    apart = visual_difference(student, teacher) is not None
    (check_apart if apart and allowed else check_pair)(student, teacher)
    return apart


def _require_weights(vat_weight: float, kd: KDConfig | None) -> None:
    for name, value in (("vat_weight", vat_weight), ("kd.weight", (kd or KDConfig()).weight)):
        if not 0 <= value < float("inf"):
            raise InputError(f"{name} must be at least 0 and finite, got {value}")


def _unwrapped(model: Model, side: str) -> Model:
    """The model inside of a wrapper, which is not looked at again."""
    refuse_left_out(model, side, "the whole model", called=side == "student")
    return unwrapped(model, side)


def _terms(further: Sequence[Term | str], settings: Settings) -> list[Term]:
    """Those of distilled fine-tuning that have a weight, and the further ones."""
    terms = [term for term in configured(OBJECTIVES["dft"].losses, settings) if term.weight > 0]
    for term in (further,) if isinstance(further, str) else further:
        if isinstance(term, str):
            terms += configured((term,), settings)
        elif isinstance(term, Term):
            terms.append(term)
        else:
            raise InputError(f"terms must hold instances of cdistill.Term or names of registered ones, got {term!r}")
    return terms


def _refuse_trained(model: DistillationModel) -> None:
    for name, module in model.modules_of_terms.items():
        if any(p.requires_grad for p in module.parameters()):
            raise InputError(
                f"terms: {name} has parameters to train, which are not the student's, so that its optimizer would leave them "
                "alone: freeze them, or train with a recipe, whose stages train them, too"
            )
