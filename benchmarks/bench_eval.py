"""Questions a second of `cdistill eval` with the built-in teacher, alone and in batches, beside transformers' ``generate``.

`python -m pytest benchmarks/bench_eval.py`, a minute on two cores. The questions are the built-in world's as SugarCrepe's
(replies) and Winoground's (probabilities of "yes"); all ways must answer alike before they are timed.
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
