"""Whether an exported folder, read back in a process of its own, gives what the model gave that was exported."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from cdistill.errors import InputError
from cdistill.models import readback
from cdistill.models.folder import NO_CODE, one_line, reading
from cdistill.models.load import Model
from cdistill.models.processor import Processor, load_processor
from cdistill.models.taf import TAFLlavaForConditionalGeneration

QUESTION = "What is in the image?"
TOKENS = 16
TOLERANCE = 64  # in units of the last place of the largest logit
PIXELS = 1e-5


@dataclass(frozen=True)
class Difference:
    """How far another process's answers to the same prompts are from those expected.

    Attributes:
        logits: largest difference of two logits. ``largest``: largest of the logits expected.
        replies: whether all greedy replies are the same ids.
        inputs: whether its processor makes the same ids of the questions; None where it could not be loaded.
        pixels: largest difference of two pixel values, where it makes such.
        fit: what is wrong with names or shapes of weights, or "".
    """

    logits: float
    largest: float
    replies: bool
    inputs: bool | None
    pixels: float
    fit: str = ""


def make_prompts(speaker: Any, images: Sequence[Sequence[Tensor]], tokenizer: Any = None) -> list[dict[str, Any]]:
    """Prompts of `cdistill.models.readback.answer` with so many images each, and one without."""
    prompts = [
        {"question": QUESTION, "images": list(shown), "inputs": readback.encode(speaker, QUESTION, list(shown))}
        for shown in images
    ]
    words = readback.encode(speaker if tokenizer is None else tokenizer, QUESTION, [])
    return [*prompts, {"question": QUESTION, "images": [], "inputs": words}]


def picture(seed: int, height: int = 48, width: int = 64) -> Tensor:
    """A (height, width, 3) uint8 image of noise."""
    return torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def expected_replies(model: Model, prompts: Sequence[Mapping[str, Any]], tokens: int) -> list[dict[str, Tensor]]:
    """What a model here makes of prompts, as `cdistill.models.readback.reply` does."""
    return [readback.reply(model, dict(prompt["inputs"]), tokens) for prompt in prompts]


def ask(requests: Sequence[Mapping[str, Any]], environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a fresh process with these variables makes of each request (`cdistill.models.readback.answer`).

    Raises:
        RuntimeError: it has ended without an answer; with its last line.
    """
    with tempfile.TemporaryDirectory() as name:
        asked, answered = Path(name, "request"), Path(name, "answer")
        torch.save(list(requests), asked)
        command = [sys.executable, "-P", readback.__file__, str(asked), str(answered)]
        own = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(name, "modules"))}  # code of folders is kept there
        ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own, **environ})
        if ended.returncode != 0:
            said = [line for line in ended.stderr.splitlines() if line.strip()]
            raise RuntimeError(said[-1].strip() if said else f"exit status {ended.returncode}")
        return list(torch.load(answered))


def compare(
    wanted: Sequence[Mapping[str, Tensor]], prompts: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> Difference:
    """How a process's result differs from what was expected of the prompts."""
    logits, largest, pixels = 0.0, 0.0, 0.0
    same, inputs = True, True
    for expected, prompt, found in zip(wanted, prompts, result["replies"], strict=True):
        logits = max(logits, float((found["logits"] - expected["logits"]).abs().max()))
        largest = max(largest, float(expected["logits"].abs().max()))
        same &= torch.equal(found["ids"], expected["ids"])
        if "processed" in found:
            inputs &= torch.equal(found["processed"]["input_ids"], prompt["inputs"]["input_ids"])
            same &= torch.equal(found["own_ids"], expected["ids"])
            if "pixel_values" in prompt["inputs"]:
                ours, theirs = prompt["inputs"]["pixel_values"], found["processed"].get("pixel_values")
                alike = theirs is not None and ours.shape == theirs.shape
                pixels = max(pixels, float((ours - theirs).abs().max()) if alike else float("inf"))
    kinds = [(name, list(result[f"{name}_keys"])) for name in ("missing", "unexpected", "mismatched")]
    fit = ", ".join(f"{len(names)} weights {kind} (such as {names[0]})" for kind, names in kinds if names)
    known = all("processed" in found for found in result["replies"])
    return Difference(logits, largest, same, inputs if known else None, pixels, fit)


def fault(found: Difference, dtype: torch.dtype, *, processor: bool = True) -> str | None:
    """What shows that two processes have not the same model in this number format, or None.

    Without ``processor`` that of the folder need not load.
    """
    allowed = TOLERANCE * torch.finfo(dtype).eps * max(1.0, found.largest)
    if found.fit:
        return found.fit
    if found.inputs is None and processor:
        return "the processor cannot be loaded"
    if found.inputs is False:
        return "the processor makes other tokens of a question"
    if found.pixels > PIXELS:
        return f"pixel values differ by {found.pixels:.3g}"
    if not found.logits <= allowed:
        return f"logits differ by {found.logits:.3g}, {allowed:.3g} is allowed"
    return None if found.replies else "greedy replies differ"


def check_folder_replies(folder: Path, model: Model, processor: Processor, *, code: bool) -> tuple[str, list[str]]:
    """Compare what a fresh process makes of a folder with the model that it holds; says what was compared, and remarks.

    Args:
        folder: as `cdistill.models.export.export` writes it.
        model: on the CPU, with eager attention.
        processor: what was put beside the weights, before the folder's files were renamed.
        code: whether the process may run the folder's code.

    Raises:
        ValueError: the process could not load the folder, or its logits, replies or prompts differ.
    """
    prompts, remarks = _prompts_of(model, processor)
    request = {
        "folder": str(folder),
        "code": code,
        "cdistill": isinstance(model, TAFLlavaForConditionalGeneration) and not code,
        "tokens": TOKENS,
        "threads": torch.get_num_threads(),
        "prompts": prompts,
    }
    root = str(Path(readback.__file__).parents[2])
    where = {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))}
    try:
        result = ask([request], where)[0]
        if "error" in result:
            raise RuntimeError(result["error"])
    except RuntimeError as error:
        raise InputError(
            f"output: read back in a fresh process, the folder cannot be loaded: {one_line(error)}"
        ) from None
    found = compare(expected_replies(model, prompts, TOKENS), prompts, result)
    wrong = fault(found, model.dtype, processor=not remarks)
    if wrong is not None:
        raise InputError(f"output: read back in a fresh process, the folder is another model: {wrong}")
    return (
        f"read back in a fresh process: same replies, logits within {found.logits:.2g} of {found.largest:.3g}",
        remarks,
    )


def _prompts_of(model: Model, processor: Processor) -> tuple[list[dict[str, Any]], list[str]]:
    multimodal = hasattr(model.config, "vision_config")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        with reading("model", "its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
        if not multimodal:
            return make_prompts(tokenizer, []), []
        try:
            speaker = load_processor(folder, "model")
        except ValueError as error:
            said = one_line(error).removeprefix("model: ").replace(str(folder), "the model")
            return make_prompts(tokenizer, []), [f"no image was shown in the check: {said}"]
        return make_prompts(speaker, [[picture(0)]]), []
