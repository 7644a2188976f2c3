"""Cases of the parity matrix: three steps of a trainer on tiny models, in any mode, from batches cut in any way."""

from __future__ import annotations

import contextlib
import itertools
import random
import tempfile
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from family_models import build_pair, collate, draw_samples, pack
from family_table import EOS, ID, PAD, PATCH, SIDE, VOCABULARY
from transformers import TrainingArguments

from cdistill.models.llava import compose
from cdistill.runtime import launch
from cdistill.runtime.bad_samples import BadSamples
from cdistill.runtime.finite import FiniteSteps
from cdistill.runtime.zero import deepspeed_config, released
from cdistill.train.build import checkpoint_activations
from cdistill.train.lora import add_lora
from cdistill.train.model import DistillationModel
from cdistill.train.objectives import OBJECTIVES, set_trained
from cdistill.train.recipes import LoRAConfig, StageConfig
from cdistill.train.rounding import round_weights
from cdistill.train.terms import Term
from cdistill.train.trainer import DistillTrainer, training_arguments
from cdistill.vat import VAT, VATConfig, attention_layers

STEPS, MICRO, RANKS = 3, 2, 2
EPSILON = 1e-3  # of AdamW: far above rounding, which it would otherwise make as large as any gradient
IMAGE, WORDS, IMAGES, VIDEO = range(4)  # the samples of `draw_samples`

# What the micro-batches of the two ranks hold, in turns.
PATTERNS = {
    "words on one rank": (((IMAGE, IMAGES), (WORDS, WORDS)),),
    "words on all ranks": (((WORDS, WORDS), (WORDS, WORDS)),),
    "alternating": (((IMAGE, IMAGE), (WORDS, WORDS)), ((WORDS, WORDS), (IMAGES, WORDS))),
    "numbers of images": (((IMAGE, WORDS), (IMAGES, IMAGES)), ((IMAGES, IMAGE), (IMAGE, WORDS))),
    "a video": (((VIDEO, IMAGE), (WORDS, IMAGES)), ((WORDS, WORDS), (VIDEO, WORDS))),
}


@dataclass(frozen=True)
class Case:
    """One way to train; ``mode`` is a ZeRO stage or off with two processes, or one process with other micro-batches."""

    mode: str
    family: str
    pattern: str
    objective: str
    taf: bool
    lora: bool
    packed: bool
    accumulation: int
    checkpointing: bool
    grid: str | None = None  # that weights are rounded to

    def __str__(self) -> str:
        flags = [f.name for f in fields(self) if getattr(self, f.name) is True]
        return "-".join([self.mode, self.family, self.pattern, self.objective, *flags, f"x{self.accumulation}"])

    @property
    def possible(self) -> bool:
        """TAF is LLaVA's, whose images are no videos; a frozen language model takes no LoRA."""
        is_llava = self.family == "llava"
        return (
            (not self.taf or is_llava)
            and (self.pattern != "a video" or not is_llava)
            and not (self.lora and self.objective == "dpt")
        )


AXES: dict[str, tuple[Any, ...]] = {
    "mode": ("one", "off", "0", "1", "2", "3"),
    "family": ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl"),
    "pattern": tuple(PATTERNS),
    "objective": ("dpt", "dft", "sft"),
    "taf": (False, True),
    "lora": (False, True),
    "packed": (False, True),
    "accumulation": (1, 3),
    "checkpointing": (False, True),
}


def pairwise(seed: int = 0) -> list[Case]:
    """Cases in which any two values of any two axes that are possible together meet; a greedy choice of random ones."""
    rng = random.Random(seed)
    drawn = [Case(**{name: rng.choice(values) for name, values in AXES.items()}) for _ in range(6000)]
    pairs = {
        case: set(itertools.combinations(((name, getattr(case, name)) for name in AXES), 2))
        for case in drawn
        if case.possible
    }
    left, chosen = set().union(*pairs.values()), []
    while left:
        best = max(pairs, key=lambda case: len(pairs[case] & left))
        chosen.append(best)
        left -= pairs[best]
    return chosen


def models_of(case: Case) -> tuple[Any, Any]:
    """A student and its teacher."""
    if case.family != "llava":
        return build_pair(case.family)
    made = []
    for seed, (layers, width, heads) in enumerate(((5, 64, 4), (3, 32, 2)), 1):
        torch.manual_seed(seed)
        vision = transformers.SiglipVisionConfig(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vision_use_head=False,
        )
        text = transformers.Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            initializer_range=0.25,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
        )
        fetched = made[0] if made and case.taf else None
        model = compose(vision, text, image_token_id=ID["<image>"], image_seq_length=4, teacher=fetched)
        if made:
            model.model.vision_tower.load_state_dict(made[0].model.vision_tower.state_dict())
        made.append(model.eval())
    return made[1], made[0]


class Drawn(torch.utils.data.Dataset):
    """Samples in the order in which micro-batches of two ranks take them."""

    def __init__(self, case: Case) -> None:
        self.name = "llava_qwen2" if case.family == "llava" else case.family
        turns = PATTERNS[case.pattern]
        self.kinds = [k for i in range(STEPS * case.accumulation) for micro in turns[i % len(turns)] for k in micro]

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> Any:
        return draw_samples(self.name, 100 + index)[self.kinds[index]]


class OwnEpsilon(DistillTrainer):
    """AdamW with `EPSILON`."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the trainer, changed."""
        optimizer = super().create_optimizer(model)
        for group in optimizer.param_groups:
            group["eps"] = EPSILON
        return optimizer


def train(case: Case, micro: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Losses of all steps and the trained weights, of the processes that call it together."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    distributed = world > 1 and case.mode != "off"
    student, teacher = models_of(case)
    terms, lora = prepared(case, student, teacher)
    with (
        tempfile.TemporaryDirectory() as folder,
        launch.environment(distributed=distributed),
        launch.quiet(),
        released(engines=distributed) as at_end,
    ):
        stage, arguments = arguments_of(case, micro, world, student, Path(folder))
        data, objective = Drawn(case), OBJECTIVES[case.objective]
        trainer = OwnEpsilon(
            DistillationModel(student, terms, teacher=teacher if objective.distils else None),
            arguments,
            stage,
            lora=lora,
            finite=FiniteSteps(1, "parity"),
            bad=BadSamples(0, Path(folder), "parity"),
            train_dataset=data,
            data_collator=partial(batch_of, case, data.name, teacher),
            callbacks=[],
        )
        at_end.callback(trainer.destroy_engine)
        with contextlib.redirect_stdout(None):
            trainer.train()
        names = ("loss", *objective.losses)
        losses = [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]
        gathered: Any = contextlib.nullcontext()
        parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if distributed and case.mode == "3":
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
        with gathered:
            weights = {name: p.detach().clone().numpy() for name, p in parameters.items()}
    return losses, weights


def batch_of(case: Case, name: str, model: Any, samples: list[Any]) -> dict[str, torch.Tensor]:
    """A micro-batch; ``model`` is asked for positions, which are the student's, too."""
    if case.packed:
        return pack(name, samples, [[i, i + 1] for i in range(0, len(samples), 2)], model).batch
    return collate(name, samples)[0]


def prepared(case: Case, student: Any, teacher: Any) -> tuple[tuple[Term, ...], LoRAConfig | None]:
    """The terms of the loss, and the student's LoRA, which it has then, as it has its frozen parts."""
    objective = OBJECTIVES[case.objective]
    vat = VAT(VATConfig(layers="all"), attention_layers(student), attention_layers(teacher))
    torch.manual_seed(5)
    lora = LoRAConfig(r=4, alpha=8, dropout=0.0) if case.lora else None
    if lora is not None:
        add_lora(student, lora)
    if case.grid is not None:
        round_weights(student, case.grid, "quantization")
    set_trained(student, objective)
    if case.checkpointing:
        checkpoint_activations(student, reentrant=False)
    return objective.terms(vat=vat), lora


def arguments_of(
    case: Case, micro: int, world: int, student: Any, folder: Path
) -> tuple[StageConfig, TrainingArguments]:
    """A stage of `STEPS` steps, and what Trainer needs to know of it."""
    size, zero = MICRO * RANKS * case.accumulation, case.mode if world > 1 else "off"
    stage = StageConfig(
        objective=case.objective, samples=STEPS * size, learning_rate=1e-2, global_batch_size=size, warmup_ratio=0.0
    )
    options: dict[str, Any] = {"precision": "fp32", "micro_batch_size": micro, "accumulation": size // (world * micro)}
    config = None
    if zero != "off":
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        limits = {"max_grad_norm": stage.max_grad_norm, "trained": trained, "world_size": world}
        config = deepspeed_config(int(zero), **limits, **options)
    return stage, training_arguments(
        folder,
        stage,
        deepspeed=config,
        logging_steps=1,
        save_steps=0,
        seed=1,
        workers=0,
        on_cpu=True,
        **options,
    )
