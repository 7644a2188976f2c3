"""`cdistill export`: what cannot be exported is told in one line, and nothing half-written is left."""

import json
import re
import resource
import shutil

import pytest
import torch
from builtin_models import save_base
from export_cases import add_lora, qwen2_vl
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from cdistill.builtin.dataset import build_tokenizer
from cdistill.cli import main
from cdistill.models.export import export
from cdistill.models.load import load_model
from cdistill.train import load_recipe


@pytest.fixture(autouse=True)
def no_bars():
    """As for the command, which turns transformers' progress bars off before they are imported."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def damage(folder, what):
    """A folder `bad` made wrong in one way; returns what is given to export."""
    bad = folder / "bad"
    if what in ("no folder", "run"):
        bad.mkdir()
        if what == "run":
            (bad / "recipe.yaml").touch()
        return bad
    source = {"adapter": "lora", "prompt": "prompt", "qwen": "qwen", "shard": "shards"}.get(what.split()[0], "base")
    shutil.copytree(folder / source, bad)
    path = bad / "adapter_config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    match what:
        case "tokenizer":
            (bad / "tokenizer_config.json").unlink()
        case "tokenizer corrupt":
            (bad / "tokenizer.json").write_text("{")
        case "quantised":
            config = json.loads((bad / "config.json").read_text())
            (bad / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "none"}}))
        case "shard missing":
            next(bad.glob("model-00002*")).unlink()
        case "shard cut":
            next(bad.glob("model-00002*")).write_bytes(b"0" * 20)
        case "qwen without processor":
            (bad / "preprocessor_config.json").unlink()
        case "adapter without base" | "adapter of the hub":
            name = "org/model" if "hub" in what else str(folder / "gone")
            path.write_text(json.dumps(values | {"base_model_name_or_path": name}))
        case "adapter of an adapter":
            path.write_text(json.dumps(values | {"base_model_name_or_path": str(folder / "lora")}))
        case "adapter of another model":
            path.write_text(json.dumps(values | {"base_model_name_or_path": str(folder / "wide")}))
        case "adapter for other layers":
            path.write_text(json.dumps(values | {"target_modules": ["nothing_proj"]}))
        case "adapter for more layers":
            path.write_text(json.dumps(values | {"target_modules": ["q_proj", "k_proj"]}))
        case "adapter without configuration":
            path.write_text("[]")
        case "adapter without weights":
            (bad / "adapter_model.safetensors").unlink()
        case "adapter cut":
            (bad / "adapter_model.safetensors").write_bytes(b"0" * 20)
        case "adapter of no numbers":
            state = load_file(bad / "adapter_model.safetensors")
            save_file({name: value * torch.nan for name, value in state.items()}, bad / "adapter_model.safetensors")
    return bad


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    save_base(folder / "base")
    save_base(folder / "wide", hidden_size=48)
    AutoModelForCausalLM.from_pretrained(folder / "base").save_pretrained(folder / "shards", max_shard_size="10KB")
    build_tokenizer().save_pretrained(folder / "shards")
    qwen2_vl(folder / "qwen")
    add_lora(folder / "base", folder / "lora", ("q_proj",))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load_model(folder / "base"), prompt).save_pretrained(folder / "prompt")
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no folder", r"bad/config\.json is missing"),
        ("run", "the run in .*bad has no finished stage"),
        ("tokenizer", r"bad/tokenizer_config\.json is missing"),
        ("tokenizer corrupt", r"bad/tokenizer\.json is corrupt"),
        ("quantised", "the weights in .*bad are quantised"),
        ("shard missing", r"bad/model-00002.*\.safetensors is missing"),
        ("shard cut", r"bad/model-00002.*\.safetensors is corrupt"),
        ("qwen without processor", r"bad/processor_config\.json is missing"),
        ("prompt", "peft_type PROMPT_TUNING cannot be merged"),
        ("adapter without base", r"bad/adapter_config\.json: base_model_name_or_path: there is no folder '.*gone'"),
        ("adapter of the hub", "base_model_name_or_path: there is no folder 'org/model'"),
        ("adapter of an adapter", "base_model_name_or_path .*lora is an adapter itself"),
        ("adapter of another model", r"bad/adapter_config\.json does not fit its base: .*size mismatch"),
        ("adapter for other layers", r"bad/adapter_config\.json does not fit its base: .*nothing_proj"),
        ("adapter for more layers", "adapter_model.safetensors does not fit .*k_proj.* is in one of them only"),
        ("adapter without configuration", r"bad/adapter_config\.json is corrupt"),
        ("adapter without weights", r"bad/adapter_model\.safetensors is missing"),
        ("adapter cut", r"bad/adapter_model\.safetensors is corrupt"),
        ("adapter of no numbers", r"bad/adapter_model\.safetensors cannot be merged: NaNs"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(what, message, sources, tmp_path, capsys):
    for name in ("base", "wide", "shards", "qwen", "lora", "prompt"):
        (tmp_path / name).symlink_to(sources / name)
    assert main(["export", str(damage(tmp_path, what)), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"cdistill: error: model: .*{message}.*\n", said)
    assert not list(tmp_path.glob("out*"))


def test_output_is_new_or_empty_and_whole_or_not_there(tmp_path):
    model = "builtin:student-base"
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for name in ("file", "full"):
        with pytest.raises(ValueError, match=f"output: .*{name} exists and is no empty folder"):
            export(model, tmp_path / name)
    with pytest.raises(ValueError, match=r"output: .*file/x could not be written"):
        export(model, tmp_path / "file" / "x")
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, fp16, got 'int8'"):
        export(model, tmp_path / "x", dtype="int8")
    with pytest.raises(
        ValueError, match=r"model: there is no folder 'builtin:nothing'; built-in: builtin:student-base"
    ):
        export("builtin:nothing", tmp_path / "x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.part").mkdir()
    (tmp_path / "empty.part" / "left over").touch()
    assert export(model, tmp_path / "empty", code=True).remarks[0].startswith("--code: Qwen2ForCausalLM")
    assert (tmp_path / "empty" / "config.json").is_file() and not (tmp_path / "empty" / "left over").exists()
    assert (tmp_path / "empty.part" / "left over").exists()  # the user's, whatever its name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "empty.part", "file", "full"]


def test_a_full_disk_leaves_no_half_folder(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # no room for the weights
    try:
        assert main(["export", "builtin:teacher", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    start = re.escape(f"cdistill: error: output: {tmp_path / 'out'} could not be written: ")
    assert re.fullmatch(f"{start}.*File too large.*\n", said)
    assert not list(tmp_path.iterdir())


def test_tokenizer_of_a_text_model_is_the_one_in_its_files(tmp_path):
    from cdistill.models.load import load_tokenizer

    words = "USER: red ring ASSISTANT: two </s>"
    save_base(tmp_path / "base")
    assert load_tokenizer(tmp_path / "base", "model").encode(words) == build_tokenizer().encode(words)
    assert AutoTokenizer.from_pretrained(tmp_path / "base").encode(words) != build_tokenizer().encode(words)
    assert load_recipe("demo-sft", []).student.base == "builtin:student-base"
