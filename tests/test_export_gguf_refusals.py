"""`cdistill export --format gguf`: what llama.cpp cannot express is told in one line that names the field."""

import json
import resource
import sys

import pytest
import torch
from builtin_models import VISION, llava, text_config
from export_cases import chats, save, taf_student
from export_gguf_cases import SMALL, assert_answers_alike, random_student
from gguf import GGUFWriter
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GemmaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from cdistill.builtin.dataset import build_tokenizer
from cdistill.cli import main
from cdistill.models.export import export
from cdistill.models.gguf import export_gguf, tensors, writing
from cdistill.models.gguf.asking import LlamaCpp
from cdistill.models.gguf.vocabulary import make_vocabulary
from cdistill.models.processor import load_processor


def refused(capsys, *words):
    """What the command says of an export that it refuses: one line, with exit status 2."""
    assert main(["export", *map(str, words), "--format", "gguf"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A small LLaVA that can be written."""
    torch.manual_seed(0)
    return save(llava(), tmp_path_factory.mktemp("student") / "model")


FIELDS = {
    "vision_feature_select_strategy default": {"vision_feature_select_strategy": "default", "image_seq_length": 35},
    "vision_feature_layer [-1, -2]": {"vision_feature_layer": [-1, -2]},
    "vision_feature_layer [0]": {"vision_feature_layer": [0]},
    "projector_hidden_act relu": {"projector_hidden_act": "relu"},
    "vision_config.hidden_act relu": {"vision_config": {"hidden_act": "relu"}},
    "text_config.hidden_act gelu": {"text_config": {"hidden_act": "gelu"}},
    "text_config.rope_parameters.rope_type dynamic": {
        "text_config": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    },
    "text_config.rope_parameters.partial_rotary_factor": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        }
    },
    "text_config.sliding_window": {"text_config": {"layer_types": ["full_attention", "sliding_attention"]}},
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_named_that_llama_cpp_cannot_express(field, student, tmp_path, capsys):
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in student.iterdir():
        (changed / path.name).symlink_to(path)
    config = json.loads((student / "config.json").read_text())
    for name, value in FIELDS[field].items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (changed / "config.json").unlink()
    (changed / "config.json").write_text(json.dumps(config))
    assert f"model: {field}" in refused(capsys, changed, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "model: text_config.model_type gemma is not written": lambda: random_student(
        GemmaConfig(**SMALL, head_dim=16), SiglipVisionConfig(**VISION), -1
    ),
    "model: text_config.sliding_window: llama.cpp's mistral": lambda: random_student(
        MistralConfig(**SMALL, sliding_window=64), SiglipVisionConfig(**VISION), -1
    ),
    "model: vision_config.model_type vit is no encoder": lambda: random_student(
        text_config(), ViTConfig(image_size=48, patch_size=8, **WIDTHS), -1
    ),
    "model: vision_config.model_type clip_vision_model: llama.cpp takes the class token": lambda: random_student(
        text_config(), CLIPVisionConfig(image_size=48, patch_size=8, **WIDTHS), -1
    ),
    "model: its image processor makes 40 x 40 pixels": llava,
    "model: taf_activation gelu: ": lambda: taf_student(activation="gelu"),
    "model: blk.0.attn_q.weight has weights beyond 65504": lambda: large(text_config()),
}


def large(config):
    """A language model with a weight that fp16 does not have."""
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = 1e5
    return model


@pytest.mark.parametrize("start", MODELS)
def test_models_that_llama_cpp_has_not(start, tmp_path):
    model = save(MODELS[start](), tmp_path / "model")
    side = 40 if "40 x 40" in start else 48
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(model)
    with pytest.raises(ValueError) as error:
        export_gguf(model, tmp_path / "out")
    assert str(error.value).startswith(start)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["model"]


WORDS = {"a": 0, "b": 1, "</s>": 2}


def tokenizer(model, **parts):
    result = Tokenizer(model)
    for name, part in parts.items():
        setattr(result, name, part)
    return result


TOKENIZERS = {
    "model.type WordPiece": lambda: tokenizer(models.WordPiece(WORDS, unk_token="a")),
    "pre_tokenizer Whitespace": lambda: tokenizer(
        models.WordLevel(WORDS, unk_token="a"), pre_tokenizer=pre_tokenizers.Whitespace()
    ),
    "pre_tokenizer Metaspace": lambda: tokenizer(models.BPE(WORDS, []), pre_tokenizer=pre_tokenizers.Metaspace()),
    "pre_tokenizer Sequence": lambda: tokenizer(
        models.BPE(WORDS, []),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]),
    ),
    "normalizer Lowercase": lambda: tokenizer(
        models.BPE(WORDS, []), pre_tokenizer=pre_tokenizers.ByteLevel(False), normalizer=normalizers.Lowercase()
    ),
    "normalizer None": lambda: tokenizer(models.BPE(WORDS, [], byte_fallback=True)),
    "model.ignore_merges True": lambda: tokenizer(
        models.BPE(WORDS, [], ignore_merges=True), pre_tokenizer=pre_tokenizers.ByteLevel(False)
    ),
    "model.vocab ▁a": lambda: tokenizer(
        models.WordLevel({"▁a": 0, "b": 1, "</s>": 2}, unk_token="b"), pre_tokenizer=pre_tokenizers.WhitespaceSplit()
    ),
}


@pytest.mark.parametrize("field", TOKENIZERS)
def test_tokenizers_that_llama_cpp_has_not(field):
    fast = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[field](), eos_token="</s>")
    with pytest.raises(ValueError, match=f"^model: tokenizer.json: {field}: "):
        make_vocabulary(fast, 3)


def test_tokens_that_take_spaces_with_them_are_refused():
    fast = build_tokenizer()
    fast.add_tokens(AddedToken("<new>", lstrip=True))
    with pytest.raises(ValueError, match=r"^model: tokenizer.json: added_tokens <new>: llama.cpp knows no lstrip"):
        make_vocabulary(fast, 66)
    with pytest.raises(ValueError, match=r"^model: the tokenizer has 65 tokens, the embedding 64 rows$"):
        make_vocabulary(build_tokenizer(), 64)


def test_options_packages_and_outputs(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    for words in (["--dtype", "bf16"], ["--keep-taf"], ["--code"], ["--max-shard-size", "1GB"]):
        assert f"{words[0]}: --format gguf does without it" in refused(capsys, "builtin:teacher", out, *words)
    assert main(["export", "builtin:teacher", str(out), "--quantize", "f16"]) == 2
    assert capsys.readouterr().err.count("--format transformers does without it") == 1
    with pytest.raises(ValueError, match=r"^quantize must be one of f16, q8_0, q4_0, q4_k_m, got 'q2'$"):
        export_gguf("builtin:teacher", out, quantize="q2")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "xllamacpp", None)
        said = refused(capsys, "builtin:teacher", out, "--quantize", "q4_k_m")
        assert "pip install xllamacpp, or export f16 and run llama-quantize FILE q4_k_m" in said
        made = export_gguf("builtin:student-base", tmp_path / "unasked", check=True)
        assert made.checked.endswith("; llama.cpp was not asked (pip install xllamacpp)")
        capsys.readouterr()  # bars
        patch.setitem(sys.modules, "gguf", None)
        assert "pip install 'cdistill[gguf]'" in refused(capsys, "builtin:teacher", out)
    out.mkdir()
    (out / "mine").touch()
    assert "exists and is no empty folder" in refused(capsys, "builtin:teacher", out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))  # no room for the language model
    try:
        with pytest.raises(ValueError, match=r"^output: .*/full could not be written: [^\n]*$"):
            export_gguf("builtin:teacher", tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "unasked"]


def test_small_weights_are_what_was_written_within_their_scales_fp16(tmp_path):
    """As untrained rows have them: a block's scale, a 127th of its largest weight, is one of fp16's few smallest numbers."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 0, 64)[:, None]
    entries = [tensors.entry("a.weight", weight, tensors.Kind.Q8_0)]
    tensors.write_file(tmp_path / "file.gguf", GGUFWriter(None, "clip"), entries)
    assert "1 tensors" in tensors.check_file(tmp_path / "file.gguf", entries)
    entries = [tensors.entry("a.weight", weight + 2e-5, tensors.Kind.Q8_0)]
    with pytest.raises(ValueError, match=r"a\.weight is not what was written"):
        tensors.check_file(tmp_path / "file.gguf", entries)


def test_a_file_that_was_changed_is_told(tmp_path):
    weight = torch.arange(64.0).reshape(2, 32)
    entries = [tensors.entry("a.weight", weight, tensors.Kind.Q8_0), tensors.entry("b", weight[0], tensors.Kind.F16)]
    path = tmp_path / "file.gguf"
    tensors.write_file(path, GGUFWriter(None, "clip"), entries)
    assert "2 tensors" in tensors.check_file(path, entries)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 64]) + whole[-39:])
    with pytest.raises(ValueError, match=r"^output: file.gguf read back: b is not what was written$"):
        tensors.check_file(path, entries)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"^output: file.gguf read back has 2 tensors of 1: b differs$"):
        tensors.check_file(path, entries[:1])


def test_llama_cpp_still_takes_the_class_token_for_a_patch(tmp_path, monkeypatch):
    """Why CLIP is refused: this fails with a llama.cpp whose answers are transformers', and then CLIP can be written."""
    vision = CLIPVisionConfig(image_size=48, patch_size=8, **WIDTHS)
    model = random_student(text_config(**SMALL), vision, -2)
    source = save(model, tmp_path / "model")
    processor = load_processor(export(source, tmp_path / "plain").folder, "model")
    monkeypatch.setattr(writing, "check_vision", lambda config: None)
    with pytest.raises(ValueError, match=r"^output: llama.cpp answers as another model: log-probabilities differ by "):
        export_gguf(source, tmp_path / "checked", check=True)
    assert not (tmp_path / "checked").exists()
    server = LlamaCpp(export_gguf(source, tmp_path / "out").folder)

    def class_token_last(self, pixel_values, **_):
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([patches, self.class_embedding.expand(len(patches), 1, -1)], dim=1)
        return tokens + self.position_embedding(self.position_ids)

    with pytest.raises(AssertionError):
        assert_answers_alike(model, processor, server, chats()[1], tolerance=0.02)
    monkeypatch.setattr(type(model.model.vision_tower.embeddings), "forward", class_token_last)
    assert_answers_alike(model, processor, server, chats()[1], tolerance=0.02)
