"""Questions a second of `cdistill eval` with the built-in teacher, alone and in batches, beside transformers' ``generate``.

`python -m pytest benchmarks/bench_eval.py`, a minute on two cores. The questions are the built-in world's as SugarCrepe's
(replies) and Winoground's (probabilities of "yes"); all ways must answer alike before they are timed. In the environment of
`make eval-env`, `.venv-eval/bin/python -m pytest benchmarks/bench_eval.py -k lmms` times lmms-eval beside them.
"""

import statistics
import time

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from cdistill.builtin.writer import write
from cdistill.eval import benchmarks
from cdistill.eval.inference import Inference
from cdistill.eval.loading import load
from cdistill.eval.pictures import Pictures
from cdistill.eval.prompts import Prompts
from cdistill.eval.runner import Runner

pytestmark = pytest.mark.long

ENTRIES = {"sugarcrepe": 20, "winoground": 35}  # 280 questions each
ROUNDS = 3
LEAST = {"sugarcrepe": 3.0, "winoground": 2.0}  # times the questions a second of one at a time


@pytest.fixture(scope="module")
def loaded():
    return load("builtin:teacher")


def by_transformers(loaded, folder, questions):
    """Replies, or logits of the first token, of one question at a time."""
    model, processor = loaded.model, loaded.processor
    answers = []
    for question in questions:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.prompt}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        image = Image.open(folder / question.images[0]).convert("RGB")
        inputs = processor(text=text, images=image, return_tensors="pt")
        with torch.no_grad():
            if question.kind == "generate":
                made = model.generate(**inputs, do_sample=False, max_new_tokens=question.max_new_tokens)
                answers.append(processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
            else:
                (token,) = processor.tokenizer(question.continuation)["input_ids"]
                answers.append(float(model(**inputs, logits_to_keep=1).logits[0, -1].softmax(-1)[token]))
    return answers


def by_runner(inference, folder, questions, batch_size):
    prompts, pictures = inference.prompts, Pictures([folder])
    runner = Runner(
        inference, lambda asked: prompts.about(asked, [pictures.open(n) for n in asked[0].images]), batch_size
    )
    with tqdm(total=len(questions), disable=True) as bar:
        found = {a.question.id: a for answers in runner.answers(questions, bar) for a in answers}
    return [found[q.id].reply if q.kind == "generate" else found[q.id].score for q in questions]


@pytest.mark.parametrize("task", ENTRIES)
def test_questions_a_second(benchmark, cpu_environment, target, tmp_path, loaded, task):
    write(task, tmp_path / task, n=ENTRIES[task])
    inference = Inference(loaded.model, Prompts(loaded.processor))
    assert inference.find_way() == "shared"
    questions = benchmarks.get(task).questions(tmp_path / task)
    ways = {
        "transformers, one at a time": lambda: by_transformers(loaded, tmp_path / task, questions),
        "cdistill, batches of 1": lambda: by_runner(inference, tmp_path / task, questions, 1),
        "cdistill, batches of 32": lambda: by_runner(inference, tmp_path / task, questions, 32),
    }
    expected, *others = (way() for way in ways.values())
    for found in others:
        assert found == expected if task == "sugarcrepe" else found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    rates: dict[str, list[float]] = {name: [] for name in ways}

    def turn():
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            rates[name].append(len(questions) / (time.perf_counter() - start))

    benchmark.pedantic(turn, rounds=ROUNDS)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    benchmark.extra_info.update(cpu_environment, questions=len(questions), questions_per_s=medians)
    target(
        "times one at a time",
        medians["cdistill, batches of 32"] / medians["transformers, one at a time"],
        at_least=LEAST[task],
    )


def by_lmms_eval(evaluator, model, arguments, folder, batch_size):
    """Replies of one of lmms-eval's models in its own run of our task, and the seconds that they took."""
    seconds = []
    whole = model.generate_until

    def timed(self, requests):
        start = time.perf_counter()
        replies = whole(self, requests)
        seconds.append(time.perf_counter() - start)
        return replies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDISTILL_EVAL_DATA", str(folder))
        patch.setattr(model, "generate_until", timed)
        made = model.create_from_arg_string(arguments, {"batch_size": batch_size, "device": "cpu"})
        found = evaluator.simple_evaluate(model=made, tasks=["cd_sugarcrepe"], batch_size=batch_size, bootstrap_iters=0)
    samples = sorted(found["samples"]["cd_sugarcrepe"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0].strip() for sample in samples], sum(seconds)


def test_beside_lmms_eval(benchmark, cpu_environment, target, tmp_path, loaded, monkeypatch):
    """The same task and model; lmms-eval's own takes one question at a time. Loading and scoring are not timed."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is in the environment of `make eval-env`")
    from lmms_eval import evaluator
    from lmms_eval.models.chat.llava_hf import LlavaHf

    from cdistill.eval.lmms_eval.model import CDistill

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    write("sugarcrepe", tmp_path / "sugarcrepe", n=ENTRIES["sugarcrepe"])
    loaded.model.save_pretrained(tmp_path / "teacher")
    loaded.processor.save_pretrained(tmp_path / "teacher")
    inference = Inference(loaded.model, Prompts(loaded.processor))
    inference.find_way()
    questions = benchmarks.get("sugarcrepe").questions(tmp_path / "sugarcrepe")
    replies: dict[str, list[str]] = {}
    rates: dict[str, list[float]] = {}

    def note(name, found, seconds):
        replies[name] = found
        rates.setdefault(name, []).append(len(questions) / seconds)

    def turn():
        start = time.perf_counter()
        found = by_runner(inference, tmp_path / "sugarcrepe", questions, 32)
        note("cdistill eval", [reply.strip() for reply in found], time.perf_counter() - start)
        teacher = f"pretrained={tmp_path / 'teacher'}"
        note("lmms-eval, cdistill", *by_lmms_eval(evaluator, CDistill, teacher, tmp_path, 32))
        note("lmms-eval, llava_hf", *by_lmms_eval(evaluator, LlavaHf, f"{teacher},device_map=cpu", tmp_path, 1))

    benchmark.pedantic(turn, rounds=ROUNDS)
    assert replies["lmms-eval, cdistill"] == replies["cdistill eval"]
    alike = statistics.mean(
        a == b for a, b in zip(replies["lmms-eval, llava_hf"], replies["cdistill eval"], strict=True)
    )
    medians = {name: statistics.median(found) for name, found in rates.items()}
    benchmark.extra_info.update(
        cpu_environment, questions=len(questions), questions_per_s=medians, llava_hf_alike=alike
    )
    target("times lmms-eval", medians["cdistill eval"] / medians["lmms-eval, llava_hf"], at_least=3.0)
