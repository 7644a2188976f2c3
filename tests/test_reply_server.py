"""Replies of a server: those that the student gives itself, asked of what stands in for vLLM, and every way in which it fails.

The stand-in is plain transformers behind vLLM's three addresses; benchmarks/replies_vllm.py asks the real one.
"""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builtin_models import recipe_values
from PIL import Image
from test_rollout import GREEDY, scenes
from test_train_stages import metrics
from transformers import AutoProcessor

from cdistill.models.load import load_model
from cdistill.runtime.errors import RunError
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.recipes import recipe_from_dict
from cdistill.train.reply_server import ReplyServer
from cdistill.train.rollout import Rollouts

KEY = "stage.opd.generation.vllm_server"


class StandIn(BaseHTTPRequestHandler):
    """vLLM's addresses; what it does wrong is an attribute of the server."""

    def do_GET(self):
        self.answer(200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault, server = self.server.fault, self.server
        server.asked.append(self.path)
        if self.path == "/collective_rpc" and server.asked.count(self.path) == server.fails_at:
            return self.answer(500, {"error": {"message": "the engine has ended"}})
        if self.path in server.closed:
            return self.answer(server.closed[self.path], {"error": {"message": "disabled"}})
        if self.path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            if fault != "stale" or server.model is None:
                folder = body["kwargs"]["weights_path"]
                server.model, server.processor = load_model(folder).eval(), AutoProcessor.from_pretrained(folder)
            return self.answer(200, {"results": [None]})
        if self.path != "/inference/v1/generate":
            return self.answer(200, {})
        if fault == "slow":
            time.sleep(1.0)
        with server.lock:
            return self.answer(200, self.generated(body, fault))

    def generated(self, body, fault):
        processor, asked = self.server.processor, body["sampling_params"]
        pictures = [
            Image.open(io.BytesIO(base64.b64decode(part["url"].partition(",")[2])))
            for part in body.get("content_parts", [])
        ]
        inputs = {"input_ids": torch.tensor([body["token_ids"]])}
        if pictures:
            text = processor.tokenizer.decode(body["token_ids"])
            inputs = dict(processor(text=[text], images=pictures, add_special_tokens=False, return_tensors="pt"))
        biases = {(int(token),): bias for token, bias in asked["logit_bias"].items()}
        made = self.server.model.generate(
            **{n: x for n, x in inputs.items() if n in ("input_ids", "pixel_values")},
            max_new_tokens=asked["max_tokens"],
            do_sample=False,
            sequence_bias=biases,
            eos_token_id=asked["stop_token_ids"],
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        seen = inputs["input_ids"].shape[1]
        tokens = made.sequences[0, seen:].tolist()
        found = [float(step[0].log_softmax(-1)[token]) for step, token in zip(made.logits, tokens, strict=True)]
        if fault == "lies":
            found = [x - 1.0 for x in found]
        if fault == "special":
            tokens[0] = min(int(token) for token in asked["logit_bias"])
        if fault == "long":
            tokens, found = tokens * 9, found * 9
        if fault == "unknown":
            tokens[0] = 10**9
        if fault == "empty":
            return {"choices": []}
        entries = [{"token_id": t, "logprob": x} for t, x in zip(tokens, found, strict=True)]
        return {
            "usage": {"prompt_tokens": seen + (fault == "images")},
            "choices": [{"token_ids": tokens, "logprobs": {"content": entries}}],
        }

    def answer(self, status, body):
        text = json.dumps(body).encode() if self.server.fault != "no JSON" or self.command == "GET" else b"<html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(text) + 9 * (self.server.fault == "cut")))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def running():
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        server.lock, server.model, server.url = threading.Lock(), None, f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running):
    running.fault, running.closed, running.asked, running.fails_at = "", {}, [], None
    return running


@pytest.fixture(scope="module")
def student(models, tmp_path_factory):
    """A TAF student of the built-in pair, what makes its tokens and pixels, and its tokenizer."""
    built = build_models(recipe_from_dict(recipe_values(tmp_path_factory.mktemp("of") / "unused", models)))
    return built.student, built.processor, built.tokenizer


def rollouts_of(student, server, folder, config=GREEDY, seconds=30.0):
    model, processor, tokenizer = student
    asked = ReplyServer(server.url, folder / "served", processor, seconds=seconds, key=KEY)
    return Rollouts(model, tokenizer, config, seed=5, server=asked)


def test_a_server_answers_as_the_student_itself(student, server, tmp_path):
    batch, _ = scenes()
    model, _, tokenizer = student
    model.train()
    with pytest.raises(ValueError, match="a server must take up the student before it answers"):
        rollouts_of(student, server, tmp_path)(batch, 40)
    wanted, served = Rollouts(model, tokenizer, GREEDY, seed=5), rollouts_of(student, server, tmp_path)
    for shift in (0.0, 0.3):  # weights of another step
        with torch.no_grad():
            model.lm_head.weight.add_(shift * torch.randn(model.lm_head.weight.shape))
        served.begin_step()
        made, again = served(batch, 40), wanted(batch, 40)
        assert made.keys() == again.keys() and all(torch.equal(made[name], again[name]) for name in again)
        assert model.training and model.model.vision_tower.training
    assert server.asked.count("/reset_prefix_cache") == server.asked.count("/reset_encoder_cache") == 2
    kept = json.loads((tmp_path / "served/config.json").read_text())
    assert not kept["tie_word_embeddings"]


@pytest.mark.parametrize(
    "fault, said",
    [
        (
            "lies",
            r"answers with other log-probabilities than the student's \(1\.\d\d nats a token apart\): it holds other",
        ),
        ("special", "answers what it was not asked for"),
        ("long", "answers what it was not asked for"),
        ("images", r"sees \d+ tokens of a prompt of \d+: its processor makes others of images"),
        ("unknown", "answers what it was not asked for"),
        ("cut", "does not answer /inference/v1/generate: IncompleteRead"),
        ("empty", "answers without tokens and log-probabilities"),
        ("no JSON", "does not answer /inference/v1/generate"),
        ("slow", "does not answer /inference/v1/generate: timed out"),
    ],
)
def test_a_server_that_lies_is_slow_or_strange_ends_the_run(student, server, tmp_path, fault, said):
    served = rollouts_of(student, server, tmp_path)
    served.begin_step()
    server.fault, served.server.seconds = fault, 0.2 if fault == "slow" else 30.0
    with pytest.raises(RunError, match=f"{KEY}: {server.url} {said}") as error:
        served(scenes()[0], 40)
    assert str(error.value).endswith("; go on with --resume") and "\n" not in str(error.value)


def test_a_server_that_keeps_older_weights_is_found_out(student, server, tmp_path):
    model, served = student[0], rollouts_of(student, server, tmp_path)
    served.begin_step()
    server.fault = "stale"
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    served.begin_step()
    with pytest.raises(RunError, match="it holds other weights"):
        served(scenes()[0], 40)


@pytest.mark.parametrize(
    "path, status, hint",
    [
        ("/collective_rpc", 404, "start it with VLLM_SERVER_DEV_MODE=1"),
        ("/inference/v1/generate", 403, "start it with --enable-scale-out"),
        ("/inference/v1/generate", 500, "go on with --resume"),
    ],
)
def test_a_server_that_refuses_says_what_it_lacks(student, server, tmp_path, path, status, hint):
    served = rollouts_of(student, server, tmp_path)
    server.closed = {path: status}
    with pytest.raises(
        ValueError if path == "/collective_rpc" else RunError, match=f"refuses {path} .{status}: .*{hint}"
    ):
        served.begin_step()
        served(scenes()[0], 40)


def test_a_server_that_is_not_there_is_waited_for(student, server, tmp_path, capsys):
    served = rollouts_of(student, server, tmp_path, seconds=0.1)
    served.server.url = "http://127.0.0.1:9"
    with pytest.raises(
        ValueError, match=f"{KEY}: http://127.0.0.1:9 is not there .*start it by VLLM_SERVER_DEV_MODE=1 vllm"
    ):
        served.begin_step()
    assert f"vllm serve {tmp_path / 'served'} --enable-scale-out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a:1", "http://", "http://a:b", "http://a/v1", "http://a:1?x=1"]
)
def test_what_is_no_server_is_refused(url, tmp_path):
    with pytest.raises(ValueError, match=f"{KEY} must be http://HOST:PORT of a vLLM server, got"):
        ReplyServer(url, tmp_path, None, seconds=1, key=KEY)


def test_pictures_are_those_of_pixels_or_there_are_none(student, server, tmp_path):
    asked = rollouts_of(student, server, tmp_path).server
    images = student[1].image_processor
    levels = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
    pixels = images(images=[Image.fromarray(x.numpy()) for x in levels], return_tensors="pt")["pixel_values"]
    found = asked.pictures(pixels)
    assert all((torch.tensor(np.asarray(a)) == b).all() for a, b in zip(found, levels, strict=True))
    for wrong, said in ((pixels[:, :, :40], "makes other pixels"), (pixels[None], "are no pictures of three channels")):
        with pytest.raises(ValueError, match=f"{KEY} must be left out for this student: .*{said}"):
            asked.pictures(wrong)


def test_a_student_with_lora_is_refused(student, server, tmp_path):
    model = torch.nn.Module()
    model.lora_A = torch.nn.Linear(2, 2)
    asked = rollouts_of(student, server, tmp_path).server
    with pytest.raises(ValueError, match=f"{KEY} must be left out for this student: it has LoRA"):
        asked.require_servable(model)


def take_up_on_a_rank(url, models, folder):
    built = build_models(recipe_from_dict(recipe_values(folder / "unused", models)))
    rollouts = rollouts_of((built.student, built.processor, built.tokenizer), SimpleNamespace(url=url), folder)
    rollouts.begin_step()
    return rollouts(scenes()[0], 40)["input_ids"].tolist()


def test_every_process_asks_the_server_that_the_first_has_told(server, models, tmp_path, ranks):
    first, second = ranks.call(take_up_on_a_rank, server.url, models, tmp_path)
    assert first == second and server.asked.count("/collective_rpc") == 1


def test_a_run_asks_a_server(models, server, tmp_path):
    def opd(name, generation):
        values = recipe_values(tmp_path / name, models, stages=["opd"], save_steps=1)
        values["stage"]["opd"] = dict(values["stage"]["dft"]) | {"generation": generation}
        if name == "server":
            server.fails_at = 2
            with pytest.raises(RunError, match="go on with --resume"):
                run(recipe_from_dict(values))
        run(recipe_from_dict(values), resume=name == "server")
        return metrics(tmp_path / name), (tmp_path / name / "replies.jsonl").read_text()

    generation = {"on_policy": 0.75, "max_new_tokens": 6, "temperature": 0.0}
    alone, wanted = opd("alone", generation)
    served, found = opd("server", generation | {"vllm_server": server.url})
    assert found == wanted
    assert [line["loss"] for line in served] == [line["loss"] for line in alone]
