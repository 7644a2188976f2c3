"""What `cdistill export` writes has the names, fields and files of published checkpoints, and is read back the same.

Other versions of transformers read such folders in `python -m benchmarks.readers`.
"""

import json
import re

import family_sweep
import pytest
import torch
from builtin_models import save_base
from export_cases import batch, save, taf_student
from family_models import FAMILIES, build, draw
from safetensors import safe_open
from transformers import AutoTokenizer, Gemma3TextConfig, GPTNeoXConfig, LlamaTokenizer, Qwen3MoeConfig, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from cdistill.cli import main
from cdistill.models import readback
from cdistill.models.export import export
from cdistill.models.export_check import compare, expected_replies, fault, make_prompts, picture
from cdistill.models.load import ASSETS, load_model, load_tokenizer
from cdistill.models.processor import load_processor
from cdistill.models.published import publish, published_config, published_name, unread_by_older, weight_rules

LANGUAGE = (
    "language_model.model.embed_tokens language_model.model.layers language_model.model.norm language_model.lm_head"
)
PROJECTOR = "multi_modal_projector.linear_1 multi_modal_projector.linear_2"
SIGLIP = """vision_tower.vision_model.embeddings.patch_embedding vision_tower.vision_model.embeddings.position_embedding
    vision_tower.vision_model.encoder.layers vision_tower.vision_model.post_layernorm"""
CLIP = f"{SIGLIP} vision_tower.vision_model.embeddings.class_embedding vision_tower.vision_model.pre_layrnorm"
QWEN = "model.embed_tokens model.layers model.norm lm_head visual.patch_embed.proj visual.blocks visual.merger"
# Modules with weights, as llava-hf/llava-1.5, llava-v1.6, llava-onevision and Qwen/Qwen2-VL, Qwen2.5-VL name them.
PUBLISHED = {
    "llava_llama": f"{LANGUAGE} {PROJECTOR} {SIGLIP}",
    "llava_qwen2": f"{LANGUAGE} {PROJECTOR} {SIGLIP}",
    "llava_next": f"{LANGUAGE} {PROJECTOR} {CLIP} image_newline",
    "llava_onevision": f"{LANGUAGE} {PROJECTOR} {SIGLIP} image_newline",
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
}
FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "preprocessor_config.json", "processor_config.json"),
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def modules(folder):
    """Names of modules with weights: of a layer, a block or a merger its first part alone."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = {name.removesuffix(".weight").removesuffix(".bias") for name in file.keys()}  # noqa: SIM118
    return {re.sub(r"(layers|blocks|merger)\..*", r"\1", name) for name in names}


def saved(name, folder):
    """A model of a family as transformers 5 saves it, its processor's settings in one file."""
    model, processor = build(name, 0), FAMILIES[name].processor()
    model.config._name_or_path = str(folder)
    model.save_pretrained(folder)
    processor.tokenizer.chat_template = TEMPLATE
    processor.tokenizer.save_pretrained(folder)
    images = json.loads(processor.image_processor.to_json_string())
    settings = {"processor_class": FAMILIES[name].model.replace("ForConditionalGeneration", "Processor")}
    (folder / "processor_config.json").write_text(json.dumps(settings | {"image_processor": images}))
    for file in ("config.json", "tokenizer_config.json"):  # as older versions have written them
        values = json.loads((folder / file).read_text())
        values |= {"_name_or_path": str(folder), "name_or_path": str(folder)}
        values |= {part: value | {"_name_or_path": str(folder)} for part, value in values.items() if "_config" in part}
        (folder / file).write_text(json.dumps(values))
    return model, processor


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_fields_and_files_are_those_of_published_checkpoints(name, tmp_path):
    model, processor = saved(name, tmp_path / "made")
    out = export(tmp_path / "made", tmp_path / "out").folder
    assert modules(out) == set(PUBLISHED[name].split())
    assert {path.name for path in out.iterdir()} == FILES
    for path in out.glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
    config = json.loads((out / "config.json").read_text())
    qwen = name.startswith("qwen")
    text = config if qwen else config["text_config"]
    assert ("text_config" in config) != qwen and ("model_type" in config["vision_config"]) != qwen
    assert config["torch_dtype"] == "float32" and text["rope_theta"] == 10000.0
    assert text["rope_scaling"] == ({"type": "mrope", "mrope_section": [2, 3, 3]} if qwen else None)
    assert text["tie_word_embeddings"] is config["tie_word_embeddings"] is False
    for part in (config, text, config["vision_config"]):
        assert not part.keys() & {"dtype", "rope_parameters"}
    words = json.loads((out / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast" and words["chat_template"].endswith(TEMPLATE)
    assert words["model_input_names"] == ["input_ids", "attention_mask"]  # 4 adds token_type_ids, which no LLaVA takes
    assert not isinstance(words.get("extra_special_tokens", {}), list)
    assert "image_processor" not in json.loads((out / "processor_config.json").read_text())

    loaded = load_model(out, dtype="auto", attention="eager").eval()
    inputs = {key: value for key, value in draw(name, 3).items() if key != "labels"}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    text = "w1 <image> <|image_pad|> w2 </s>"
    assert AutoTokenizer.from_pretrained(out).encode(text) == processor.tokenizer.encode(text)
    images = AutoImageProcessor.from_pretrained(out)
    shown = {"images": picture(0).numpy(), "return_tensors": "pt"}
    assert torch.equal(images(**shown)["pixel_values"], processor.image_processor(**shown)["pixel_values"])


def test_a_folder_in_published_names_is_exported_as_the_same_weights_in_shards(tmp_path):
    model = save(taf_student(width=32), tmp_path / "made")
    once = export(model, tmp_path / "once").folder
    assert modules(once) == set(f"{LANGUAGE} {PROJECTOR} {SIGLIP}".split()) - {"language_model.lm_head"}  # tied
    arguments = ["export", str(once), str(tmp_path / "twice"), "--max-shard-size", "20000"]
    assert main(arguments) == 0
    index = json.loads((tmp_path / "twice" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    with safe_open(once / "model.safetensors", framework="pt") as whole:
        assert set(whole.keys()) == index.keys()
        for name, file in index.items():
            with safe_open(tmp_path / "twice" / file, framework="pt") as shard:
                assert torch.equal(shard.get_tensor(name), whole.get_tensor(name))
    for size in ("0GB", "5 GB", "-1", "much"):
        with pytest.raises(
            ValueError, match=f"^max_shard_size must be a number of bytes or such as 5GB, got '{size}'$"
        ):
            export(once, tmp_path / "three", max_shard_size=size)


def test_rotary_positions_are_said_as_older_configurations_say_them():
    def rope(**values):
        return {key: value for key, value in published_config({"rope_parameters": values}).items() if "rope" in key}

    assert rope(rope_type="default", rope_theta=1e6) == {"rope_theta": 1e6, "rope_scaling": None}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert rope(rope_theta=1e6, **yarn) == {"rope_theta": 1e6, "rope_scaling": yarn}
    assert rope(rope_type="axial", rope_theta=1e4) == {"rope_theta": 1e4}
    partial = published_config(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    )
    assert partial == {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": None}
    gemma = Gemma3TextConfig().to_dict()  # sliding layers have a base of their own
    gemma["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    said = published_config(gemma)
    assert "rope_parameters" not in said and not unread_by_older({"text_config": said})
    assert (said["rope_theta"], said["rope_local_base_freq"]) == (1e6, 1e4)
    assert said["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert Gemma3TextConfig(**said).rope_parameters == gemma["rope_parameters"]
    other = published_config(gemma | {"model_type": "other"})  # of which no one name is known: one would lose the other
    assert other["rope_parameters"] == gemma["rope_parameters"]
    assert "rotary positions differ from layer to layer" in unread_by_older({"text_config": other})[0]


def test_names_that_older_versions_have_for_fields_and_towers():
    neox = GPTNeoXConfig(rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5})
    said = published_config(neox.to_dict())
    assert (said["rotary_emb_base"], said["rotary_pct"]) == (500.0, 0.5)
    assert GPTNeoXConfig(**said).rope_parameters == neox.rope_parameters
    said = published_config(Qwen3MoeConfig(num_experts=4).to_dict())
    assert said["num_experts"] == 4 and "num_local_experts" not in said
    for tower in ("vision_tower", "model.vision_tower", "image_tower", "model.vision_model"):
        rules = weight_rules({"model_type": "any", "vision_config": {"model_type": "siglip_vision_model"}})
        for part in ("embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.bias", "head.probe"):
            published = published_name(f"{tower}.{part}", rules)
            assert published == f"{tower}.vision_model.{part}"
            assert published_name(published, rules) == published
            assert published_name(f"{tower}.{part}", weight_rules({"model_type": "any"})) == f"{tower}.{part}"


def rope(config):
    values = getattr(config, "rope_parameters", None) or {}
    return {
        name: value for name, value in values.items() if name != "type"
    }  # an older name of rope_type, kept beside it


def test_every_family_reads_its_published_configuration_as_its_own(tmp_path):
    read, kept = 0, []
    for name in family_sweep.FAMILIES:
        try:
            config = family_sweep.small_config(name, 2)
            text = config.get_text_config(decoder=True)
        except Exception:  # of the family's own code
            continue
        for part in (config, text):
            if "rope_theta" in (getattr(part, "rope_parameters", None) or {}):
                part.rope_parameters["rope_theta"] = 500.0
        config.save_pretrained(tmp_path)
        wanted = type(config).from_pretrained(tmp_path)
        kept += [name] * len(publish(tmp_path, "output"))
        found = type(config).from_pretrained(tmp_path)
        for ours, theirs in (
            (found, wanted),
            (found.get_text_config(decoder=True), wanted.get_text_config(decoder=True)),
        ):
            assert rope(ours) == rope(theirs), name
        read += 1
    assert read > 200
    assert {"muse_spark", "olmo3"} & set(family_sweep.FAMILIES) <= set(kept) and not {
        "llava",
        "gemma3",
        "qwen3_vl",
        "llama",
        "phi3",
    } & set(kept)


def test_the_number_format_is_that_of_every_part(tmp_path):
    export("builtin:teacher", tmp_path / "out", dtype="bf16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        assert part["torch_dtype"] == "bfloat16"


def test_the_tokenizer_of_an_exported_text_model_is_the_one_in_its_files(tmp_path):
    out = export(save_base(tmp_path / "base"), tmp_path / "out").folder
    words = "USER: red ring ASSISTANT: two </s>"
    assert load_tokenizer(out, "model").encode(words) == load_tokenizer(tmp_path / "base", "model").encode(words)


def test_a_tokenizer_of_transformers_5_is_what_its_file_says_and_not_what_older_classes_add(tmp_path):
    words = LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, merges=[])
    words.add_special_tokens({"extra_special_tokens": ["<image>"]})
    save_base(tmp_path / "base", tokenizer=words)
    assert json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    out = export(tmp_path / "base", tmp_path / "out").folder
    values = json.loads((out / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast" and values["additional_special_tokens"] == ["<image>"]
    assert load_tokenizer(out, "model").encode("ab <image>") == words.encode("ab <image>")


def test_a_folder_that_is_another_model_is_found_out(tmp_path):
    model = load_model(ASSETS / "teacher", dtype="auto", attention="eager").eval()
    out = export("builtin:teacher", tmp_path / "out").folder
    prompts = make_prompts(load_processor(ASSETS / "teacher", "model"), [[picture(0)]])
    wanted = expected_replies(model, prompts, 4)
    request = {"folder": str(out), "code": False, "cdistill": False, "tokens": 4, "prompts": prompts}
    request["threads"] = torch.get_num_threads()

    def said():
        result = readback.answer(request)
        return result["error"] if "error" in result else fault(compare(wanted, prompts, result), torch.float32)

    assert said() is None
    files = {path.name: path.read_bytes() for path in out.iterdir()}

    def change(name, old, new):
        for file, content in files.items():
            (out / file).write_bytes(content)
        assert files[name].count(old)
        (out / name).write_bytes(files[name].replace(old, new))

    change("model.safetensors", b"vision_tower.vision_model.post", b"vision_tower.vision_model.pose")
    assert re.fullmatch(
        r"2 weights missing \(such as .*post_layernorm.*\), 2 weights unexpected \(such as .*pose.*\)", said()
    )
    change("config.json", b'"rope_theta": 10000.0', b'"rope_theta": 50.0')
    assert re.fullmatch(r"logits differ by [1-9].*", said())
    change("preprocessor_config.json", b'"do_rescale": true', b'"do_rescale": false')
    assert re.fullmatch(r"pixel values differ by .*", said())
    change("tokenizer.json", b'"the"', b'"teh"')
    assert said() == "the processor makes other tokens of a question"
    change("processor_config.json", b"LlavaProcessor", b"NoProcessor")  # transformers takes the tokenizer alone
    assert said() == "the processor makes other tokens of a question"
    change("preprocessor_config.json", b"SiglipImage", b"NoImage")
    assert said() == "the processor cannot be loaded"
    change("config.json", b'"llava"', b'"lava"')
    assert "lava" in said()


def test_a_folder_is_checked_in_a_fresh_process_before_it_gets_its_name(tmp_path, capsys):
    student = save(taf_student(), tmp_path / "student")
    assert main(["export", str(student), str(tmp_path / "out"), "--check", "--code"]) == 0
    assert modules(tmp_path / "out") == set(f"{LANGUAGE} {PROJECTOR} {SIGLIP}".split()) - {"language_model.lm_head"}
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"read back in a fresh process: same replies, logits within \S+ of \S+", said[-2])
    torch.testing.assert_close(
        load_model(tmp_path / "out")(**batch()).logits, taf_student()(**batch()).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("taf", [False, True])
def test_a_pipeline_answers_a_batch_as_it_answers_each_alone(taf, tmp_path):
    """Prompts of unequal length are padded by transformers' own pipeline, on the side that the folder says."""
    if taf:
        save(taf_student(), tmp_path / "trained")
    export(tmp_path / "trained" if taf else "builtin:teacher", tmp_path / "student", merge_taf=False)
    ask = pipeline("image-text-to-text", model=str(tmp_path / "student"), device="cpu")
    words = ["describe the scene", "how many red circles are there ?", "A"]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture(i)}, {"type": "text", "text": text}]}]
        for i, text in enumerate(words)
    ]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = [ask(text=chat, **options)[0]["generated_text"] for chat in chats]
    together = [replies[0]["generated_text"] for replies in ask(text=chats, batch_size=3, **options)]
    assert together == alone and len(set(alone)) > 1
    assert ask.tokenizer.padding_side == "left"
