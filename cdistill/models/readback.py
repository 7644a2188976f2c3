"""What a process that knows nothing of this package makes of an exported folder: logits, greedy replies, prompts.

``python -P readback.py REQUESTS RESULTS`` loads folders by transformers' auto classes alone. The file needs torch, transformers
and PIL, of any age since transformers 4.51, so that it also runs where cdistill cannot be imported. REQUESTS and RESULTS are
files of ``torch.save``, lists of what `answer` takes and returns.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

MODELS = "AutoModelForImageTextToText", "AutoModelForCausalLM"  # with and without a vision encoder


def load_speaker(folder: str, multimodal: bool) -> Any:
    """The processor in a folder, or the tokenizer of a text model."""
    auto: Any = transformers.AutoProcessor if multimodal else transformers.AutoTokenizer
    return auto.from_pretrained(folder, local_files_only=True)


def encode(speaker: Any, question: str, images: list[Tensor]) -> dict[str, Tensor]:
    """Inputs (batch of 1) of a user's question about (H, W, 3) uint8 images, by the chat template if there is one."""
    pictures = [Image.fromarray(pixels.numpy()) for pixels in images]
    content: Any = [*({"type": "image"} for _ in images), {"type": "text", "text": question}] if images else question
    token = str(getattr(speaker, "image_token", ""))
    text = _prompt(speaker, content)
    if images and token not in text:  # a template of words alone
        text = _prompt(speaker, f"{token * len(images)}\n{question}")
    if pictures:
        return dict(speaker(text=[text], images=pictures, return_tensors="pt"))
    return dict(speaker(text=[text], return_tensors="pt"))


def _prompt(speaker: Any, content: Any) -> str:
    if getattr(speaker, "chat_template", None) is None:
        if isinstance(content, str):
            return content
        return "".join(part.get("text") or str(speaker.image_token) for part in content)
    messages = [{"role": "user", "content": content}]
    return str(speaker.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


@torch.no_grad()
def reply(model: Any, inputs: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Logits (B, T, vocabulary) of the inputs and the ids (B, at most T + ``tokens``) of the greedy replies."""
    known = inspect.signature(model.forward).parameters
    taken = _in_format_of(model, {name: value for name, value in inputs.items() if name in known})
    logits = model(**taken).logits.float()
    ids = model.generate(**taken, max_new_tokens=tokens, do_sample=False) if tokens else inputs["input_ids"]
    return {"logits": logits, "ids": ids}


def _in_format_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def load(folder: str, code: bool) -> tuple[Any, dict[str, list[str]], bool]:
    """The model in a folder by an auto class, eager and in the number format of its files; what did not fit; multimodal."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": code}
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    multimodal = hasattr(config, "vision_config")
    auto = getattr(transformers, MODELS[0] if multimodal else MODELS[1])
    number_format = "torch_dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56) else "dtype"
    options |= {number_format: "auto", "attn_implementation": "eager", "output_loading_info": True}
    model, info = auto.from_pretrained(folder, **options)
    wrong = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return model.eval(), wrong, multimodal


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What this process makes of a folder.

    A request has ``folder``, ``code`` (whether its code may run), ``cdistill`` (whether it is imported first), ``tokens`` (of a
    reply), ``threads`` and ``prompts``: each has ``inputs``, ``question`` and ``images``. The result has the class, the number
    format and the transformers version, names of weights that do not fit, and for each prompt what `reply` makes of the inputs
    and what `encode` makes of the question, ``processed``, with the ids of the reply to that, ``own_ids``; or ``why`` there is
    none (no processor loads, or no prompt has a question). Of a folder that cannot be loaded or run it has the ``error`` and
    the version alone.
    """
    torch.set_num_threads(request["threads"])
    if request["cdistill"]:  # whose auto classes load TAF students
        import cdistill  # noqa: F401
    try:
        return _answer(request)
    except Exception as error:
        return {"version": transformers.__version__, "error": _said(error)}


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    folder, version = request["folder"], transformers.__version__
    model, wrong, multimodal = load(folder, request["code"])
    result = {"class": type(model).__name__, "dtype": str(model.dtype), "version": version, **wrong}
    speaker, why = None, "no question"
    if any(prompt["question"] for prompt in request["prompts"]):
        try:
            speaker = load_speaker(folder, multimodal)
        except Exception as error:
            why = _said(error)
    replies = []
    for prompt in request["prompts"]:
        one: dict[str, Any] = dict(reply(model, prompt["inputs"], request["tokens"]))
        if speaker is None:
            one["why"] = why
        else:
            one["processed"] = encode(speaker, prompt["question"], prompt["images"])
            own = _in_format_of(model, one["processed"])  # as a user would, whatever the processor gives
            one["own_ids"] = model.generate(**own, max_new_tokens=request["tokens"], do_sample=False)
        replies.append(one)
    return {**result, "replies": replies}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    torch.save([answer(request) for request in torch.load(sys.argv[1])], sys.argv[2])
