"""llama.cpp itself, where xllamacpp is installed: its OpenAI-compatible server, asked what transformers is asked."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cdistill.errors import InputError
from cdistill.models import readback
from cdistill.models.export_check import QUESTION, TOKENS, picture
from cdistill.models.load import Model

PACKAGE = "xllamacpp"
SIDE = 48  # of a square image, which llama.cpp resizes as transformers does
# How far log-probabilities of the likeliest first tokens may be from those of transformers.
FAR = {"f16": 0.5, "q8_0": 1.0, "q4_0": 3.0, "q4_k_m": 3.0}


class LlamaCpp:
    """The server on files that `export_gguf` wrote into a folder, in this process.

    Args:
        folder: with one ``model-*.gguf`` and at most one ``mmproj-*.gguf``.
        context: tokens of prompt and reply together.
        threads: of the processor.

    Raises:
        RuntimeError: llama.cpp does not load the files.
    """

    def __init__(self, folder: Path, *, context: int = 512, threads: int = 1) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(next(folder.glob("model-*.gguf")))
        for encoder in folder.glob("mmproj-*.gguf"):
            options.mmproj.path = str(encoder)
        options.n_ctx, options.n_parallel, options.port = context, 1, 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        options.warmup, options.verbosity = False, -1
        self.server = xllamacpp.Server(options)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, tokens: int, **options: Any) -> dict[str, Any]:
        """The greedy answer to messages with PIL images: its ``message``, ``usage``, ``timings``, and what ``options`` of
        the request ask for beside. Raises RuntimeError with what the server says instead."""
        asked = {"messages": [_message(message) for message in messages], "max_tokens": tokens, "temperature": 0}
        answer = self.server.handle_chat_completions(asked | options)
        if "choices" not in answer:
            raise RuntimeError(str(answer))
        return dict(answer["choices"][0], timings=answer["timings"], usage=answer["usage"])


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return dict(message, content=content if isinstance(content, str) else [_part(part) for part in content])


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    if part["type"] != "image":
        return part
    file = io.BytesIO()
    part["image"].save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def compare_answers(folder: Path, model: Model, speaker: Any, quantize: str) -> str:
    """Ask llama.cpp and a model the same question, about an image if it sees such; says how alike they are.

    Args:
        folder: the files.
        model: what they were made of, on the CPU.
        speaker: its processor, or the tokenizer of a text model, with a chat template.
        quantize: the number format of the files.

    Raises:
        ValueError: the prompts have not the same length, or the first token's log-probabilities are far from each other.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        return f"llama.cpp was not asked (pip install {PACKAGE})"
    sees = hasattr(model.config, "vision_config")
    images = [picture(0, SIDE, SIDE)] if sees else []
    inputs = readback.encode(speaker, QUESTION, images)
    length = inputs["input_ids"].shape[1]
    expected = readback.reply(model, inputs, TOKENS)
    shown = [{"type": "image", "image": Image.fromarray(pixels.numpy())} for pixels in images]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": QUESTION}]}]
    try:
        server = LlamaCpp(folder, context=length + 2 * TOKENS, threads=torch.get_num_threads())
        answer = server.chat(messages, tokens=TOKENS, logprobs=True, top_logprobs=3)
    except RuntimeError as error:
        raise InputError(f"output: llama.cpp cannot answer with it: {error}") from None
    made = answer["usage"]["prompt_tokens"]
    if made != length:
        raise InputError(f"output: llama.cpp makes {made} tokens of a prompt, of which transformers makes {length}")
    scores = torch.log_softmax(expected["logits"][0, -1].float(), -1)
    first = answer["logprobs"]["content"][0]["top_logprobs"]
    far = max(abs(float(scores[one["id"]]) - one["logprob"]) for one in first)
    if far > FAR[quantize]:
        raise InputError(f"output: llama.cpp answers as another model: log-probabilities differ by {far:.3g}")
    tokenizer = getattr(speaker, "tokenizer", speaker)
    reply = tokenizer.decode(expected["ids"][0, length:], skip_special_tokens=True)
    same = "the same reply" if reply.strip() == answer["message"]["content"].strip() else "another reply"
    return f"llama.cpp gives {same}, log-probabilities within {far:.2g}"
