"""llama.cpp itself: its OpenAI-compatible server on exported files, in this process."""

import base64
import io
import json
import urllib.request
from pathlib import Path

import xllamacpp


class LlamaCpp:
    """The server on the files that `export_gguf` wrote into a folder, on one thread."""

    def __init__(self, folder: Path, *, context: int = 512, threads: int = 1) -> None:
        options = xllamacpp.CommonParams()
        options.model.path = str(next(folder.glob("model-*.gguf")))
        encoder = list(folder.glob("mmproj-*.gguf"))
        if encoder:
            options.mmproj.path = str(encoder[0])
        options.n_ctx, options.n_parallel, options.port = context, 1, 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        options.warmup, options.verbosity = False, -1
        self.server = xllamacpp.Server(options)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, special ones among them, without those that begin or end every text."""
        return self._post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]

    def chat(self, messages, *, tokens: int, **options) -> dict:
        """The choice of a request with PIL images, greedy: its message, and what ``options`` ask for beside."""
        request = {"messages": [_message(message) for message in messages], "max_tokens": tokens, "temperature": 0}
        answer = self.server.handle_chat_completions(request | options)
        assert "choices" in answer, answer
        return answer["choices"][0] | {"timings": answer["timings"], "usage": answer["usage"]}

    def _post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def _message(message):
    if isinstance(message["content"], str):
        return message
    return message | {"content": [_part(part) for part in message["content"]]}


def _part(part):
    if part["type"] != "image":
        return part
    file = io.BytesIO()
    part["image"].save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()},
    }
