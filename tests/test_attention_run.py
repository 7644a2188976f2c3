"""`cdistill analyze` from its command line, on tiny models of the built-in task."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from builtin_models import llava, save_teacher

from cdistill.attention import results
from cdistill.builtin.dataset import build_tokenizer
from cdistill.cli import main


def save(folder, seed, **changes):
    torch.manual_seed(seed)
    llava(**changes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    teacher = str(save_teacher(root / "teacher"))
    shutil.copytree(teacher, root / "copy")
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    students = {"alike": save(root / "alike", 3, **shape), "narrow": save(root / "narrow", 4)}
    patches = save(root / "patches", 5, vision={"patch_size": 16})
    config = root / "patches" / "config.json"
    config.write_text(config.read_text().replace('"image_seq_length": 36', '"image_seq_length": 9'))
    return {"teacher": teacher, "copy": str(root / "copy"), "patches": patches, **students}


def analyze(word, models, names, output, *options):
    students = [models[name] for name in names]
    return main(["analyze", word, "--teacher", models["teacher"], *students, "--output", str(output), *options])


def read(output, name):
    return json.loads((output / f"{name}.json").read_text())


def test_four_analyses_in_a_folder_make_one_page(models, tmp_path, capsys):
    few = ("--limit", "14")
    assert analyze("maps", models, ["narrow"], tmp_path, "--limit", "1", "--words", "what") == 2
    assert "--words 'what' are not in the text" in capsys.readouterr().err
    assert not (tmp_path / "maps.json").exists()
    assert analyze("maps", models, ["narrow"], tmp_path, "--limit", "1") == 0
    assert analyze("intervene", models, ["alike"], tmp_path, *few, "--share", "1") == 0
    assert analyze("confidence", models, ["alike", "narrow"], tmp_path, *few) == 0
    assert analyze("similarity", models, ["alike", "narrow"], tmp_path, *few) == 0
    found = results.read(tmp_path)
    assert list(found) == list(results.ANALYSES)

    similarity = found["similarity"]
    assert [of["name"] for of in similarity["sets"]] == ["built-in recognition", "built-in compositional"]
    assert [of["group"] for of in similarity["sets"]] == ["vqa", "compositional"]
    assert similarity["teacher"]["layers"] == [0, 1, 2, 3] and similarity["students"][1]["heads"] == 2
    first = {(q["role"], q["place"], q["quantity"]): q for q in similarity["sets"][0]["quantities"]}
    alike, narrow = (first["student", place, "visual"] for place in (0, 1))
    assert len(alike["heads"][0]) == 4 and narrow["heads"] is None
    assert all(low <= mean <= high for low, mean, high in zip(alike["low"], alike["mean"], alike["high"], strict=True))
    differences = [entry.get("difference") for entry in similarity["sets"][0]["averages"]]
    assert [difference is None for difference in differences] == [True, False, True, False]

    intervened = found["intervene"]["sets"][1]
    assert intervened["students"][0]["metrics"][-1]["metric"] == "compositional"
    assert intervened["students"][0]["metrics"][0]["difference"]["test"] == "McNemar"
    drawn = [of["file"] for entry in found["maps"]["cases"][0]["maps"] for of in entry["pictures"]]
    assert len(drawn) == 2 * 3 and all((tmp_path / name).stat().st_size for name in drawn)

    page = (tmp_path / "page.html").read_text()
    assert len(re.findall("<svg [^>]*aria-label=", page)) == page.count("<svg ") == 4 * 2 + 2 + 2 + 2
    assert (
        len(re.findall('<img src="data:image/png;base64,[^"]+" alt="[^"]+"', page))
        == page.count("<img ")
        == 2 * (6 + 1)
    )
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "<script" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert main(["analyze", "page", str(tmp_path)]) == 0


def test_a_copy_of_the_teacher_looks_and_answers_as_the_teacher_does(models, tmp_path):
    few = ("--limit", "7", "--batch-size", "3")
    assert analyze("similarity", models, ["copy"], tmp_path, *few) == 0
    for of in read(tmp_path, "similarity")["sets"]:
        by_name = {(q["role"], q["quantity"]): q for q in of["quantities"]}
        for name in ("visual", "text"):
            assert by_name["student", name]["mean"] == pytest.approx([1.0] * 4, abs=1e-5)
            assert [x for heads in by_name["student", name]["heads"] for x in heads] == pytest.approx(
                [1.0] * 16, abs=1e-5
            )
        for name in ("mass", "entropy"):
            assert by_name["student", name]["mean"] == by_name["teacher", name]["mean"]
    assert analyze("intervene", models, ["copy"], tmp_path / "2", *few, "--heads", "each", "--layers", "all") == 0
    for of in read(tmp_path / "2", "intervene")["sets"]:
        for each in of["students"][0]["metrics"]:
            assert each["after"]["percent"] == each["before"]["percent"] == of["teacher"][each["metric"]]


def write_benchmark(folder, task):
    assert main(["builtin", "write", "--task", task, str(folder), "--n", "2"]) == 0
    return str(folder)


def test_benchmarks_and_data_sets_stand_beside_each_other(models, tmp_path, capsys):
    data = tmp_path / "data"
    for task in ("sugarcrepe", "winoground"):
        write_benchmark(data / task, task)
    image = next((data / "winoground").rglob("*.png"))
    turns = [
        {"from": "human", "value": "<image>\nhow many red ?"},
        {"from": "gpt", "value": "two"},
        {"from": "human", "value": "what colour ?"},
        {"from": "gpt", "value": "blue"},
    ]
    words = [{"from": "human", "value": "how many ?"}, {"from": "gpt", "value": "two"}]
    records = [{"id": "a", "image": image.name, "conversations": turns}, {"id": "b", "conversations": words}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(records))
    processor = image_processor(models)
    options = ("--task", "sugarcrepe", "--task", "winoground", "--data", str(data), "--samples", str(file))
    # names of the set's images start from --images as well as the benchmarks' do
    options += ("--images", str(image.parent), "--limit", "6")
    assert analyze("confidence", processor, ["alike"], tmp_path / "out", *options) == 0, capsys.readouterr().err
    sets = {of["name"]: of for of in read(tmp_path / "out", "confidence")["sets"]}
    assert list(sets) == ["sugarcrepe", "winoground", "chat"]
    assert sets["chat"]["samples"] == 1 and sets["chat"]["left_out"] == {"without an image": 1}
    tokens = {name: of["students"][0]["tokens"] for name, of in sets.items()}
    assert tokens["chat"] == 2 * 2  # both answers with the tokens that end them
    assert tokens["sugarcrepe"] == sets["sugarcrepe"]["samples"]
    assert analyze("intervene", processor, ["alike"], tmp_path / "out", *options[:6], "--limit", "4") == 0
    scored = {of["name"]: of for of in read(tmp_path / "out", "intervene")["sets"]}
    assert [each["metric"] for each in scored["winoground"]["students"][0]["metrics"]][-1] == "group"


def image_processor(models):
    """The models with processors beside their weights, as others have them."""
    from cdistill.models.load import load_config, load_tokenizer
    from cdistill.models.processor import build_processor

    for name in ("teacher", "alike"):
        folder = Path(models[name])
        build_processor(load_config(folder, "model"), load_tokenizer(folder, "model"), "model").save_pretrained(folder)
    return models


ERRORS = [
    (["similarity", "patches"], "see 36 and 9 visual tokens in"),
    (["similarity", "alike", "--limit", "0"], "--limit must be at least 1"),
    (["similarity", "alike", "alike"], "is named twice"),
    (["similarity", "alike", "--task", "sugarcrepe"], "--data must name the folder"),
    (["similarity", "alike", "--samples", "WORDS"], "words: holds no question about an image"),
    (["intervene", "alike", "--share", "0"], "--share must be above 0"),
    (["intervene", "alike", "--layers", "1-7"], "--layers 1-7: "),
    (["intervene", "alike", "--heads", "4"], "--heads must be mean, each, or heads of 0 to 3"),
    (["intervene", "narrow", "--heads", "each"], "--heads each needs equally many heads"),
    (["maps", "alike", "--layers", "5-6"], "--layers 5-6: "),
    (["maps", "alike", "--question", "what ?"], "--question and --image belong together"),
    (["maps", "alike", "--image", "none.png", "--question", "what ?"], "--image none.png: "),
]


@pytest.mark.parametrize(("words", "said"), ERRORS, ids=[" ".join(words[:4]) for words, _ in ERRORS])
def test_mistakes_are_told_in_one_line_before_anything_is_written(words, said, models, tmp_path, capsys):
    file = tmp_path / "words.json"
    turns = [{"from": "human", "value": "how many ?"}, {"from": "gpt", "value": "two"}]
    file.write_text(json.dumps([{"id": "b", "conversations": turns}]))
    word, *rest = [models.get(each, each.replace("WORDS", str(file))) for each in words]
    limit = [] if "--limit" in rest else ["--limit", "2"]
    code = main(["analyze", word, "--teacher", models["teacher"], *rest, *limit, "--output", str(tmp_path / "out")])
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "samples/s" not in line and "questions/s" not in line
    ]
    assert code == 2 and len(lines) == 1 and said in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_results_of_another_version_are_told(models, tmp_path, capsys):
    (tmp_path / "confidence.json").write_text('{"analysis": "confidence", "version": 0}')
    assert main(["analyze", "page", str(tmp_path)]) == 2
    assert "version 0, and this is version 1" in capsys.readouterr().err
    assert analyze("similarity", models, ["alike"], tmp_path) == 2
    assert not (tmp_path / "similarity.json").exists()
    (tmp_path / "confidence.json").write_text("[]")
    assert main(["analyze", "page", str(tmp_path)]) == 2
    assert "is not what `cdistill analyze` writes" in capsys.readouterr().err
    (tmp_path / "confidence.json").unlink()
    assert main(["analyze", "page", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err
