"""Exported students in vLLM: the same replies as transformers, alone and in batches, with one image, two and none.

`make vllm-env && python -m benchmarks.serve_vllm RUN` serves the built-in teacher, which is a stock LLaVA, and a TAF student
(the result of a run such as `cdistill demo` leaves in runs/demo/compodistill) merged and as it was trained, and writes
benchmarks/results/serve/vllm.json. vLLM's attention on CPUs takes no heads of 16 channels, which the built-in models have: they
are served with heads of 32, half of whose channels are zero, and as Llamas, whose heads may have any size. That is the same
function (`wider`), and transformers answers by it, too. The command ends with 1 where a reply differs.
"""

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from benchmarks._results import ROOT
from benchmarks._serving import THREADS, ask_elsewhere, by_transformers, compared, conversations, write_rows
from cdistill.models.export import export
from cdistill.models.load import Model, load_model, resolve_folder
from cdistill.models.processor import load_processor

PYTHON = ROOT / ".venv-vllm/bin/python"
WORKER = Path(__file__).with_name("_vllm_worker.py")
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


def serve(reference: str, *, merge_taf: bool, scratch: Path) -> dict[str, Any]:
    """One row: a model in vLLM beside transformers."""
    plain = export(reference, scratch / "plain", merge_taf=merge_taf).folder
    model, processor = wider(load_model(plain).eval()), load_processor(plain, "model")
    model.save_pretrained(scratch / "wide")
    processor.save_pretrained(scratch / "wide")
    folder = export(scratch / "wide", scratch / "served", merge_taf=merge_taf).folder
    asked, answers = conversations()
    expected = by_transformers(model, processor, asked)
    answer = ask_elsewhere(PYTHON, WORKER, folder, asked, scratch)
    return {
        "model": reference,
        "class": type(model).__name__,
        "engine": f"vLLM {answer['version']}",
        "format": "safetensors, fp32",
        **compared(answer, expected, answers, processor),
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
    write_rows("vllm.json", rows)
    return int(any(row["same_replies"] < row["conversations"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
