"""Model folders that somebody else has made or changed: one line that names the file, no code run, no memory taken."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from builtin_models import save_teacher
from safetensors.torch import load_file, save_file

from cdistill.cli import main
from cdistill.manifest import COMPLETE, verify
from cdistill.models import folder as models_folder
from cdistill.models.folder import check_config
from cdistill.models.load import load_config, load_model, load_tokenizer, resolve_folder
from cdistill.models.processor import load_processor
from cdistill.runtime.checkpoints import seal


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def change(path, **values):
    """Change keys of a JSON file; a__b is b in a."""
    content = json.loads(path.read_text())
    for key, value in values.items():
        *outer, last = key.split("__")
        node = content
        for name in outer:
            node = node[name]
        node[last] = value
    path.write_text(json.dumps(content))


def weights(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def replaced(name, text):
    return lambda folder: (folder / name).write_text(text)


def configured(**values):
    return lambda folder: change(folder / "config.json", **values)


def indexed(text):
    def apply(folder):
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return apply


def beside_outputs(name, value, dtype=None):
    """Puts a weight into the first output layer of a decoder's attention, whose own weight gets another dtype."""

    def apply(state):
        own = next(key for key in state if key.endswith("layers.0.self_attn.o_proj.weight") and "vision" not in key)
        state[own] = state[own].to(dtype or state[own].dtype)
        state[own.removesuffix("weight") + name] = value

    return apply


DAMAGES = {
    "fewer layers than the weights": configured(text_config__num_hidden_layers=3),
    "more layers than the weights": configured(text_config__num_hidden_layers=5),
    "a million layers": configured(text_config__num_hidden_layers=10**6, text_config__layer_types=None),
    "a size that is a word": configured(text_config__hidden_size="x"),
    "a size that is negative": configured(text_config__vocab_size=-4),
    "a size that is a truth value": configured(text_config__num_attention_heads=True),
    "a size beyond all": configured(text_config__intermediate_size=10**40),
    "another vocabulary": configured(text_config__vocab_size=10),
    "no dtype": configured(dtype="float99"),
    "a dtype that is a function": configured(dtype="zeros"),
    "no activation": configured(text_config__hidden_act="boom"),
    "no type": configured(model_type="nope"),
    "a type that is a number": configured(model_type=5),
    "no type of text": configured(text_config__model_type="nope"),
    "no text": configured(text_config=None),
    "text that is a list": configured(text_config=[]),
    "heads that do not divide": configured(text_config__num_attention_heads=3),
    "config deep": replaced("config.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "config a list": replaced("config.json", "[]"),
    "config empty": replaced("config.json", ""),
    "config not UTF-8": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}"),
    "index a list": indexed("[]"),
    "index empty": indexed('{"weight_map": {}}'),
    "index deep": indexed('{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "index of numbers": indexed('{"weight_map": {"a": 5}}'),
    "index to a file that is missing": indexed('{"weight_map": {"a": "b.safetensors"}}'),
    "index to a file outside": indexed('{"weight_map": {"a": "../outside.safetensors"}}'),
    "index to a pickle": indexed('{"weight_map": {"a": "pytorch_model.bin"}}'),
    "generation config a list": replaced("generation_config.json", "[]"),
    "tokenizer config empty": replaced("tokenizer_config.json", ""),
    "tokenizer config a list": replaced("tokenizer_config.json", "[]"),
    "tokenizer a list": replaced("tokenizer.json", "[]"),
    "tokenizer of something else": replaced("tokenizer.json", '{"version": "1.0"}'),
    "weights cut": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-9]
    ),
    "weights no file": lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
    "weights missing": lambda folder: weights(folder, lambda state: state.pop(next(k for k in state if "q_proj" in k))),
    "a bias that the configuration leaves out": lambda folder: weights(folder, beside_outputs("bias", torch.ones(4))),
    "a scale without a quantisation": lambda folder: weights(
        folder, beside_outputs("weight_scale_inv", torch.ones(1, 1), torch.float8_e4m3fn)
    ),
    "an adapter that is not merged": lambda folder: weights(folder, beside_outputs("lora_A.weight", torch.ones(2, 4))),
    "weights of NaN": lambda folder: weights(
        folder, lambda state: state[next(iter(state))].view(-1)[:1].fill_(torch.nan)
    ),
    "weights of inf": lambda folder: weights(
        folder, lambda state: state[next(iter(state))].view(-1)[:1].fill_(-torch.inf)
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_one_line_that_names_the_folder(folder, name):
    DAMAGES[name](folder)
    with pytest.raises(ValueError, match=r"^teacher: ") as raised:
        load_config(folder, "teacher")
        load_tokenizer(folder, "teacher")
        load_model(folder, "teacher")
    said = str(raised.value)
    assert str(folder) in said and "\n" not in said and len(said) < 700
    assert not torch.cuda.is_initialized()


def test_the_undamaged_one_is_loaded(folder):
    assert load_model(folder, "teacher").config.text_config.num_hidden_layers == 4
    load_tokenizer(folder, "teacher")


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "x", "text_config": {"hidden_size": [1, 2], "head_dim": None, "num_key_value_heads": 2}},
        {"model_type": "x", "dtype": "torch.bfloat16", "vision_config": None, "depth": 0},
        {"model_type": "x", "hidden_sizes": "any", "rope_config": {"dtype": "float8_e4m3fn"}},
    ],
)
def test_what_configurations_of_others_may_say(values, tmp_path):
    check_config(values, "teacher", tmp_path)


CODE = "open({mark!r}, 'w').write('x')\nclass C:\n    pass\n"


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_of_a_folder_is_never_run_nor_asked_for(folder, tmp_path, where, monkeypatch):
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    path = folder / where
    content = json.loads(path.read_text()) if path.is_file() else {}
    autos = ("AutoConfig", "AutoModelForImageTextToText", "AutoImageProcessor", "AutoProcessor")
    content |= {"auto_map": dict.fromkeys(autos, "evil.C") | {"AutoTokenizer": ["evil.C", None]}}
    content |= {"config.json": {"model_type": "evil"}, "tokenizer_config.json": {"tokenizer_class": "Evil"}}.get(
        where, {"image_processor_type": "Evil"}
    )
    path.write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asks"))
    for load in (load_config, load_model, load_tokenizer, load_processor):
        try:
            load(folder, "model")
        except ValueError as error:
            assert str(error).startswith("model: ") and "\n" not in str(error)
    assert not mark.exists()


# What was published.


@pytest.fixture
def published(folder):
    seal(folder, stage="sft")
    return folder


def test_a_published_folder_is_opened_as_it_was_published(published):
    verify(published, "teacher")
    (published / "README.md").write_text("notes of one's own")
    assert resolve_folder(str(published), "teacher") == published


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flipped(f / "model.safetensors"), "model.safetensors has changed"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json is not in its list"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin is not in its list"),
        (lambda f: (f / COMPLETE).write_text("[]"), "its manifest"),
        (lambda f: (f / COMPLETE).write_text("[" * 100_000), "its manifest"),
        (lambda f: change(f / "config.json", dtype="bfloat16"), "config.json has"),
    ],
)
@pytest.mark.parametrize("checked_before", [False, True])
def test_what_differs_is_said_by_all_that_open_it(published, tmp_path, damage, message, checked_before, capsys):
    if checked_before:
        verify(published, "model")
    damage(published)
    for words in (["eval", str(published), "--n", "1"], ["export", str(published), str(tmp_path / "out")]):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"cdistill: error: model: {published} is damaged") and message in line
    assert not (tmp_path / "out").exists()


def test_a_result_without_its_list_is_no_result(published, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: x")
    (run / "metrics.jsonl").write_text("")
    shutil.copytree(published, run / "1-sft")
    assert resolve_folder(str(run), "teacher") == run / "1-sft"
    (run / "1-sft" / COMPLETE).unlink()
    for reference in (run, run / "1-sft"):
        with pytest.raises(ValueError, match=r"^teacher: .* is damaged \(its list of files, complete, is missing\)"):
            resolve_folder(str(reference), "teacher")


def test_the_working_folder_shadows_nothing_in_ranks(tmp_path):
    from cdistill.eval.run import PROGRAM
    from cdistill.reproduce.schedule import PROGRAM as OTHER
    from cdistill.runtime.launch import WORKER, where_the_package_is

    (tmp_path / "random.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "cdistill.py").write_text("raise SystemExit('shadowed')")
    for program in (PROGRAM, OTHER, WORKER):
        assert program[:2] == (sys.executable, "-P")
    code = "import random, cdistill; print(cdistill.__file__)"
    environ = {"PATH": "/usr/bin:/bin", **where_the_package_is()}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("cdistill/__init__.py")


def test_files_are_read_once_until_one_changes(folder, monkeypatch):
    found, real = [], models_folder.read_json

    def counted(path, *rest, **options):
        found.append(path.name)
        return real(path, *rest, **options)

    monkeypatch.setattr(models_folder, "read_json", counted)
    load_model(folder)
    load_tokenizer(folder, "model")
    assert found.count("tokenizer.json") == 1
    (folder / "tokenizer.json").write_text("[]")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"tokenizer\.json is corrupt"):
            load_tokenizer(folder, "model")
