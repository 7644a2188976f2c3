"""Exported students as other engines serve them: the same replies, accuracy, speed and size, each format beside transformers.

`python -m benchmarks.serve_llama_cpp [MODEL ...]` (by default the built-in teacher) exports each model in every format of
`export_gguf`, puts 50 held-out questions of each kind about an image to llama.cpp's own OpenAI-compatible server (the package
xllamacpp) and to transformers in fp32, both greedy, and writes benchmarks/results/serve/llama_cpp.json. It ends with 1 where
f16 does not give transformers' reply to every one of 50 questions, or q8_0 is more than a point less accurate.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks._results import version
from benchmarks._serving import EACH, THREADS, questions, right, write_rows
from cdistill.builtin.task import SUBTYPES
from cdistill.models.export import export
from cdistill.models.gguf import QUANTIZE, export_gguf
from cdistill.models.gguf.asking import LlamaCpp
from cdistill.models.load import load_model
from cdistill.models.processor import load_processor

COMPARED = 50  # questions whose replies are compared, of all kinds in turn
MOST_TOKENS = 12  # of a reply
LONG, TRIES = 128, 3  # tokens of a reply that is timed, and how often
Ask = Callable[[list[dict[str, Any]]], str]


def size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def by_transformers(folder: Path) -> tuple[Ask, Callable[[int], None]]:
    """What asks a folder's model in fp32, greedy, and what lets it write a long reply."""
    model = load_model(folder, "model", attention="sdpa").eval()
    processor = load_processor(folder, "model")

    def inputs(messages: list[dict[str, Any]]) -> Any:
        return processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    @torch.no_grad()
    def ask(messages: list[dict[str, Any]]) -> str:
        given = inputs(messages)
        ids = model.generate(**given, max_new_tokens=MOST_TOKENS, do_sample=False)[0, given["input_ids"].shape[1] :]
        return str(processor.decode(ids, skip_special_tokens=True)).strip()

    @torch.no_grad()
    def write(threads: int) -> None:
        torch.set_num_threads(threads)
        model.generate(**inputs(next(questions())[0]), max_new_tokens=LONG, min_new_tokens=LONG, do_sample=False)
        torch.set_num_threads(1)

    return ask, write


def by_llama_cpp(folder: Path) -> tuple[Ask, Callable[[int], None]]:
    """The same of llama.cpp's server, by requests with an image."""
    servers = {threads: LlamaCpp(folder, threads=threads) for threads in (1, THREADS)}

    def ask(messages: list[dict[str, Any]]) -> str:
        return str(servers[1].chat(messages, tokens=MOST_TOKENS)["message"]["content"]).strip()

    def write(threads: int) -> None:
        servers[threads].chat(next(questions())[0], tokens=LONG, ignore_eos=True, cache_prompt=False)

    return ask, write


def speeds(write: Callable[[int], None]) -> dict[str, int]:
    """Tokens a second of a reply of `LONG` tokens to an image and a question, which is read first."""
    seconds, processor_seconds = [], []
    for _ in range(TRIES):
        start = time.perf_counter()
        write(THREADS)
        seconds.append(time.perf_counter() - start)
        start = time.process_time()
        write(1)
        processor_seconds.append(time.process_time() - start)
    return {
        f"tokens_per_second_{THREADS}_threads": round(LONG / min(seconds)),
        "tokens_per_processor_second_1_thread": round(LONG / min(processor_seconds)),
    }


def measure(ask: Ask, write: Callable[[int], None], expected: list[str] | None) -> tuple[dict[str, Any], list[str]]:
    """One row of the table, and the replies."""
    replies, hits = [], 0
    for messages, answer in questions():
        replies.append(ask(messages))
        hits += right(replies[-1], answer)
    row = {"accuracy": hits / len(replies), "questions": len(replies)}
    if expected is not None:
        same = [a == b for a, b in zip(replies, expected, strict=True)]
        row |= {"same_replies_of_50": sum(same[:COMPARED]), "same_replies": sum(same)}
    return row | speeds(write), replies


def rows(model: str, scratch: Path) -> Iterator[dict[str, Any]]:
    """A model in transformers and in every format for llama.cpp."""
    plain = export(model, scratch / "plain").folder
    found, expected = measure(*by_transformers(plain), None)
    engine = {"engine": f"transformers {version('transformers')}", "format": "safetensors, fp32"}
    yield {"model": model, **engine, **found, "bytes": size(plain, "*.safetensors")}
    for quantize in QUANTIZE:
        made = export_gguf(model, scratch / quantize, quantize=quantize, check=True)
        found, _ = measure(*by_llama_cpp(made.folder), expected)
        engine = {"engine": f"llama.cpp (xllamacpp {version('xllamacpp')})", "format": f"gguf, {quantize}"}
        yield {"model": model, **engine, **found, "bytes": size(made.folder, "*.gguf"), "merged": made.merged}


def table(found: list[dict[str, Any]]) -> str:
    """The rows as the documents show them."""
    lines = [
        "| model | engine | format | same replies of 50 | accuracy | tokens/s | of one core's own time | MB |",
        "| --- | --- | --- " + "| ---: " * 5 + "|",
    ]
    for row in found:
        cells = (
            row["model"],
            row["engine"],
            row["format"],
            row.get("same_replies_of_50", "-"),
            f"{100 * row['accuracy']:.1f} %",
            f"{row[f'tokens_per_second_{THREADS}_threads']:,}",
            f"{row['tokens_per_processor_second_1_thread']:,}",
            f"{row['bytes'] / 1e6:.2f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    torch.set_num_threads(1)  # models this small answer no sooner on more
    found: list[dict[str, Any]] = []
    good = True
    for model in sys.argv[1:] or ["builtin:teacher"]:
        with tempfile.TemporaryDirectory() as name:
            for row in rows(model, Path(name)):
                found.append(row)
                print(row, flush=True)
                own = next(other["accuracy"] for other in found if other["model"] == model)
                good &= "f16" not in row["format"] or row["same_replies_of_50"] == COMPARED
                good &= "q8_0" not in row["format"] or row["accuracy"] >= own - 0.01
    asked = f"{EACH} held-out ones of each of {len(SUBTYPES)} kinds, greedy; speeds: {LONG} tokens, best of {TRIES}"
    write_rows("llama_cpp.json", found, questions=asked)
    print(table(found))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
