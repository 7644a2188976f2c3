"""The program of a process with vLLM: answers a request in a JSON file, greedily, and writes JSON.

``python _vllm_worker.py REQUEST ANSWER``, by the Python of `make vllm-env`. The request has a model's folder, conversations
for `LLM.chat` (images as data URLs), how many tokens a reply may have, and how many are timed.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def main() -> None:
    """Answer the request."""
    from vllm import LLM, SamplingParams, __version__

    request = json.loads(Path(sys.argv[1]).read_text())
    model = LLM(
        request["folder"],
        dtype="float32",
        max_model_len=request["length"],
        enforce_eager=True,
        limit_mm_per_prompt={"image": 2},
        generation_config="vllm",
    )
    greedy = SamplingParams(temperature=0, max_tokens=request["tokens"])
    found = model.chat(request["conversations"], greedy)
    replies = [{"prompt": len(x.prompt_token_ids), "ids": list(x.outputs[0].token_ids)} for x in found]
    rates = []
    for _ in range(request["tries"]):
        seconds = []
        for tokens in (1, request["timed"] + 1):  # the first is made with the prompt
            timed = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
            start = time.perf_counter()
            model.chat(request["conversations"][:1], timed)
            seconds.append(time.perf_counter() - start)
        rates.append(request["timed"] / (seconds[1] - seconds[0]))
    answer = {"version": __version__, "replies": replies, "tokens_per_second": max(rates)}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
