"""`cdistill export --format gguf`: llama.cpp's own server, with images in its requests, answers as transformers does."""

import random
import unicodedata

import pytest
import torch
from builtin_models import VISION, text_config
from export_cases import chats, save, taf_student
from export_gguf_cases import (
    SMALL,
    TOKENS,
    WORDS,
    assert_answers_alike,
    byte_level,
    expected,
    random_student,
    token_ids,
)
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils import logging as transformers_logging

from cdistill.builtin.dataset import BuiltinDataset, build_tokenizer
from cdistill.builtin.task import BuiltinTask
from cdistill.models.export import export
from cdistill.models.gguf import export_gguf
from cdistill.models.gguf.asking import LlamaCpp
from cdistill.models.gguf.vision import image_remark
from cdistill.models.load import ASSETS, load_model
from cdistill.models.processor import load_processor


@pytest.fixture(autouse=True)
def no_bars():
    """As for the command, which turns transformers' progress bars off before they are imported."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def test_the_built_in_teacher_answers_alike(tmp_path):
    made = export_gguf("builtin:teacher", tmp_path / "out")
    server = LlamaCpp(made.folder)
    folder = ASSETS / "teacher"
    model, processor = load_model(folder, attention="eager").eval(), load_processor(folder, "model")
    assert made.remarks[-1].endswith("make them square first")
    bilinear = SiglipImageProcessorPil(size={"height": 48, "width": 48}, resample=2)
    assert image_remark(model.config, bilinear).endswith("make them 48 x 48 pixels first")
    data = BuiltinDataset(BuiltinTask(turns=3), size=6, seed=3, held_out=True)
    for i in range(len(data)):
        conversation = data.messages(i)
        for asked in (conversation[:1], conversation[:3]):
            assert_answers_alike(model, processor, server, asked, tolerance=0.01)
    for messages in chats():  # two images in a question
        assert_answers_alike(model, processor, server, messages, tolerance=0.01)
    for side in (20, 96):  # squares that must be resized
        asked = data.messages(0)[:1]
        asked[0]["content"][0]["image"] = asked[0]["content"][0]["image"].resize((side, side))
        assert_answers_alike(model, processor, server, asked, tolerance=0.02)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
KINDS = {
    "all layers, llama with llama3 rope and biases": (
        LlamaConfig(**SMALL, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
        {"hidden_act": "quick_gelu"},
        -1,
    ),
    "all but one layer, mistral": (MistralConfig(**SMALL, sliding_window=None), {"hidden_act": "gelu"}, -2),
    "two layers, qwen3 with wide heads": (Qwen3Config(**SMALL, head_dim=32, rope_parameters=LINEAR), {}, [-2, -1]),
    "the first layer, qwen2 tied": (text_config(**SMALL), {}, 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_families_and_layers_answer_alike(name, tmp_path):
    text, vision, layer = KINDS[name]
    model = random_student(text, SiglipVisionConfig(**VISION | vision), layer)
    source = save(model, tmp_path / "model")
    processor = load_processor(export(source, tmp_path / "plain").folder, "model")
    server = LlamaCpp(export_gguf(source, tmp_path / "out").folder)
    for messages in chats():
        assert_answers_alike(model, processor, server, messages, tolerance=0.008)


LLAVA = """\
{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}\
{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}\
{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}\
{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != "system" %}
        {{- "<|im_start|>system\\nYou are a helpful assistant.</s>\\n" }}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- if message.content is string %}{{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == "image" %}{{- "<image>" }}{%- else %}{{- part.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- "</s>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""


@pytest.mark.parametrize("template", [LLAVA, CHATML], ids=["llava-hf", "chatml"])
@pytest.mark.parametrize("of", ["GPT-2", "Llama 2"])
def test_templates_and_stops_of_real_models(template, of, tmp_path):
    if of == "GPT-2":
        made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ascii_alone=True)
    else:
        made = sentence_piece("first", 128)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    text = LlamaConfig(**SMALL | {"vocab_size": len(tokenizer)})
    model = random_student(text, SiglipVisionConfig(**VISION), -2, tokenizer)
    source = tmp_path / "model"
    said = []
    for count in (1, 2):
        stops = [1, *said[2:3]][:count]
        model.generation_config.eos_token_id = stops
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        processor = load_processor(export(source, tmp_path / f"plain{stops}").folder, "model")
        server = LlamaCpp(export_gguf(source, tmp_path / f"out{stops}").folder)
        said = expected(model, processor, chats()[0])[0]
        assert len(said) == TOKENS if count == 1 else said[-1] == stops[1]
        for messages in chats():
            assert_answers_alike(model, processor, server, messages, tolerance=0.02)
        words = [{"role": "user", "content": [{"type": "text", "text": "the quick brown fox"}]}]
        assert_answers_alike(model, processor, server, words, tolerance=0.02)


def test_a_merged_taf_adapter_is_llama_cpps_mlp(tmp_path):
    student = taf_student()
    source = save(student, tmp_path / "student")
    processor = load_processor(export(source, tmp_path / "plain").folder, "model")
    made = export_gguf(source, tmp_path / "out")
    assert made.merged == ("TAF",)
    shapes = {tensor.name: tensor.shape.tolist() for tensor in GGUFReader(made.folder / "mmproj-f16.gguf").tensors}
    assert shapes["mm.0.weight"] == [16, 64] and shapes["mm.2.weight"] == [64, 32]  # the teacher's width between
    server = LlamaCpp(made.folder)
    for messages in chats():
        assert_answers_alike(student, processor, server, messages, tolerance=0.01)


TEXTS = [
    *(
        "",
        " ",
        "a",
        "  two  spaces ",
        "tabs\tand\nlines\n\n\nend",
        "don't DON'T we'll 3.14159 1e-5 007",
        "x=y+z; // ok!",
    ),
    *(
        "ünïcödé ÀÉ ß 漢字かな 한국어 🙂🙃 e\u0301",
        "USER: <image>\nwhat?</s> ASSISTANT:",
        "naïve,café;日本語!",
        " lead",
        "trail ",
    ),
]


def texts(words):
    """Texts of words, numbers, spaces and marks in any order."""
    rng = random.Random(0)
    pieces = [*words, *"0123456789", " ", "  ", "\n", "\t", ".", ",", "!?", "'s", "'RE", "(", "</s>", "_", "é", "🙂"]
    return [*TEXTS, *("".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(200))]


def split(digits):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def sentence_piece(scheme="every", byte_tokens=256):
    """BPE over characters as Llama 2 has it, every split of a word among its merges, in the order of what they make.

    ``scheme``: before which texts a space is put, as transformers 4 saves it (every) or as its Metaspace says.
    """
    letters = sorted({letter for word in WORDS for letter in f"▁{word}"})
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(byte_tokens)), "<pad>", "<image>"]
    pieces = []
    for word in WORDS:
        for length in range(2, len(word) + 2):
            pieces += [
                piece for i in range(length - 1) if (piece := f"▁{word}"[i:length]) not in pieces and len(piece) > 1
            ]
    pieces.sort(key=lambda piece: (len(piece), piece))
    ids = {piece: i for i, piece in enumerate([*vocabulary, *pieces, *letters])}
    merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in ids and p[i:] in ids]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "every":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>", "<image>"])
    return tokenizer


TOKENIZERS = {
    "GPT-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "SmolLM": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    ),
    "Qwen 2": lambda: byte_level(split(""), normalizer=normalizers.NFC()),
    "Llama 3": lambda: byte_level(split("{1,3}"), ignore_merges=True),
    "Llama 2, a space before every text": sentence_piece,
    "Llama 2, a space before texts without one": lambda: sentence_piece("always"),
    "Llama 2, a space before a prompt": lambda: sentence_piece("first"),
    "Llama 2, no space": lambda: sentence_piece("never"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_texts_alike(name, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[name](), eos_token="</s>", pad_token="<pad>")
    config = text_config(vocab_size=len(tokenizer) + 3, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    server = LlamaCpp(export_gguf(tmp_path / "model", tmp_path / "out").folder)
    for text in texts(WORDS):
        if "without one" in name and (text.startswith(" ") or "</s> " in text):
            continue  # of which the export says that they are cut otherwise
        if name == "Qwen 2" and not unicodedata.is_normalized("NFC", text):
            continue
        given = text
        if "a prompt" in name and not text.startswith((" ", "<")):
            given = f" {text}" if text else text  # as the chat template writes it
        assert token_ids(server, given) == tokenizer(text, add_special_tokens=False)["input_ids"], repr(text)


def test_llama_cpp_cuts_the_built_in_words_alike(tmp_path):
    server = LlamaCpp(export_gguf("builtin:student-base", tmp_path / "out").folder)
    tokenizer, rng = build_tokenizer(), random.Random(0)
    words = list(tokenizer.get_vocab())
    for _ in range(300):
        text = " ".join(rng.choices(words, k=rng.randint(1, 12)))
        assert token_ids(server, text) == tokenizer(text)["input_ids"], text


def weights_of(folder):
    """Tensors of the files in a folder, as llama.cpp reads them, in the order of transformers' axes; and their formats."""
    tensors = [tensor for path in sorted(folder.iterdir()) for tensor in GGUFReader(path).tensors]
    values = {t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in tensors}
    return {name: torch.tensor(value) for name, value in values.items()}, {t.name: t.tensor_type for t in tensors}


@pytest.mark.parametrize("quantize", ["f16", "q8_0", "q4_0", "q4_k_m"])
def test_every_weight_is_there_and_what_it_was(quantize, tmp_path):
    made = export_gguf("builtin:teacher", tmp_path / "out", quantize=quantize, check=True)
    assert sorted(path.name for path in made.folder.iterdir()) == ["mmproj-f16.gguf", f"model-{quantize}.gguf"]
    assert made.checked.count("read back") == 2 and "llama.cpp gives the same reply" in made.checked
    found, kinds = weights_of(made.folder)
    model = load_model(ASSETS / "teacher")
    language, tower, adapter = model.model.language_model, model.model.vision_tower, model.model.multi_modal_projector
    layer, eye = language.layers[7], tower.encoder.layers[0]
    wanted = {
        "token_embd.weight": language.embed_tokens,
        "output_norm.weight": language.norm,
        "blk.7.attn_q.weight": layer.self_attn.q_proj,
        "blk.7.attn_output.weight": layer.self_attn.o_proj,
        "blk.7.ffn_down.weight": layer.mlp.down_proj,
        "blk.7.ffn_gate.weight": layer.mlp.gate_proj,
        "blk.7.ffn_norm.weight": layer.post_attention_layernorm,
        "v.patch_embd.weight": tower.embeddings.patch_embedding,
        "v.position_embd.weight": tower.embeddings.position_embedding,
        "v.blk.0.attn_out.weight": eye.self_attn.out_proj,
        "v.blk.0.ffn_up.weight": eye.mlp.fc1,
        "mm.0.weight": adapter.linear_1,
        "mm.2.weight": adapter.linear_2,
    }
    assert len(found) == 8 * 12 + 2 + 16 + 3 + 4 and not any("v.blk.1" in name for name in found)  # layer -2 of 2
    for name, module in wanted.items():
        weight, kind = module.weight.detach(), kinds[name]
        exact = weight if weight.ndim == 1 or ("embd" in name and name.startswith("v.")) else weight.half().float()
        if quantize == "f16" or not name.startswith(("blk", "token")) or weight.ndim == 1:
            assert torch.equal(found[name], exact), name
        elif quantize == "q8_0":
            blocks = weight.reshape(-1, 32).abs().amax(1, keepdim=True).expand(-1, 32).reshape(weight.shape)
            assert kind == GGMLQuantizationType.Q8_0 and ((found[name] - weight).abs() <= blocks * 0.0045).all(), name
        elif quantize == "q4_0" and name.startswith("blk"):
            blocks = weight.reshape(-1, 32).abs().amax(1, keepdim=True).expand(-1, 32).reshape(weight.shape)
            assert kind == GGMLQuantizationType.Q4_0 and ((found[name] - weight).abs() <= blocks * 0.126).all(), name
        else:
            assert (found[name] - weight).norm() < 0.08 * weight.norm(), name
    if quantize == "q4_k_m":  # rows of 96 and 192 are no whole blocks of 256: what llama.cpp takes instead
        assert kinds["token_embd.weight"] == kinds["blk.7.ffn_down.weight"] == GGMLQuantizationType.Q8_0
        assert kinds["blk.7.attn_q.weight"] == kinds["blk.4.ffn_down.weight"] == GGMLQuantizationType.Q5_0


def test_q4_k_m_is_llama_cpps_mixture(tmp_path):
    config = text_config(
        **SMALL | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8, "initializer_range": 0.05}
    )
    torch.manual_seed(0)
    save(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    made = export_gguf(tmp_path / "model", tmp_path / "out", quantize="q4_k_m", check=True)
    found, kinds = weights_of(made.folder)
    six = {name for name, kind in kinds.items() if kind == GGMLQuantizationType.Q6_K}
    more = {f"blk.{i}.{part}.weight" for i in (0, 3, 6, 7) for part in ("attn_v", "ffn_down")}
    assert six == more | {"token_embd.weight"}
    assert {kinds[f"blk.1.{part}.weight"] for part in ("attn_v", "ffn_down", "attn_q")} == {GGMLQuantizationType.Q4_K}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    weight = model.model.layers[1].mlp.up_proj.weight
    assert (found["blk.1.ffn_up.weight"] - weight).norm() < 0.1 * weight.norm()
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {
        "attn_output": "self_attn.o_proj",
        **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    }
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for ours, theirs in names.items():
                layer.get_submodule(theirs).weight.copy_(found[f"blk.{i}.{ours}.weight"])
        model.model.embed_tokens.weight.copy_(found["token_embd.weight"])
        ids = build_tokenizer()("USER: how many ring ? ASSISTANT:", return_tensors="pt")["input_ids"]
        scores = torch.log_softmax(model(ids).logits[0, -1], -1)
    messages = [{"role": "user", "content": "how many ring ?"}]
    answer = LlamaCpp(made.folder).chat(messages, tokens=1, logprobs=True, top_logprobs=20)
    for other in answer["logprobs"]["content"][0]["top_logprobs"]:
        assert abs(other["logprob"] - scores[other["id"]]) < 0.1


def test_a_prompt_that_llama_cpp_cuts_otherwise_is_told(tmp_path):
    """A space after a special token: transformers 5 puts none before it, llama.cpp does."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentence_piece("always"), eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{% for message in messages %}</s> {{ message.content }}{% endfor %}"
    config = text_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"^output: llama.cpp makes \d+ tokens of a prompt, of which transformers makes "
    ):
        export_gguf(tmp_path / "model", tmp_path / "out", check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
