"""Replies of a vLLM server that holds the student's weights, for on-policy distillation.

Before the replies of a step are asked for, the student is written to a folder that the server can read, as plain transformers
and vLLM load it, and the server takes it up. Requests hold tokens, so no template of the server's has a part in them, and
pictures, which its own processor prepares. The log-probabilities that come with a reply are compared with the student's: a
server with other weights or other pixels is found out.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from cdistill.choices import OnPolicyConfig
from cdistill.errors import InputError
from cdistill.files import building
from cdistill.models.export import can_merge_taf, merge_taf_map
from cdistill.models.folder import CONFIG, WEIGHTS, one_line, read_json
from cdistill.models.published import publish
from cdistill.models.taf import TAFLlavaForConditionalGeneration
from cdistill.runtime.collectives import on_first_process
from cdistill.runtime.errors import RunError
from cdistill.runtime.launch import quiet

SERVED = "served"  # folder of a run
RELOAD, GENERATE = "/collective_rpc", "/inference/v1/generate"
CACHES = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")  # of what older weights have made
START = "VLLM_SERVER_DEV_MODE=1 vllm serve {folder} --enable-scale-out --host {host} --port {port}"
MOST_APART = 0.1  # nats, mean over a reply's tokens: more than rounding, other kernels and pictures of 8 bits make
REFUSED = -100.0  # what is added to the logits of tokens that must not be said
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LONGEST = 200  # characters of what a server says


class Served(NamedTuple):
    """A reply: its tokens, with the one that ended it, and their log-probabilities."""

    tokens: list[int]
    log_probabilities: list[float]


class Prompt(NamedTuple):
    """What is asked for: tokens with those of images, pictures, tokens at most, and the seed of what is drawn."""

    ids: list[int]
    pictures: list[Image.Image]
    limit: int
    seed: int


class ReplyServer:
    """A vLLM server and the folder from which it takes the student.

    Args:
        url: http://HOST:PORT.
        folder: where the student is written; the server must see it by the same path.
        processor: the student's; a tokenizer where it sees no images.
        seconds: that the server is waited for, at the start and for a reply; 0 waits for ever.
        key: what errors name.

    Raises:
        ValueError: a URL that names no server.
    """

    def __init__(self, url: str, folder: Path, processor: Any, *, seconds: float, key: str) -> None:
        self.url, self.host, self.port = _place(url, key)
        self.folder, self.processor, self.key = folder.absolute(), processor, key
        self.seconds, self.begun = seconds or float("inf"), False
        self._images = getattr(processor, "image_processor", None)

    def require_servable(self, student: PreTrainedModel) -> None:
        """Raise ValueError for a student whose weights are not those of a checkpoint."""
        names = [name for name, _ in student.named_parameters()]
        for mark, what in (("lora_", "it has LoRA"), ("parametrizations", "its weights are rounded in training")):
            if any(mark in name for name in names):
                raise self.unfit(f"{what}, which a server does not take up")

    def take(self, student: PreTrainedModel) -> None:
        """Let the server take up the student's weights as they are now; all processes return when it has.

        Raises:
            ValueError: a student that cannot be served; a server that cannot be reached, or that refuses.
            RunError: it is gone later on.
        """
        on_first_process(lambda: self._take(student))
        self.begun = True

    def _take(self, student: PreTrainedModel) -> None:
        write_student(student, self.processor, self.folder, self.key)
        if not self.begun:
            self._wait()
        self._ask(RELOAD, {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}})
        for path in CACHES:
            self._ask(path, {})

    def replies(
        self,
        prompts: Sequence[Prompt],
        config: OnPolicyConfig,
        *,
        visual: set[int],
        stops: Sequence[int],
        refused: Sequence[int],
        vocabulary: int,
    ) -> list[Served]:
        """What the server answers, asked side by side.

        Args:
            prompts: with the tokens of all visual tokens that the student sees.
            config: temperature and top_p.
            visual: ids of visual tokens.
            stops: tokens that end a reply.
            refused: tokens that no reply may have, below ``vocabulary``, how many the student knows.

        Raises:
            RunError: the server is gone, slow or refuses, or answers what was not asked for.
        """
        sampling = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "stop_token_ids": list(stops),
            "logit_bias": {str(token): REFUSED for token in refused},
            "logprobs": 0,
        }

        barred = set(refused)

        def one(prompt: Prompt) -> Served:
            body: dict[str, Any] = {
                "token_ids": _once_a_picture(prompt.ids, visual, len(prompt.pictures)),
                "sampling_params": sampling | {"max_tokens": prompt.limit, "seed": prompt.seed},
            }
            if prompt.pictures:
                body["content_parts"] = [{"type": "image_url", "url": _data_url(x)} for x in prompt.pictures]
            return self._read(
                self._ask(GENERATE, body), prompt, lambda token: 0 <= token < vocabulary and token not in barred
            )

        with ThreadPoolExecutor(max(1, len(prompts))) as pool:
            return list(pool.map(one, prompts))

    def pictures(self, pixels: Tensor | None) -> list[Image.Image]:
        """The pictures that a processor has made ``pixels`` (N, 3, H, W) of, rounded to 8 bits a channel.

        Raises:
            ValueError: what is no picture, or a processor that makes other pixels of it.
        """
        if pixels is None:
            return []
        images = self._images
        if images is None or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise self.unfit(f"pixels of shape {tuple(pixels.shape)} are no pictures of three channels")
        step = float(images.rescale_factor) if getattr(images, "do_rescale", True) else 1.0
        normalised = getattr(images, "do_normalize", False)
        mean, std = (
            torch.tensor(value if normalised else plain).view(3, 1, 1)
            for value, plain in ((images.image_mean, [0.0] * 3), (images.image_std, [1.0] * 3))
        )
        pixels = pixels.float().cpu()
        levels = ((pixels * std + mean) / step).round().clamp(0, 255).to(torch.uint8)
        found = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in levels]
        again = images(images=found, return_tensors="pt")["pixel_values"]
        if again.shape != pixels.shape or ((again - pixels).abs() > 0.51 * step / std).any():
            raise self.unfit(f"{type(images).__name__} makes other pixels of a picture of {tuple(pixels.shape[2:])}")
        return found

    def compare(self, reply: Served, logits: Tensor) -> None:
        """Raise RunError for a reply whose log-probabilities are not those of the student's logits (T, V) for its tokens."""
        tokens = torch.tensor(reply.tokens, device=logits.device)
        own = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0].cpu()
        apart = float((own - torch.tensor(reply.log_probabilities)).abs().mean())
        if not apart <= MOST_APART:
            raise self._ended(
                f"answers with other log-probabilities than the student's ({apart:.2f} nats a token apart): it holds other "
                "weights, or processes them (--logprobs-mode)"
            )

    def _read(self, answer: Any, prompt: Prompt, allowed: Callable[[int], bool]) -> Served:
        try:
            choice, seen = answer["choices"][0], answer["usage"]["prompt_tokens"]
            tokens = [int(token) for token in choice["token_ids"]]
            found = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            raise self._ended(f"answers without tokens and log-probabilities: {str(answer)[:LONGEST]}") from None
        if seen != len(prompt.ids):
            raise self._ended(
                f"sees {seen} tokens of a prompt of {len(prompt.ids)}: its processor makes others of images"
            )
        if len(tokens) != len(found) or not 0 < len(tokens) <= prompt.limit or not all(map(allowed, tokens)):
            raise self._ended(f"answers what it was not asked for: {str(tokens)[:LONGEST]}")
        return Served(tokens, found)

    def _wait(self) -> None:
        """Wait for the server to be there; what starts it is said once."""
        start, told = time.monotonic(), False
        command = START.format(folder=self.folder, host=self.host, port=self.port)
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (OSError, HTTPException) as error:
                if time.monotonic() - start > self.seconds:
                    raise InputError(
                        f"{self.key}: {self.url} is not there ({one_line(error)}); start it by {command}"
                    ) from None
            if not told:
                print(f"waiting for {self.url}: {command}", flush=True)
            told = True
            time.sleep(min(1.0, self.seconds))

    def _ask(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(
                request, timeout=None if self.seconds == float("inf") else self.seconds
            ) as answer:
                text = answer.read()
            return json.loads(text) if text else {}
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(10 * LONGEST).decode(errors="replace").split())[:LONGEST]
            needed = {RELOAD: "VLLM_SERVER_DEV_MODE=1", GENERATE: "--enable-scale-out"}.get(path, "")
            hint = f"; start it with {needed}" if error.code in (403, 404, 405) and needed else ""
            raise self._ended(f"refuses {path} ({error.code}: {said}){hint}") from None
        except (OSError, HTTPException, ValueError) as error:  # gone, slow or cut off; what it says is no JSON
            raise self._ended(f"does not answer {path}: {one_line(error)}") from None

    def _ended(self, what: str) -> InputError | RunError:
        """An error of a server that has not been of use yet, or that was: then the run may go on later."""
        line = f"{self.key}: {self.url} {what}"
        return RunError(f"{line}; go on with --resume") if self.begun else InputError(line)

    def unfit(self, why: str) -> InputError:
        """The error of a student whose replies cannot be asked for."""
        return InputError(f"{self.key} must be left out for this student: {why}")


def write_student(student: PreTrainedModel, processor: Any, folder: Path, key: str) -> None:
    """Put a student into a folder, in the place of an older one, as vLLM and plain transformers load it.

    A linear TAF map is merged. The output layer is written by itself, also where it is the embedding: vLLM packs it when it
    takes up weights, and does not pack it anew for another embedding.

    Raises:
        ValueError: a folder that cannot be written.
    """
    model: PreTrainedModel = student
    if isinstance(student, TAFLlavaForConditionalGeneration):
        linear = student.config.taf_activation == "linear"
        model = merge_taf_map(student, student.dtype) if linear and can_merge_taf(student) else student
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with quiet(), building(folder) as part:
            model.save_pretrained(part, max_shard_size="10000GB")
            processor.save_pretrained(part)
            publish(part, key)
            _untie(part, key)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{key}: {folder} could not be written ({one_line(error)})") from None


def _untie(folder: Path, key: str) -> None:
    config, weights = read_json(folder / CONFIG, key), load_file(folder / WEIGHTS)
    place = next((name for name in weights if name.endswith(EMBEDDING)), None)
    if place is None or not config.get("tie_word_embeddings"):
        return
    weights[place.removesuffix(EMBEDDING) + HEAD] = weights[place].clone()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    for values in (config, config.get("text_config")):
        if values is not None:
            values["tie_word_embeddings"] = False
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _place(url: str, key: str) -> tuple[str, str, int]:
    """A URL without its last slash, its host and its port."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or parts.query or parts.fragment or parts.path not in ("", "/"):
        raise InputError(f"{key} must be http://HOST:PORT of a vLLM server, got {url!r}")
    return url.rstrip("/"), str(parts.hostname), port


def _once_a_picture(ids: Sequence[int], visual: set[int], pictures: int) -> list[int]:
    """Tokens with one for each picture in the place of its visual tokens, which the server puts there again."""
    count = sum(token in visual for token in ids)
    each = count // pictures if pictures else 0
    found, left = [], 0
    for token in ids:
        if token not in visual or not each:
            found.append(token)
            continue
        if left == 0:
            found.append(token)
        left = (left + 1) % each
    return found


def _data_url(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
