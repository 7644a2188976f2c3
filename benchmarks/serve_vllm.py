"""Exported students in vLLM: the same replies as transformers, alone and in batches, with one image, two and none.

`make vllm-env && python -m benchmarks.serve_vllm RUN` serves the built-in teacher, which is a stock LLaVA, and a TAF student
(the result of a run such as `cdistill demo` leaves in runs/demo/compodistill) merged and as it was trained, and writes
benchmarks/results/serve/vllm.json. vLLM's attention on CPUs takes no heads of 16 channels, which the built-in models have: they
are served with heads of 32, half of whose channels are zero, and as Llamas, whose heads may have any size. That is the same
function (`wider`), and transformers answers by it, too. The command ends with 1 where a reply differs.
"""

import base64
import io
import json
import math
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import LlamaConfig

import cdistill
from benchmarks._results import ROOT, cpu_environment, results_folder
from benchmarks._serving import questions, right
from cdistill.models.export import export
from cdistill.models.load import Model, load_model, resolve_folder
from cdistill.models.processor import load_processor

PYTHON = ROOT / ".venv-vllm/bin/python"
WORKER = Path(__file__).with_name("_vllm_worker.py")
ASKED, PAIRS, PLAIN = 350, 25, 25  # conversations with an image, with two, and with words alone
MOST_TOKENS, LONG, TRIES = 12, 128, 5  # of a reply; of one that is timed, and how often
THREADS = 2
KEPT = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


@torch.no_grad()
def wider(model: Model) -> Model:
    """A LLaVA of Qwen2 as one of Llama with heads twice as wide, which computes the same.

    Channel i of a head goes to 2i in both halves that RoPE turns against each other, where the frequency is the same. Scores
    are divided by the root of a width that is twice as large, so queries are made longer.
    """
    text = model.config.text_config
    width = text.hidden_size // text.num_attention_heads
    place = torch.cat([2 * torch.arange(width // 2), width + 2 * torch.arange(width // 2)])

    def rows(linear: nn.Linear, factor: float) -> nn.Linear:
        heads = linear.out_features // width
        new = nn.Linear(linear.in_features, 2 * linear.out_features)
        new.weight.zero_().unflatten(0, (heads, 2 * width))[:, place] = factor * linear.weight.unflatten(
            0, (heads, width)
        )
        new.bias.zero_().unflatten(0, (heads, 2 * width))[:, place] = factor * linear.bias.unflatten(0, (heads, width))
        return new

    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        out, heads = attention.o_proj, attention.o_proj.in_features // width
        attention.q_proj = rows(attention.q_proj, math.sqrt(2.0))
        attention.k_proj, attention.v_proj = rows(attention.k_proj, 1.0), rows(attention.v_proj, 1.0)
        new = nn.Linear(2 * out.in_features, out.out_features)
        new.weight.zero_().unflatten(1, (heads, 2 * width))[:, :, place] = out.weight.unflatten(1, (heads, width))
        new.bias.zero_()
        attention.o_proj = new
    config = model.config
    config.text_config = LlamaConfig(
        **{name: getattr(text, name) for name in KEPT}, attention_bias=True, head_dim=2 * width
    )
    with torch.device("meta"):
        result = type(model)(config)
    result.load_state_dict(model.state_dict(), assign=True)
    result.tie_weights()
    result.generation_config = model.generation_config
    return load_rotary(result)


def load_rotary(model: Model) -> Model:
    """The model with the buffers that are in no state dict, read back from a folder."""
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        return load_model(name).eval()


def conversations() -> tuple[list[list[dict[str, Any]]], list[str]]:
    """Questions about an image with their answers, then about two images and about none."""
    asked = list(questions())[:ASKED]
    images = [message["content"][0] for (message,), _ in asked]
    words = [message["content"][1] for (message,), _ in asked]
    more = [[{"role": "user", "content": [images[i], images[-1 - i], words[i]]}] for i in range(PAIRS)]
    more += [[{"role": "user", "content": [words[i]]}] for i in range(PLAIN)]
    return [messages for messages, _ in asked] + more, [answer for _, answer in asked]


def as_request(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation as servers take it: images as data URLs."""

    def part(value: dict[str, Any]) -> dict[str, Any]:
        if value["type"] != "image":
            return value
        file = io.BytesIO()
        image: Image.Image = value["image"]
        image.save(file, format="PNG")
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
        }

    return [{**message, "content": [part(value) for value in message["content"]]} for message in messages]


@torch.no_grad()
def by_transformers(model: Model, processor: Any, asked: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Greedy replies, one conversation at a time."""
    found = []
    for messages in asked:
        given = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**given, max_new_tokens=MOST_TOKENS, do_sample=False)[0]
        prompt = given["input_ids"].shape[1]
        found.append({"prompt": prompt, "ids": ids[prompt:].tolist()})
    return found


def by_vllm(folder: Path, asked: list[list[dict[str, Any]]], scratch: Path) -> dict[str, Any]:
    """What a process with vLLM answers to all of them at once."""
    request = {
        "folder": str(folder),
        "length": 512,
        "tokens": MOST_TOKENS,
        "timed": LONG,
        "tries": TRIES,
        "conversations": [as_request(messages) for messages in asked],
    }
    (scratch / "request.json").write_text(json.dumps(request))
    subprocess.run([PYTHON, WORKER, scratch / "request.json", scratch / "answer.json"], check=True, cwd=scratch)
    answer: dict[str, Any] = json.loads((scratch / "answer.json").read_text())
    return answer


def serve(reference: str, *, merge_taf: bool, scratch: Path) -> dict[str, Any]:
    """One row: a model in vLLM beside transformers."""
    plain = export(reference, scratch / "plain", merge_taf=merge_taf).folder
    model, processor = wider(load_model(plain).eval()), load_processor(plain, "model")
    model.save_pretrained(scratch / "wide")
    processor.save_pretrained(scratch / "wide")
    folder = export(scratch / "wide", scratch / "served", merge_taf=merge_taf).folder
    asked, answers = conversations()
    expected = by_transformers(model, processor, asked)
    answer = by_vllm(folder, asked, scratch)
    same = [a == b for a, b in zip(answer["replies"], expected, strict=True)]
    replies = [processor.decode(x["ids"], skip_special_tokens=True).strip() for x in answer["replies"]]
    hits = sum(map(right, replies, answers))
    return {
        "model": reference,
        "class": type(model).__name__,
        "engine": f"vLLM {answer['vllm']}",
        "format": "safetensors, fp32",
        "same_replies_of_50": sum(same[:50]),
        "same_replies": sum(same),
        "conversations": len(same),
        "two_images": sum(same[ASKED : ASKED + PAIRS]),
        "words_alone": sum(same[ASKED + PAIRS :]),
        "accuracy": hits / len(answers),
        "tokens_per_second": round(answer["tokens_per_second"]),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


def main() -> int:
    """Serve them, and write the table."""
    if not PYTHON.exists():
        print("benchmarks.serve_vllm needs vLLM: make vllm-env", file=sys.stderr)
        return 2
    torch.set_num_threads(THREADS)
    rows = []
    jobs = [("builtin:teacher", True)] + [(name, merged) for name in sys.argv[1:] for merged in (True, False)]
    for reference, merged in jobs:
        resolve_folder(reference, "model")
        with tempfile.TemporaryDirectory() as name:
            rows.append(serve(reference, merge_taf=merged, scratch=Path(name)))
        print(rows[-1], flush=True)
    data = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **cpu_environment(),
        "threads": THREADS,
        "cdistill": cdistill.__version__,
        "rows": rows,
    }
    path = results_folder() / "serve" / "vllm.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    return int(any(row["same_replies"] < row["conversations"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
