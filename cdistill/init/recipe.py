"""The commented recipe that ``cdistill init`` writes: what follows from models, data and GPUs, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from cdistill.data import strict_yaml
from cdistill.init.models import Pair
from cdistill.init.records import Records
from cdistill.plan.memory import Plan, plan
from cdistill.plan.suggestions import suggestions
from cdistill.train.recipes import Recipe, recipe_from_dict, with_overrides

MOST_BATCH = 128  # the paper's
MICRO = {"cuda": 8, "cpu": 4}  # samples of a process at a time, to begin with
LENGTH = 2048  # the paper's
# Of a fresh adapter (paper-qwen1.5-1.8b), and of a student that sees already (qwen2.5-vl-3b).
RATES = {True: ("1.0e-3", "1.0e-4", "1.0e-4"), False: ("1.0e-4", "1.0e-5", "1.0e-5")}
STAGES = {
    "dpt": "the adapter alone learns, from answers and teacher",
    "dft": "language model and adapter learn, and attention is aligned",
    "sft": "the same parts learn, from answers alone",
}
WIDTH = 40  # of a line before its comment


@dataclass(frozen=True)
class Machine:
    """What a run is for: GPUs (0 is the CPU) and the bytes of each, None where nobody knows."""

    gpus: int
    limit: int | None

    @property
    def processes(self) -> int:
        """One for each GPU."""
        return max(1, self.gpus)

    @property
    def device(self) -> str:
        """cuda or cpu."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True)
class Written:
    """A recipe's text, what it says, its plan, and why it does not fit the machine if it does not."""

    text: str
    recipe: Recipe
    planned: Plan
    too_large: str


def make(name: str, output: str, pair: Pair, records: Records, machine: Machine) -> Written:
    """The recipe for two models, a data set and a machine. Raises ValueError if it cannot be planned."""
    recipe = recipe_from_dict(_values(name, output, pair, records, machine))
    options = sizes(pair, records, machine)
    planned = plan(recipe, **options)
    too_large = ""
    if machine.limit is not None and planned.total > machine.limit:
        found = suggestions(planned, machine.limit, **options)
        recipe = with_overrides(recipe, [override for one in found for override in one.overrides])
        planned = plan(recipe, **options)
        if planned.total > machine.limit:
            too_large = f"needs {_gb(planned.total)} of the {_gb(machine.limit)} there: `cdistill plan` says more"
    text = _text(recipe, pair, records, machine)
    read = recipe_from_dict(strict_yaml.load(text, "the recipe"))
    assert read == recipe, "what is written is what was planned"
    return Written(text, recipe, planned, too_large)


def sizes(pair: Pair, records: Records, machine: Machine) -> dict[str, Any]:
    """Options of `plan` for a recipe."""
    precision = "bf16" if machine.gpus else "fp32"
    options = {"gpus": machine.processes, "device": machine.device, "precision": precision}
    return options | ({"visual": records.visual} if pair.any_size else {})


def _gb(size: int) -> str:
    return f"{size / 10**9:.1f} GB"


def _batch(records: Records, machine: Machine) -> int:
    """Samples of a step: about the root of a set's size, so that small ones have steps, too."""
    most = min(MOST_BATCH, max(1, isqrt(records.count)))
    return machine.processes * 2 ** max(0, (most // machine.processes).bit_length() - 1)


def _values(name: str, output: str, pair: Pair, records: Records, machine: Machine) -> dict[str, Any]:
    """The plain values of the recipe, before it is made to fit."""
    batch = _batch(records, machine)
    length = min(LENGTH, pair.most_tokens or LENGTH)
    data = {"path": records.path, "template": pair.template, "max_length": length}
    data |= {name: value for name in ("images", "columns") if (value := getattr(records, name)) is not None}
    section = {
        "samples": max(records.count, batch),
        "global_batch_size": batch,
        "micro_batch_size": min(MICRO[machine.device], batch // machine.processes),
        "data": data,
    }
    rates = map(float, RATES[pair.composed])
    return {
        "name": name,
        "output": output,
        "teacher": pair.teacher,
        "student": {"base": pair.student, "vision": pair.vision, "taf": pair.taf},
        "processes": machine.processes,
        "deepspeed": 2 if machine.gpus > 1 else "off",
        "workers": 2 if machine.gpus else 0,
        "logging_steps": max(1, min(20, section["samples"] // batch // 20)),  # type: ignore[operator]
        "save_steps": 500 if machine.gpus else 0,
        "vat": {"enabled": True, "weight": "auto", **pair.vat},
        "stages": list(STAGES),
        "stage": {stage: {**section, "learning_rate": rate} for stage, rate in zip(STAGES, rates, strict=True)},
    }


def _text(recipe: Recipe, pair: Pair, records: Records, machine: Machine) -> str:
    lines = [
        f"# {recipe.name}: a student that learns from its teacher; written by `cdistill init`, to be changed as you like.",
        "# Paths start from the folder that cdistill is run in. `cdistill recipes keys` tells every key, and",
        "# `cdistill recipes schema` prints a schema by which editors complete and check them.",
        *_pairs({"name": recipe.name}, {"name": "what the run is called"}),
        *_pairs({"output": recipe.output}, {"output": "folder of the run: models, metrics.jsonl, TensorBoard's files"}),
        *_pairs({"seed": recipe.seed}, {"seed": "the same seed gives the same run again"}),
        "",
        *_models(recipe, pair),
        "",
        *_machine(recipe, machine),
        "",
        *_losses(recipe, pair),
        "",
        *_stages(recipe, pair, records, machine),
    ]
    return "\n".join(lines) + "\n"


def _models(recipe: Recipe, pair: Pair) -> list[str]:
    if pair.taf and not pair.composed:
        taf = "the student was made to see through its teacher's adapter (TAF)"
    elif pair.taf:
        taf = "see through the teacher's encoder and adapter (TAF); false gives an adapter of its own"
    elif not pair.composed:
        taf = "the student has an adapter already; true is for language models"
    else:
        taf = (
            f"a fresh adapter: {_short(pair.no_taf)}" if pair.no_taf else "a fresh adapter behind an encoder of its own"
        )
    student: dict[str, Any] = {"base": recipe.student.base}
    student |= {} if recipe.student.vision is None else {"vision": recipe.student.vision}
    student |= {"taf": recipe.student.taf}
    lines = [
        *_pairs({"teacher": recipe.teacher}, {"teacher": pair.about[1]}),
        "student:",
        *_pairs(student, {"base": pair.about[0], "vision": "the encoder it looks through", "taf": taf}, "  "),
    ]
    if recipe.student.lora is not None:
        lora = "{" + ", ".join(f"{key}: {getattr(recipe.student.lora, key)}" for key in ("r", "alpha", "dropout")) + "}"
        lines.append(_line(f"  lora: {lora}", "train additions of low rank: all of the language model would not fit"))
    return lines


def _machine(recipe: Recipe, machine: Machine) -> list[str]:
    where = "one for each GPU" if machine.gpus else "on the CPU"
    limit = f", which has {_gb(machine.limit)}{'' if machine.gpus else ' free'}" if machine.limit is not None else ""
    zero = {
        "off": "plain torch; 2 or 3 share what a GPU holds among several",
        2: "ZeRO-2: GPUs share gradients and the optimizer's states; 3 shares weights, too",
        3: "ZeRO-3: GPUs share weights, too",
    }
    precise = "bf16 where the GPU has it, else fp16" if machine.gpus else "fp32 on a CPU"
    values: dict[str, Any] = {
        "processes": recipe.processes,
        "precision": recipe.precision,
        "deepspeed": recipe.deepspeed,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "workers": recipe.workers,
        "logging_steps": recipe.logging_steps,
        "save_steps": recipe.save_steps,
    }
    comments = {
        "processes": f"{where}{limit}",
        "precision": precise,
        "deepspeed": zero.get(recipe.deepspeed, "DeepSpeed's ZeRO stage"),
        "gradient_checkpointing": "true takes less memory and more time",
        "workers": "processes that read samples ahead",
        "logging_steps": "steps between two lines of metrics.jsonl",
        "save_steps": "steps between checkpoints to go on from (--resume); 0 for none",
    }
    lines = _pairs(values, comments)
    memory = recipe.teacher_memory
    chosen = {name: getattr(memory, name) for name in ("zero", "offload", "quantization", "cache")}
    chosen = {name: value for name, value in chosen.items() if value not in ("off", False, None)}
    if chosen:
        inside = ", ".join(f"{name}: {_scalar(value)}" for name, value in chosen.items())
        lines.append(_line(f"teacher_memory: {{{inside}}}", "for a teacher that does not fit beside the student"))
    return lines


def _losses(recipe: Recipe, pair: Pair) -> list[str]:
    lines = [_line(f"kd: {{weight: {_scalar(recipe.kd.weight)}}}", "how much the teacher's answers count")]
    if not recipe.vat.enabled:
        return [*lines, _line("vat: {enabled: false}", f"attention cannot be aligned: {_short(pair.no_vat)}")]
    ours, theirs = pair.aligned
    layers = {"layers": recipe.vat.layers}
    more = {} if recipe.vat.student_layers is None else {"student_layers": recipe.vat.student_layers}
    span = {"layers": f"in the middle: {ours} of the student, {theirs} of the teacher; or early, later, all"}
    weight = "how much that counts: auto measures it as a stage starts; the paper has 1"
    return [
        *lines,
        _line("vat:", "the student looks at images as its teacher does"),
        *_pairs(layers, span, "  "),
        *_pairs(more, {"student_layers": "as many as the teacher has in its middle"}, "  "),
        *_pairs({"weight": recipe.vat.weight}, {"weight": weight}, "  "),
    ]


def _stages(recipe: Recipe, pair: Pair, records: Records, machine: Machine) -> list[str]:
    lines = [
        _line(f"stages: [{', '.join(recipe.stages)}]", "in this order, each from the result of the last"),
        "stage:",
    ]
    template = f"{pair.template} fits; the model's own does not: {_short(pair.no_template)}"
    comments = {
        "samples": f"your {records.count:,} once; more goes through them again",
        "learning_rate": "the highest; it rises first, then falls",
        "global_batch_size": "samples of a step, over all processes",
        "micro_batch_size": "samples of a process at a time: lower it where memory runs out",
        "path": f"{records.form}, {records.count:,}",
        "images": "where names of images start from" + (" (found there)" if records.guessed else ""),
        "columns": "which column holds what",
        "template": "how a chat becomes text: the model's own template" if pair.template == "auto" else template,
        "max_length": f"tokens of a sample, which is cut there; the longest seen has {records.longest:,}",
    }
    for place, name in enumerate(recipe.stages):
        stage = recipe.stage[name]
        said = comments if place == 0 else {}
        rate = RATES[pair.composed][place]
        lines.append(_line(f"  {name}:", STAGES[name]))
        lines += _pairs({"samples": stage.samples}, said, "    ")
        lines.append(_line(f"    learning_rate: {rate}", said.get("learning_rate", "")))
        values = {key: getattr(stage, key) for key in ("global_batch_size", "micro_batch_size")}
        lines += _pairs(values, said, "    ")
        if place:
            lines.append("    data: *data")
            continue
        data = {key: getattr(stage.data, key) for key in ("path", "images", "columns", "template", "max_length")}
        lines.append(_line("    data: &data", "the other stages read the same"))
        lines += _pairs({key: value for key, value in data.items() if value is not None}, said, "      ")
    return lines


def _pairs(values: Mapping[str, Any], comments: Mapping[str, str], indent: str = "") -> list[str]:
    return [_line(f"{indent}{key}: {_scalar(value)}", comments.get(key, "")) for key, value in values.items()]


def _line(text: str, comment: str) -> str:
    return f"{text:{WIDTH}}  # {comment}" if comment else text


def _scalar(value: Any) -> str:
    """A value in a line of YAML that reads as the same value."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_scalar(key)}: {_scalar(item)}' for key, item in value.items())}}}"
    if isinstance(value, str):
        plain = value.strip() == value and not set(value) & set(":#{}[],&*!|>'\"%@`\n") and value[:1] not in "-?"
        same = plain and strict_yaml.switch(strict_yaml.load(value, "")) == value
        return value if same else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def _short(reason: str, most: int = 160) -> str:
    text = " ".join(reason.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
