"""What the documents show runs: Python page by page, commands by the command line's own parsers, recipes by their keys.

The first hour is followed to the letter, with small models in the place of a reader's.
"""

import copy
import json
import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from conversation_cases import byte_level_processor, picture
from family_models import build_pair
from test_train_families import FAMILIES, MARKS
from transformers import AutoModelForImageTextToText, AutoProcessor

import cdistill
from cdistill import cli
from cdistill.builtin.dataset import CHAT_TEMPLATE, BuiltinDataset, Collator, build_tokenizer
from cdistill.builtin.task import BuiltinTask
from cdistill.train.recipes import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIRST_HOUR = ROOT / "docs/first-hour.md"
# Blocks of Python that other tests run, by page and number.
ELSEWHERE = {
    ("add-a-family.md", 0): "test_families.py",
    ("add-a-family.md", 1): "test_families.py",
    ("add-a-term.md", 2): "test_terms.py",
    ("add-an-engine.md", 0): "test_registered_engines.py",
}
# Commands that are not run here, and the tests that run them.
COMMANDS = {
    "analyze confidence": "test_attention_run.py",
    "analyze intervene": "test_attention_run.py",
    "analyze maps": "test_attention_maps.py",
    "analyze page": "test_attention_run.py",
    "builtin write": "test_eval_benchmarks.py",
    "cache": "test_train_cache.py",
    "demo": "test_demo.py",
    "eval": "test_eval_run.py",
    "eval compare": "test_eval_compare.py",
    "eval presets": "test_eval_benchmarks.py",
    "eval score": "test_eval_scorers.py",
    "gradients": "test_train_gradients.py",
    "import": "test_import_use.py",
    "push": "test_hub.py",
    "reproduce": "test_reproduce.py",
}
RUN = ("recipes", "recipes schema", "recipes show demo-sft --resolved", "data presets llava-665k")


def place(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for of, block in found if of == language]


def commands(page: Path) -> list[list[str]]:
    """The words of every `cdistill` command in the blocks without a language."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    lines = [re.sub(r"\s+#.*| \||[\[\]]", "", line.removeprefix("$ ")) for line in lines]
    return [shlex.split(line)[1:] for line in lines if line.startswith("cdistill ")]


def name_of(words: list[str]) -> str:
    return " ".join(words[:2]) if " ".join(words[:2]) in cli.COMMANDS else words[0]


@cache
def shipped_teacher():
    return AutoModelForImageTextToText.from_pretrained(Path(cdistill.__file__).parent / "assets/teacher")


def pair():
    teacher = copy.deepcopy(shipped_teacher())
    student = copy.deepcopy(teacher)
    del student.model.language_model.layers[4:]
    student.config.text_config.update({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4})
    return {"teacher": teacher, "student": student}


def batches():
    data = BuiltinDataset(BuiltinTask(caption=1.0, sentences=0, turns=0), size=2, seed=0)
    batch = Collator(build_tokenizer().pad_token_id)([data[0], data[1]])
    return {"loader": [batch], "batch": batch} | {
        name: batch[name] for name in ("input_ids", "labels", "attention_mask")
    }


def counted_batches():
    data = BuiltinDataset(BuiltinTask(turns=2), size=2, seed=0)
    tokenizer = build_tokenizer()
    return {"loader": [cdistill.CountingCollator(Collator(tokenizer.pad_token_id))(list(data))], "tokenizer": tokenizer}


def rows():
    data = BuiltinDataset(BuiltinTask(caption=1.0, sentences=0, turns=0), size=2, seed=0)
    processor = AutoProcessor.from_pretrained(Path(cdistill.__file__).parent / "assets/teacher")
    return {"dataset": [{"messages": data.messages(i)} for i in range(len(data))], "processor": processor}


def tensors():
    torch.manual_seed(0)
    q, k, v, teacher_q, teacher_k = (torch.randn(1, 2, 12, 16) for _ in range(5))
    hidden, head = torch.randn(6, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    logits = {"student_logits": torch.randn(6, 40, requires_grad=True), "teacher_logits": torch.randn(6, 40)}
    attention = {"q": q, "k": k, "v": v, "teacher_q": teacher_q, "teacher_k": teacher_k}
    attention |= {"rows": torch.arange(8, 12)[None], "cols": torch.arange(6)[None]}
    vocabulary = {"hidden": hidden, "head": head, "labels": torch.arange(6)}
    vocabulary |= {"teacher_hidden": torch.randn(6, 24), "teacher_head": torch.randn(40, 24)}
    return attention | vocabulary | logits


def qwen():
    student, teacher = build_pair("qwen2_vl")
    processor = byte_level_processor("qwen2_vl")
    processor.chat_template = CHAT_TEMPLATE
    return rows() | {
        "qwen_student": student,
        "qwen_teacher": teacher,
        "qwen_processor": processor,
    }


def exported():
    assert cli.main(["export", "builtin:teacher", "student"]) == 0
    return {}


def several():
    """Two teachers, and the kinds of a batch's samples."""
    return {"general": pair()["teacher"], "ocr": pair()["teacher"], "kinds": ["ocr", "vqa"]}


# What a page takes as given.
GIVEN = {
    "own-loop.md": lambda: pair() | batches(),
    "trainer.md": lambda: pair() | rows(),
    "accelerate.md": lambda: pair() | batches(),
    "alignment.md": lambda: pair() | batches(),
    "add-a-term.md": lambda: pair() | rows() | {"args": cdistill.CompoDistillConfig("out", use_cpu=True)},
    "teachers.md": lambda: pair() | batches() | several(),
    "one-op.md": tensors,
    "coming-from.md": tensors,
    "on-policy.md": lambda: pair() | rows() | counted_batches(),
    "qwen-vl.md": qwen,
    "export.md": exported,
}
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=place)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = [block for number, block in enumerate(blocks(page, "python")) if (page.name, number) not in ELSEWHERE]
    names = GIVEN[page.name]() if mine else {}
    for block in mine:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=place)
def test_the_commands_of_a_page_are_understood(page, monkeypatch):
    """By the parsers themselves; each is run here or by a test that is named here."""
    followed = {name_of(words) for words in (*commands(FIRST_HOUR), *map(str.split, RUN))}
    for words in commands(page):
        name = name_of(words)
        assert name in followed or (ROOT / "tests" / COMMANDS[name]).is_file(), f"no test runs `cdistill {name}`"
        monkeypatch.setitem(cli.COMMANDS, name, replace(cli.COMMANDS[name], run=lambda options: 0))
        assert cli.main(words) == 0, words


@pytest.mark.parametrize("line", RUN)
def test_commands_that_only_tell_something(line, capsys):
    assert cli.main(line.split()) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_the_recipes_of_a_page_have_keys_that_there_are(page, tmp_path):
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        whole = values if {"extends", "name"} & values.keys() else {"extends": "paper-qwen1.5-1.8b"} | values
        path = tmp_path / "shown.yaml"
        path.write_text(yaml.safe_dump(whole))
        load_recipe(str(path))


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_the_make_targets_of_a_page_are_there(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    named = [line.split()[1] for line in lines if re.match(r"make \w", line)]
    assert set(named) | set(re.findall(r"`make ([\w-]+)`", page.read_text())) <= set(targets)


def test_the_first_hour_to_the_letter(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, layers, width in (("teacher", 4, 64), ("student", 2, 32)):
        torch.manual_seed(layers)
        tokenizer = build_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
        model, processor = FAMILIES["idefics3"](layers, width, tokenizer)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(tmp_path / "checkpoints" / name)
        processor.save_pretrained(tmp_path / "checkpoints" / name)
    (data,) = blocks(FIRST_HOUR, "json")
    Path("mine.json").write_text(data)
    Path("pictures").mkdir()
    for record in json.loads(data):
        picture(20, 20).save(Path("pictures") / record["image"])
    small = [f"stage.{stage}.{key}" for stage in ("dpt", "dft", "sft") for key in ("samples=2", "global_batch_size=2")]
    for words in commands(FIRST_HOUR):
        more = [*small, "vat.measure_samples=2"] if words[0] == "train" else []
        assert cli.main([*words, *more]) == 0, (words, capsys.readouterr().err)
    logged = [json.loads(line) for line in Path("runs/first/metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(line["stage"] for line in logged)) == ["dpt", "dft", "sft"]
    assert all(line["vat"] > 0 for line in logged if line["stage"] == "dft")
    said = (ROOT / "docs/reference/files.md").read_text()
    assert {key for line in logged for key in line if f"`{key}`" not in said} == set()
    assert Path("looks/page.html").is_file() and Path("runs/first/report.html").is_file()
    assert type(AutoModelForImageTextToText.from_pretrained("student")).__name__ == "Idefics3ForConditionalGeneration"
