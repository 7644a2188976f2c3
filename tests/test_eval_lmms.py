"""Our tasks and models for lmms-eval: what its files say, the scorers' numbers, and the runner's replies.

The harness is in an environment of its own. Here a stand-in calls the same functions in the same way; where lmms-eval can be
imported, as with ``.venv-eval/bin/python -m pytest tests/test_eval_lmms.py``, it runs itself.
"""

import json
import os
import subprocess
import sys
import types
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import yaml

import cdistill.eval.lmms_eval
from cdistill.builtin import writer
from cdistill.cli import main
from cdistill.eval import benchmarks
from cdistill.eval.contract import Answer
from cdistill.eval.lmms_eval import utils

FOLDER = Path(cdistill.eval.lmms_eval.__file__).parent
TASKS = ("sugarcrepe", "winoground", "rbench")


class Loader(yaml.SafeLoader):
    """The harness's own way: the file before the dot is run by its path, and the name after it is looked up."""


def function(loader, node):
    file, name = loader.construct_scalar(node).split(".")
    spec = spec_from_file_location(file, FOLDER / f"{file}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


Loader.add_constructor("!function", function)


def configuration(task):
    """A task file laid over the one it includes."""
    own = yaml.load((FOLDER / f"cd_{task}.yaml").read_text(), Loader)
    return yaml.load((FOLDER / own.pop("include")).read_text(), Loader) | own


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The built-in world in the files of three benchmarks."""
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        writer.write(task, folder / task, n=3 if task == "rbench" else 1)
    return folder


@pytest.fixture(autouse=True)
def environment(data, monkeypatch):
    monkeypatch.setenv(utils.DATA, str(data))
    monkeypatch.delenv(utils.IMAGES, raising=False)


def documents(task):
    """What a task's hook makes of the file that the harness loads."""
    dataset = datasets.Dataset.from_list([{"questions": ""}], split=datasets.NamedSplit(task))
    return configuration(task)["process_docs"](dataset)


def test_every_benchmark_has_a_task_file():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {
        f"cd_{name}" for name in benchmarks.NAMES if name != "builtin"
    }
    for name in utils.METRICS:
        config = configuration(name)
        assert config["task"] == f"cd_{name}"
        assert config["output_type"] == "generate_until"
        assert config["test_split"] == name
        assert (FOLDER / config["dataset_kwargs"]["data_files"][name]).is_file()
        assert tuple(each["metric"] for each in config["metric_list"]) == utils.METRICS[name]
        options = config["generation_kwargs"]
        assert options["until"] == []  # else the harness cuts at an empty line
        assert not options["do_sample"]


@pytest.mark.parametrize("task", TASKS)
def test_the_numbers_are_the_scorers(task, data):
    config, benchmark = configuration(task), benchmarks.get(task)
    questions, docs = benchmark.questions(data / task), list(documents(task))
    assert [utils.question_of(doc) for doc in docs] == questions
    generated = [q for q in questions if q.kind == "generate"]
    assert all(q.max_new_tokens == config["generation_kwargs"]["max_new_tokens"] for q in generated)
    answers = []
    for i, question in enumerate(questions):
        reply = question.facts.get("label", "") if i % 3 else "neither"
        score = None if question.kind == "generate" else (7 * i % 11) / 11
        answers.append(Answer(question, "" if score is not None else reply, score, int(score is not None)))
    items = [config["process_results"](doc, [utils.reply_of(a)]) for doc, a in zip(docs, answers, strict=True)]
    metrics = benchmark.metrics(answers)
    for each in config["metric_list"]:
        found = each["aggregation"]([item[each["metric"]] for item in items])
        assert found == pytest.approx(metrics[each["metric"]].percent)
    for item in items:  # the harness would take anything with a score for independent of the others
        assert not any(isinstance(value, (int, float, dict)) for value in item.values())


def test_a_text_is_no_score():
    doc = documents("winoground")[0]
    with pytest.raises(
        ValueError, match="cd_winoground compares log-probabilities, which only --model cdistill gives; got 'Yes'"
    ):
        utils.process_results(doc, ["Yes"])


def test_data_must_be_named(monkeypatch):
    monkeypatch.delenv(utils.DATA)
    with pytest.raises(ValueError, match="CDISTILL_EVAL_DATA must name the folder"):
        documents("sugarcrepe")


def harness(monkeypatch):
    """A stand-in for what our model needs of lmms-eval, if that is not here."""
    if find_spec("lmms_eval") is None:
        base = type("lmms", (), {"__init__": lambda self: None, "rank": 0, "task_dict": None})
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = base
    from cdistill.eval.lmms_eval.model import CDistill

    return CDistill


def messages(doc):
    """As the harness makes them of images and text."""
    pictures = [{"type": "image", "url": image} for image in utils.doc_to_visual(doc)]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": utils.doc_to_text(doc)}]}]


def requests(task, docs, say=messages, **options):
    return [SimpleNamespace(args=("", say, options, number, f"cd_{task}", task)) for number in range(len(docs))]


@pytest.fixture(scope="module")
def recorded(data, tmp_path_factory):
    """What the runner makes of the built-in teacher."""
    folder = tmp_path_factory.mktemp("results") / "teacher"
    tasks = [word for task in TASKS for word in ("--task", task)]
    assert (
        main(["eval", "builtin:teacher", *tasks, "--data", str(data), "--output", str(folder), "--batch-size", "5"])
        == 0
    )
    return {task: [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()] for task in TASKS}


def agrees(record, doc, reply):
    """Whether a reply that came through the harness is the runner's."""
    answer = utils.answer_of(doc, reply.strip())
    assert record["id"] == answer.question.id
    assert record["reply"].strip() == answer.reply
    if record["score"] is not None:
        assert record["tokens"] == answer.tokens
        assert record["score"] == pytest.approx(answer.score, rel=1e-5)


def test_the_model_replies_as_in_the_runner(recorded, monkeypatch):
    model = harness(monkeypatch)("builtin:teacher", batch_size="8")
    docs = {task: documents(task) for task in TASKS}
    plain = [{"text": doc["prompt"], "pictures": utils.doc_to_visual(doc)} for doc in docs["sugarcrepe"]]
    model.task_dict = {f"cd_{task}": {task: of} for task, of in docs.items()} | {"cd_other": {"other": plain}}
    asked = [request for task in TASKS for request in requests(task, docs[task], max_new_tokens=32, until=[])]
    replies = model.generate_until(asked)
    pairs = [(record, doc) for task in TASKS for record, doc in zip(recorded[task], docs[task], strict=True)]
    for (record, doc), reply in zip(pairs, replies, strict=True):
        agrees(record, doc, reply)

    def others(doc):
        shown = [{"type": "image", "url": image} for image in doc["pictures"]]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": doc["text"]}]}]

    def backwards(doc):
        return [{"role": "user", "content": others(doc)[0]["content"][::-1]}]

    # tasks that the harness has, of which nothing is known but the messages
    found = model.generate_until(requests("other", plain, others, max_new_tokens=32, until=[]))
    assert found == [record["reply"] for record in recorded["sugarcrepe"]]
    letter = found[0].strip()[0]
    cut = model.generate_until(requests("other", plain[:1], others, max_new_tokens=32, until=["", letter]))
    assert cut == [found[0].split(letter)[0]]
    with pytest.raises(ValueError, match="cd_other samples or searches"):
        model.generate_until(requests("other", plain[:1], others, temperature=0.7))
    with pytest.raises(ValueError, match="one turn of the user, images first"):
        model.generate_until(requests("other", plain[:1], backwards))


def test_lmms_eval_itself_gives_the_runners_replies(recorded, data, tmp_path):
    pytest.importorskip("lmms_eval")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    program = [sys.executable, "-m", "lmms_eval", "--model", "cdistill", "--model_args", "pretrained=builtin:teacher"]
    named = ["--tasks", ",".join(f"cd_{task}" for task in TASKS), "--include_path", str(FOLDER)]
    written = ["--log_samples", "--output_path", str(tmp_path / "out"), "--batch_size", "8"]
    subprocess.run([*program, *named, *written], check=True, env=os.environ | offline, timeout=600)
    for task in TASKS:
        (path,) = (tmp_path / "out").rglob(f"*samples_cd_{task}.jsonl")
        samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        for record, sample, doc in zip(recorded[task], samples, documents(task), strict=True):
            agrees(record, doc, sample["filtered_resps"])
