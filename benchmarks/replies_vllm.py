"""Replies of a vLLM server to a student whose weights change, beside the student's own.

`make vllm-env && python -m benchmarks.replies_vllm` starts vLLM on the CPU with the built-in teacher as the student (with heads
twice as wide, see `serve_vllm`), moves every weight at every step, and has the server take it up. It writes
benchmarks/results/serve/vllm_replies.json: how many greedy replies are the student's own, how far log-probabilities of drawn
replies are from the student's, and seconds. The command ends with 1 where a step's replies are not the student's.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks._serving import THREADS, write_rows
from benchmarks.serve_vllm import PYTHON, wider
from cdistill.builtin.dataset import BuiltinDataset, Collator, build_tokenizer
from cdistill.builtin.task import BuiltinTask
from cdistill.choices import OnPolicyConfig
from cdistill.models.export import export
from cdistill.models.load import load_model
from cdistill.models.processor import load_processor
from cdistill.train.reply_server import ReplyServer, Served, write_student
from cdistill.train.rollout import CountingCollator, Rollouts

STEPS, SAMPLES, MOVED = 5, 16, 0.2  # a step moves weights by this share of their standard deviation
LEAST_SAME = 0.9  # of greedy replies: pictures are rounded to 8 bits for the server, which turns near ties
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--limit-mm-per-prompt", '{"image": 2}')
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


@contextmanager
def vllm(folder: Path, scratch: Path) -> Iterator[str]:
    """A server's URL. Its build for CPUs has the metadata of another name than the one that it asks for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = scratch / "names/vllm-0.32.0.dist-info"
    named.mkdir(parents=True)
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--enable-scale-out", *OPTIONS]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(named.parent)}
    with (scratch / "log").open("w") as log:
        server = subprocess.Popen(
            [*map(str, command), "--port", str(port)], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def main() -> int:
    """Ask, compare, and write the table."""
    if not PYTHON.exists():
        print("benchmarks.replies_vllm needs vLLM: make vllm-env", file=sys.stderr)
        return 2
    torch.set_num_threads(THREADS)
    tokenizer = build_tokenizer()
    data = BuiltinDataset(BuiltinTask(turns=2, caption=1.0), size=STEPS * SAMPLES, seed=11)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        plain = export("builtin:teacher", scratch / "plain").folder
        student, processor = wider(load_model(plain).eval()), load_processor(plain, "model")
        write_student(student, processor, scratch / "first", "student")
        with vllm(scratch / "first", scratch) as url:
            rows = list(steps(student, processor, tokenizer, data, url, scratch))
    for row in rows:
        print(row, flush=True)
    write_rows("vllm_replies.json", rows)
    return int(any(row["same_greedy"] < LEAST_SAME * SAMPLES for row in rows))


class Noting(ReplyServer):
    """Notes how far the log-probabilities of replies are from the student's."""

    apart: list[float]

    def compare(self, reply: Served, logits: torch.Tensor) -> None:
        own = logits.log_softmax(-1)[torch.arange(len(reply.tokens)), torch.tensor(reply.tokens)]
        self.apart.append(float((own - torch.tensor(reply.log_probabilities)).abs().mean()))
        super().compare(reply, logits)


def steps(student: Any, processor: Any, tokenizer: Any, data: Any, url: str, scratch: Path) -> Iterator[dict[str, Any]]:
    """A row for each step; a server whose log-probabilities are not the student's ends it (`ReplyServer.compare`)."""
    collate = CountingCollator(Collator(tokenizer.pad_token_id))
    apart: list[float] = []
    server = Noting(url, scratch / "served", processor, seconds=300, key="vllm_server")
    server.apart = apart
    drawn, greedy = (OnPolicyConfig(on_policy=1.0, temperature=t, max_new_tokens=48) for t in (1.0, 0.0))
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        if step:
            with torch.no_grad():
                for x in student.parameters():
                    x += MOVED * x.std(correction=0) * torch.randn(x.shape, generator=generator)
        batch = collate([data[step * SAMPLES + i] for i in range(SAMPLES)])
        asked, seconds = [], {}
        apart.clear()
        for config in (greedy, drawn):
            served = Rollouts(student, tokenizer, config, seed=step, server=server)
            start = time.perf_counter()
            served.begin_step()
            seconds["taking up"] = time.perf_counter() - start
            start = time.perf_counter()
            served(batch, step * SAMPLES)
            seconds[f"vLLM, temperature {config.temperature:g}"] = time.perf_counter() - start
            own = Rollouts(student, tokenizer, config, seed=step)
            own.pads = True
            start = time.perf_counter()
            own(batch, step * SAMPLES)
            seconds[f"transformers, temperature {config.temperature:g}"] = time.perf_counter() - start
            asked.append(([x.tokens for x in served.replies], [x.tokens for x in own.replies]))
        yield {
            "model": "builtin:teacher, heads of 32",
            "step": step,
            "replies": SAMPLES,
            "tokens": statistics.mean(len(x) for x in asked[0][0]),
            "same_greedy": sum(a == b for a, b in zip(*asked[0], strict=True)),
            "nats_apart": max(apart),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }


if __name__ == "__main__":
    sys.exit(main())
