"""`cdistill init`: what it writes for models and data of one's own, what it refuses, and that it overwrites nothing."""

import json
import shutil
import sys
import unicodedata

import jsonschema
import pytest
import yaml
from builtin_models import llava, save_base
from data_files import encoded, record, turns
from datasets import Dataset
from transformers import SiglipVisionConfig, SiglipVisionModel

from cdistill.builtin.dataset import build_tokenizer
from cdistill.cli import main
from cdistill.init import recipe as writing
from cdistill.init.recipe import Machine
from cdistill.train.recipes import load_recipe
from cdistill.train.recipes.reference import json_schema

SAID = turns("<image>\nwhat colour is the circle ?", "red")


@pytest.fixture
def world(models, tmp_path, monkeypatch):
    """A folder with a teacher, a language model, a student that sees, and 20 records whose images lie in a folder of theirs."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "base"):
        (tmp_path / name).symlink_to(models / name)
    seeing = models / "seeing"
    if not seeing.exists():
        llava().save_pretrained(seeing)
        build_tokenizer().save_pretrained(seeing)
    (tmp_path / "seeing").symlink_to(seeing)
    (tmp_path / "data/pictures").mkdir(parents=True)
    for i in range(20):
        (tmp_path / f"data/pictures/{i}-0.jpg").write_bytes(encoded())
    write(tmp_path, [{**record(i), "conversations": [*SAID, *turns("how many ?", str(i % 9))]} for i in range(20)])
    return tmp_path


def write(folder, records):
    (folder / "data/mine.json").write_text(json.dumps(records))


def init(*words, student="base", teacher="teacher", data="data/mine.json"):
    named = {"--student": student, "--teacher": teacher, "--data": data}
    return main(["init", *words, *(word for pair in named.items() if pair[1] is not None for word in pair)])


def refused(capsys, *words, **named):
    """The one line of a refusal, that leaves nothing behind."""
    assert init(*words, **named) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    return line.removeprefix("cdistill: error: ")


@pytest.mark.parametrize(("student", "taf"), [("base", True), ("seeing", False)])
def test_plan_and_train_take_what_is_written(world, student, taf, capsys):
    assert init("mine/recipe.yaml", student=student) == 0
    said = capsys.readouterr().out
    assert said.endswith("next:\n  cdistill plan mine/recipe.yaml\n  cdistill train mine/recipe.yaml\n")
    text = (world / "mine/recipe.yaml").read_text()
    assert all("#" in line for line in text.split("  dft:")[0].splitlines() if ": " in line)  # each key is explained
    jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(text))
    recipe = load_recipe("mine/recipe.yaml")
    assert (recipe.name, recipe.output, recipe.student.taf) == ("mine", "runs/mine", taf)
    assert (recipe.deepspeed, recipe.processes, recipe.stages) == ("off", 1, ("dpt", "dft", "sft"))
    assert recipe.stage["dft"].data.images == "data/pictures" and recipe.stage["dft"].samples == 20
    assert main(["plan", "mine/recipe.yaml"]) == 0
    if taf:
        assert main(["train", "mine/recipe.yaml", "stages=[dft]", "stage.dft.samples=4"]) == 0
        assert (world / "runs/mine/1-dft/model.safetensors").is_file()


def test_gpus_decide_what_fits_them(world, capsys):
    """Of two GPUs of little memory the plan takes what it must; what is written says so and fits."""
    assert init("two.yaml", "--gpus", "2", "--gpu", "24GB", "--output", "elsewhere") == 0
    roomy = load_recipe("two.yaml")
    assert (roomy.deepspeed, roomy.processes, roomy.gradient_checkpointing, roomy.output) == (2, 2, False, "elsewhere")
    assert "cdistill plan two.yaml --gpu 24GB\n" in capsys.readouterr().out
    from cdistill.init import models, records

    pair = models.look("base", "teacher")
    found = records.look("data/mine.json", encoder=pair.encoder)
    total = writing.make("n", "o", pair, found, Machine(2, None)).planned.total
    tight = writing.make("n", "o", pair, found, Machine(2, total - 1))
    assert tight.planned.total < total and not tight.too_large
    assert tight.recipe.gradient_checkpointing and "gradient_checkpointing: true" in tight.text


def test_nothing_is_overwritten(world, capsys):
    (world / "recipe.yaml").write_text("precious")
    assert refused(capsys).startswith("recipe.yaml is there already, and init overwrites nothing")
    assert refused(capsys, "recipe.yaml").startswith("recipe.yaml is there already")
    assert (world / "recipe.yaml").read_text() == "precious"
    (world / "runs/mine").mkdir(parents=True)
    (world / "runs/mine/thesis.txt").touch()
    assert "runs/mine is not empty" in refused(capsys, "mine.yaml") and not (world / "mine.yaml").exists()
    assert "data/mine.json is a file already" in refused(capsys, "data/mine.json")


def other_words(folder, name="other"):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["a_word_of_its_own"])
    return save_base(folder / name, tokenizer=tokenizer)


MISTAKES = {
    "no folder": (lambda w: {"teacher": "lost"}, "teacher: there is no folder 'lost'"),
    "no model": (lambda w: {"student": "data"}, "student.base: data/config.json is missing"),
    "a teacher that is blind": (
        lambda w: {"teacher": "base"},
        "teacher: base holds a qwen2 model, which sees no images",
    ),
    "other words": (lambda w: {"student": str(other_words(w))}, "vocabularies differ: token 'a_word_of_its_own' is"),
    "no records": (lambda w: {"data": "lost.json"}, "data: "),
    "no images": (
        lambda w: write(w, [{"id": i, "conversations": turns("how many ?", "3")} for i in range(20)]) or {},
        "data: the first 20 records of data/mine.json have no image",
    ),
    "images that are not there": (
        lambda w: shutil.rmtree(w / "data/pictures") or {},
        "data: the first 20 records of data/mine.json name no image that is there",
    ),
    "other visual tokens": (
        lambda w: {"student": str(seeing_otherwise(w))},
        "vision_config.patch_size differs: student 16, teacher 8",
    ),
    "an encoder in the place of a student": (
        lambda w: {"student": str(encoder(w))},
        "student.base: encoder holds a siglip_vision_model model: neither a language model nor one that answers about images",
    ),
}


def seeing_otherwise(folder):
    llava(vision={"patch_size": 16}).save_pretrained("otherwise")
    build_tokenizer().save_pretrained("otherwise")
    return "otherwise"


def encoder(folder):
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=16,
            patch_size=8,
        )
    ).save_pretrained("encoder")
    return "encoder"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_anything_is_written(world, mistake, capsys):
    make, said = MISTAKES[mistake]
    named = make(world)
    capsys.readouterr()  # bars of what was saved
    assert refused(capsys, "new/recipe.yaml", **named).startswith(said)
    assert not (world / "new").exists() and not (world / "runs").exists()


def test_some_missing_images_are_told(world, capsys):
    (world / "data/pictures/3-0.jpg").unlink()
    assert init() == 0
    said = capsys.readouterr().out
    assert "19 of the first 20 have images and can be used" in said and "missing image (1)" in said
    assert "cdistill data check data/mine.json --images data/pictures" in said
    assert load_recipe("recipe.yaml").name == world.name


def test_a_folder_whose_names_are_in_another_form_of_unicode_is_found(world, capsys):
    nfc, nfd = (unicodedata.normalize(form, "größe.jpg") for form in ("NFC", "NFD"))
    (world / "data/pictures/0-0.jpg").rename(world / "data/pictures" / nfd)
    write(world, [{**record(0), "image": nfc, "conversations": [*SAID, *turns("how many ?", "3")]}])
    assert init() == 0
    assert "images are in data/pictures" in capsys.readouterr().out


def test_rows_whose_columns_have_other_names(world, capsys):
    rows = [{"picture": {"bytes": encoded(), "path": None}, "ask": "how many ?", "say": "3"} for _ in range(9)]
    Dataset.from_list(rows).to_parquet("rows.parquet")
    capsys.readouterr()
    assert refused(capsys, data="rows.parquet").startswith("data: columns of rows: say which hold")
    columns = {"image": "picture", "question": "ask", "answer": "say"}
    assert init("--columns", *(f"{name}={column}" for name, column in columns.items()), data="rows.parquet") == 0
    assert load_recipe("recipe.yaml").stage["dpt"].data.columns == columns


class Terminal:
    """In the place of a terminal: what a user types, line by line, and what was asked."""

    def __init__(self, *lines):
        self.lines, self.asked = list(lines), []

    def __call__(self, question):
        self.asked.append(question)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


def test_it_asks_for_what_is_not_given(world, monkeypatch, capsys):
    """On a terminal; a wrong answer is told and asked for again."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    terminal = Terminal("lost", "teacher", "", "base", "data", "")
    monkeypatch.setattr("builtins.input", terminal)
    assert main(["init", "asked"]) == 0
    words = ["teacher", "teacher", "student", "student", "data", "GPUs"]
    assert all(word in asked for word, asked in zip(words, terminal.asked, strict=True))
    assert "there is no folder 'lost'" in capsys.readouterr().out
    assert load_recipe("asked/recipe.yaml").stage["sft"].data.path == "data/mine.json"
    monkeypatch.setattr("builtins.input", Terminal("teacher"))
    assert main(["init", "ended"]) == 2 and "--student must be given" in capsys.readouterr().err


def test_without_a_terminal_the_options_are_named(world, capsys):
    assert refused(capsys, student=None, data=None).startswith("--student and --data must be given")
    assert refused(capsys, "--yes", teacher=None).startswith("--teacher must be given")
    assert refused(capsys, "--gpus", "-1").startswith("gpus must be a number from 0 to 1024")
    assert refused(capsys, "--gpus", "0", "--gpu", "24GB").startswith("gpu is the memory of a GPU")


def test_names_of_all_kinds_are_written_so_that_they_are_read(world):
    for name in ("true", "1e3", "a: b", "# no comment", "'", '"', " ", "é", "no", "~", "- a", "", "a\nb", "[x]", "&a"):
        assert yaml.safe_load(f"key: {writing._scalar(name)}") == {"key": name}
