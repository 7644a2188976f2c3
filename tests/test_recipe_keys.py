"""What a recipe may say: all mistakes at once, the JSON schema and the page, from the same classes as the checks."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cdistill.choices import VATConfig
from cdistill.cli import main
from cdistill.train.recipes import Recipe, load_recipe, recipe_from_dict, recipe_to_dict
from cdistill.train.recipes.files import RECIPES
from cdistill.train.recipes.mistakes import build, kinds, schema
from cdistill.train.recipes.reference import json_schema, page

VALID = recipe_to_dict(load_recipe("demo-compodistill", ["student.lora={}"]))
ROOT = schema(Recipe)


def keys(node, values, path=()):
    """Paths of all keys that a recipe has, with their nodes; sections by names of one's own under their names here."""
    for name, key in node["properties"].items():
        yield (*path, name), key
        more = key.get("additionalProperties")
        inside = [(name, values[name], key)] if not isinstance(more, dict) else []
        inside += [
            (f"{name}/{own}", values[name][own], more) for own in (values[name] if isinstance(more, dict) else ())
        ]
        for steps, value, of in inside:
            for kind in kinds(of, ROOT):
                if "properties" in kind and value is not None:
                    yield from keys(kind, value, (*path, *steps.split("/")))


KEYS = dict(keys(ROOT, VALID))


def wrong_values(node):
    """Values of kinds that a key does not allow."""
    allowed = {"number" if "enum" in kind else kind.get("type") for kind in kinds(node, ROOT)}
    allowed |= {kind.get("type") for kind in kinds(node, ROOT)}
    values = {"number": 3.5, "string": "nonsense", "boolean": True, "null": None, "array": [1, "x"], "object": {}}
    return [value for kind, value in values.items() if kind not in allowed]


def changed(changes):
    values = copy.deepcopy(VALID)
    for path, value in changes.items():
        node = values
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = value
    return values


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_every_wrong_key_is_told_at_once_and_no_other(data):
    """Any keys of any sections, with values of kinds that they do not allow."""
    paths = data.draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=6, unique=True))
    paths = [
        p for p in paths if not any(p != q and p[: len(q)] == q for q in paths)
    ]  # a section that is wrong as a whole
    changes = {p: data.draw(st.sampled_from(wrong_values(KEYS[p]))) for p in paths if wrong_values(KEYS[p])}
    if not changes:
        return
    with pytest.raises(ValueError) as error:
        recipe_from_dict(changed(changes))
    lines = str(error.value).split("\n")
    assert len(lines) == len(changes)
    for path, value in changes.items():
        key = re.escape(".".join(path))
        (line,) = [line for line in lines if re.match(rf"{key} must be .*, got ", line)]
        assert line.endswith(f"got {value!r}")


def test_keys_that_are_not_known_are_told_with_the_nearest_beside_wrong_values():
    changes = {
        ("sede",): 1,
        ("vat", "wieght"): 2,
        ("stage", "dft", "data", "max_lenght"): 3,
        ("stage", "dft", "betas"): [0.9],
        ("student", "lora", "dropout"): 1,
        ("kd", "temperature"): float("nan"),
        ("vat", "loss"): "cos",
        ("deepspeed",): True,
        ("stage", "dft", "data", "images"): {"photos": 1},
    }
    with pytest.raises(ValueError) as error:
        recipe_from_dict(changed(changes))
    told = dict(line.split(" ", 1) for line in str(error.value).split("\n"))
    assert {key: text.split("; did you mean ")[-1] for key, text in told.items() if "not a known key" in text} == {
        "sede": "seed?",
        "vat.wieght": "weight?",
        "stage.dft.data.max_lenght": "max_length?",
    }
    assert told["stage.dft.betas"] == "must be a list of 2, got [0.9]"
    assert told["student.lora.dropout"] == "must be at least 0 and below 1, got 1"
    assert told["kd.temperature"] == "must be above 0 and finite, got nan"
    assert told["vat.loss"] == "must be one of cosine, mse, kl, jsd, got 'cos'"
    assert told["stage.dft.data.images.photos"] == "must be a string, got 1" and "stage.dft.data.images" not in told
    assert told["deepspeed"].startswith("must be one of 0, 1, 2, 3, off, got ")


def test_what_concerns_several_keys_is_told_at_once_too():
    changes = {
        ("stage", "dft", "samples"): 1,
        ("stage", "dft", "micro_batch_size"): 7,
        ("stage", "sft", "data", "images"): "photos",
        ("vat", "sink_filter"): True,
        ("teacher_memory", "offload"): True,
    }
    with pytest.raises(ValueError) as error:
        recipe_from_dict(changed(changes))
    found = sorted(line.split(" ")[0] for line in str(error.value).split("\n"))
    assert found == sorted(
        [
            *("stage.dft.samples", "stage.dft.micro_batch_size", "stage.sft.data.path"),
            *("vat.sink_filter", "teacher_memory.offload"),
        ]
    )


def test_keys_that_contradict_each_other_are_told_beside_wrong_ones(tmp_path, capsys):
    """A contradiction is told wherever the keys that it is between are right, and never made of a wrong one."""
    changes = {
        ("processes",): "many",
        ("stage", "dft", "learning_rate"): -1,
        ("stage", "dft", "micro_batch_size"): 7,  # of a section that has a wrong key
        ("stage", "sft", "global_batch_size"): "x",  # which micro_batch_size cannot be compared with
        ("stage", "sft", "micro_batch_size"): 7,
        ("teacher",): None,  # of the recipe, which has wrong keys
        ("teacher_memory",): {"quantization": "4bit", "zero": 3},
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(changed(changes)))
    assert main(["train", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("cdistill: error: ") for line in lines) and not (tmp_path / "runs").exists()
    assert sorted(line.split()[2] for line in lines) == [
        "processes",
        "stage.dft.learning_rate",
        "stage.dft.micro_batch_size",
        "stage.sft.global_batch_size",
        "teacher",
        "teacher_memory.quantization",
        "teacher_memory.zero",
    ]


def test_a_value_that_no_file_could_hold():
    with pytest.raises(ValueError, match="a recipe holds plain values"):
        recipe_from_dict(changed({("teacher",): Path("checkpoints")}))
    with pytest.raises(ValueError, match=r"^a recipe must be a mapping, got \[1\]$"):
        build(Recipe, [1])


def test_layers_given_as_a_list_are_those_given_as_a_tuple():
    assert VATConfig(student_layers=[0, 2]) == VATConfig(student_layers=(0, 2))
    assert recipe_from_dict(changed({("vat", "student_layers"): [0, 2]})).vat.student_layers == (0, 2)


def test_the_page_of_keys_is_made_of_the_classes(capsys):
    written = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    assert main(["recipes", "keys"]) == 0
    assert capsys.readouterr().out == written == f"{page()}\n", "run `cdistill recipes keys > docs/recipes.md`"
    for path in KEYS:
        assert f"| `{path[-1]}` | " in written


def test_every_key_says_what_it_means():
    published = json_schema()
    for name, definition in {"Recipe": published, **published["$defs"]}.items():
        for key, node in definition["properties"].items():
            sections = any("properties" in kind for kind in kinds(node, published))
            assert sections or node.get("description"), f"{name}.{key} has no string below it"


def test_an_editor_takes_what_the_reader_takes(capsys):
    """The schema of the command, with a validator of others."""
    assert main(["recipes", "schema"]) == 0
    published = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(published)
    validator = jsonschema.Draft202012Validator(published)
    for path in sorted(RECIPES.glob("*.yaml")):
        validator.validate(yaml.safe_load(path.read_text()))
    validator.validate(VALID)
    for path, node in KEYS.items():
        for value in wrong_values(node):
            assert not validator.is_valid(changed({path: value})), f"{path} {value!r}"
    for change in ({("sede",): 1}, {("stage", "dft", "objective"): "rl"}, {("kd", "beta"): 1.0}, {("seed",): -1}):
        assert not validator.is_valid(changed(change))
    assert not validator.is_valid({"name": "r"}) and validator.is_valid({"extends": "demo-sft", "seed": 1})
