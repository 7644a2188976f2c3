"""Readers of other packages, by a plugin in any process or a call in one; plugins."""

import os
import subprocess
import sys

import forks
import pytest
from builtin_models import make_recipe
from data_files import as_json, record

from cdistill.data import register_reader, registry
from cdistill.data.mix import open_source
from cdistill.data.samples import Source
from cdistill.train.build import build_models
from cdistill.train.data import stage_dataset

# A package of someone else: questions and answers on lines, with a tab between them.
PACKAGE = """
from pathlib import Path

from cdistill.data.samples import BadSampleError, Message, Sample, Sizes, Unread
import numpy as np


class Tabs:
    in_order = False

    def __init__(self, path):
        self.path, self.name = path, Path(path).stem
        self.lines = Path(path).read_text().splitlines()

    def __len__(self):
        return len(self.lines)

    def record(self, index):
        return self.lines[index]

    def place(self, index):
        return f"{self.path}, line {index + 1}"

    def __getitem__(self, index):
        question, tab, answer = self.lines[index].partition("\\t")
        if not tab:
            raise BadSampleError("no tab", self.lines[index], self.place(index))
        messages = (Message("user", (question,)), Message("assistant", (answer,)))
        return Sample(str(index), messages, (), self.place(index))

    def unread(self, most=None):
        return Unread({}, len(self))

    def sizes(self):
        return Sizes(np.array([len(line) for line in self.lines], np.int32), np.zeros(len(self), np.int16))


def open_tabs(path, split=None):
    return Tabs(path)
"""
PLUGIN = """
from tabs_reader import open_tabs

import cdistill
from cdistill.data import register_reader

register_reader("tabs", open_tabs)
cdistill.register_objective("words", ("ar",), ("adapter",))
"""
ANSWERS = ["zero", "one", "two", "three"]
LINES = [
    f"how many {colour} {shape} is there ?\t{answer}"
    for colour in ("red", "blue")
    for shape in ("ring", "cross")
    for answer in ANSWERS
]


@pytest.fixture
def package(tmp_path):
    """An installed package: its module, and the metadata by which Python finds its entry point."""
    root = tmp_path / "site"
    (root / "tabs-1.0.dist-info").mkdir(parents=True)
    (root / "tabs_reader.py").write_text(PACKAGE)
    (root / "tabs_plugin.py").write_text(PLUGIN)
    (root / "tabs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tabs\nVersion: 1.0\n")
    (root / "tabs-1.0.dist-info" / "entry_points.txt").write_text("[cdistill.plugins]\ntabs = tabs_plugin\n")
    (tmp_path / "set.txt").write_text("\n".join([*LINES[:5], "no answer", *LINES[5:]]))
    return root


@pytest.fixture
def registered(package, monkeypatch):
    """The reader, known to this process alone, under another name."""
    monkeypatch.setattr(registry, "_openers", {})
    monkeypatch.syspath_prepend(package)
    from tabs_reader import open_tabs

    register_reader("by-tabs", open_tabs)
    return open_tabs


def in_a_process(package, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), *sys.path])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=package.parent, env=environment, capture_output=True, text=True
    )


def test_a_command_finds_the_reader_of_an_installed_package(package, tmp_path):
    command = ["-m", "cdistill", "data", "check", f"tabs:{tmp_path / 'set.txt'}"]
    found = forks.python(*command, cwd=package.parent, env=os.environ | {"PYTHONPATH": str(package)})
    assert found.returncode == 1, found.stderr
    assert "no tab" in found.stdout and "set.txt, line 6" in found.stdout and "17    16    1" in found.stdout


def test_objectives_of_a_plugin_are_known_to_all_processes_of_a_run(package, tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: demo-compodistill\nstage: {sft: {objective: words}}\nprocesses: 2\n")
    code = (
        "import sys; from cdistill.train import load_recipe; from cdistill.train.objectives import require_known_everywhere\n"
        f"recipe = load_recipe({str(tmp_path / 'mine.yaml')!r})\n"
        "require_known_everywhere([recipe.stage['sft'].objective], recipe.processes)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    (package / "tabs_plugin.py").write_text(PLUGIN.replace("from tabs_reader import open_tabs", "open_tabs = print"))
    found = in_a_process(package, "-c", code)
    assert found.returncode == 0, found.stderr
    (package / "tabs_plugin.py").write_text("import nowhere")
    found = in_a_process(package, "-m", "cdistill", "train", tmp_path / "mine.yaml")
    told = "plugin tabs (tabs_plugin) cannot be imported: ModuleNotFoundError: No module named 'nowhere'; mend or uninstall it"
    assert (found.returncode, found.stderr) == (2, f"cdistill: error: {told}\n")


def test_recipes_and_mixes_are_served(registered, models, tmp_path):
    path = f"by-tabs:{tmp_path / 'set.txt'}"
    source: Source = open_source(path)
    assert (len(source), source[0].messages[1].parts, source.name) == (17, ("zero",), "set")
    (tmp_path / "more.json").write_bytes(as_json([record(i) for i in range(3)], lines=True))
    (tmp_path / "mix.yaml").write_text(f"- {{path: '{path}'}}\n- {{path: {tmp_path / 'more.json'}}}\n")
    assert len(open_source(str(tmp_path / "mix.yaml"))) == 20
    data = {"path": path}
    options = {
        "stages": ["sft"],
        "stage__sft__data": data,
        "stage__sft__samples": 16,
        "stage__sft__global_batch_size": 4,
    }
    recipe = make_recipe(tmp_path / "run", models, group_by="length", **options)
    built = build_models(recipe)
    dataset, collate = stage_dataset(recipe, 0, built)
    batch = collate([dataset[i] for i in range(16)])
    answers = batch["labels"][batch["labels"] >= 0]
    assert len(dataset) == 16 and set(built.tokenizer.convert_ids_to_tokens(answers)) >= set(ANSWERS)


def test_what_is_refused(registered, tmp_path):
    path = tmp_path / "set.txt"
    for name in ("hf", "by-tabs", "https"):
        with pytest.raises(ValueError, match=f"^reader '{name}' is taken"):
            register_reader(name, registered)
    for name in ("c", "", "a b", "a/b"):
        with pytest.raises(ValueError, match="must be named by two or more"):
            register_reader(name, registered)
    with pytest.raises(ValueError, match="must be a function that opens a set, got str"):
        register_reader("fine", "tabs_reader:open_tabs")
    with pytest.raises(
        ValueError, match=r"^other:x: there is no such file, and no reader called 'other' \(registered: by-"
    ):
        open_source("other:x")
    with pytest.raises(ValueError, match=r"^reader 'by-tabs' does not take streaming: leave it out"):
        open_source(f"by-tabs:{path}", streaming=True, size=4)
    with pytest.raises(ValueError, match=r"^reader 'by-tabs' does not take allow_urls"):
        open_source(f"by-tabs:{path}", allow_urls=True)
    assert len(open_source(f"by-tabs:{path}", split="train")) == 17
    register_reader("half", lambda rest: [rest])
    with pytest.raises(ValueError, match=r"^reader 'half' gave a list without name: see docs"):
        open_source("half:x")


def test_a_file_whose_name_has_a_colon_is_read_as_a_file(registered, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "by-tabs:set.json").write_bytes(as_json([record(i) for i in range(3)], lines=False))
    assert len(open_source("by-tabs:set.json")) == 3
    for name in ("set-1:a.jsonl", "set-1:b.jsonl"):
        (tmp_path / name).write_bytes(as_json([record(0, images=0)], lines=True))
    assert len(open_source("set-1:*.jsonl", columns={"conversations": "conversations"})) == 2
