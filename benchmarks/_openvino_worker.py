"""The program of a process with optimum-intel: answers a request as `_vllm_worker` does, one conversation at a time."""

import base64
import io
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Answer the request."""
    from optimum.intel import OVModelForVisualCausalLM
    from PIL import Image
    from transformers import AutoProcessor

    request = json.loads(Path(sys.argv[1]).read_text())
    hints = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    model = OVModelForVisualCausalLM.from_pretrained(request["folder"], device="CPU", ov_config=hints)
    processor = AutoProcessor.from_pretrained(request["folder"])

    def given(messages):
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image_url":
                    data = base64.b64decode(part.pop("image_url")["url"].partition(",")[2])
                    part |= {"type": "image", "image": Image.open(io.BytesIO(data))}
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template(messages, **options)

    replies, first = [], None
    for messages in request["conversations"]:
        inputs = given(messages)
        first = first or inputs
        prompt = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=request["tokens"], do_sample=False)[0]
        replies.append({"prompt": prompt, "ids": ids[prompt:].tolist()})
    rates = []
    for _ in range(request["tries"]):
        seconds = []
        for tokens in (1, request["timed"] + 1):  # the first is made with the prompt
            start = time.perf_counter()
            model.generate(**first, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            seconds.append(time.perf_counter() - start)
        rates.append(request["timed"] / (seconds[1] - seconds[0]))
    answer = {"version": version("openvino"), "replies": replies, "tokens_per_second": max(rates)}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
