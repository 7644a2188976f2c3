"""`cdistill export`: folders that a fresh process loads by transformers' auto classes, with the same logits and answers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builtin_models import VISION, llava, recipe_values, save_base
from export_cases import add_lora, batch, chats, images, qwen2_vl, save, taf_student, text_batch, text_chats
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging as transformers_logging

from cdistill.builtin.dataset import ASSISTANT, EOS, NUM_VISUAL_TOKENS, USER, BuiltinDataset, build_tokenizer
from cdistill.builtin.render import to_image
from cdistill.builtin.task import BuiltinTask
from cdistill.cli import main
from cdistill.data.samples import IGNORE_INDEX, IMAGE_TOKEN
from cdistill.models import MergedAdapter, TAFAdapter, TAFLlavaForConditionalGeneration, check_pair, taf
from cdistill.models.export import export, merge_taf_map
from cdistill.models.load import ASSETS, load_model
from cdistill.models.processor import build_processor, check_image_processors, load_processor
from cdistill.runtime.checkpoints import seal
from cdistill.train import run
from cdistill.train.build import build_models

HERE = Path(__file__).parent
TOKENS = 6


@pytest.fixture(autouse=True)
def no_bars():
    """As for the command, which turns transformers' progress bars off before they are imported."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def case(folder, inputs, messages, code=False):
    return {"folder": str(folder), "inputs": inputs, "messages": messages, "code": code, "tokens": TOKENS}


@torch.no_grad()
def expected(model, inputs):
    return {
        "logits": model(**inputs).logits,
        "answer": model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False),
    }


def fresh(order, cases, folder):
    """What a process of its own, offline, makes of exported folders; see load_exported.py."""
    folder.mkdir()
    torch.save({**cases, "threads": torch.get_num_threads()}, folder / "cases")
    command = [sys.executable, str(HERE / "load_exported.py"), order, str(folder / "cases"), str(folder / "results")]
    environ = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert ended.returncode == 0, ended.stderr
    return torch.load(folder / "results", weights_only=False)


def assert_loads_alike(result, wanted, name, *, exact=True, inputs=None, **tolerance):
    """Class, logits and answer of a fresh process; its processor made of the messages what `inputs` are."""
    assert result["class"].rpartition(".")[2] == name
    if exact:
        assert torch.equal(result["logits"], wanted["logits"])
    else:
        torch.testing.assert_close(result["logits"], wanted["logits"], **tolerance)
    assert torch.equal(result["answer"], wanted["answer"])
    if inputs is not None:
        assert result["processed"].keys() >= inputs.keys()
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(result["processed"][key], inputs[key])
        if "pixel_values" in inputs:
            torch.testing.assert_close(result["processed"]["pixel_values"], inputs["pixel_values"], rtol=0, atol=1e-6)


def test_folders_load_where_cdistill_is_not(tmp_path, capsys):
    images, texts = batch(), text_batch()
    stock, language = llava(), load_model(save_base(tmp_path / "language"))
    save(stock, tmp_path / "stock")
    stock.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    build_tokenizer().save_pretrained(tmp_path / "shards")
    linear, gelu, same = taf_student(), taf_student(activation="gelu"), taf_student(width=32)
    for name, model in (("linear", linear), ("gelu", gelu), ("same", same)):
        save(model, tmp_path / name)
    adapted = add_lora(tmp_path / "linear", tmp_path / "lora")
    shutil.copy(tmp_path / "linear" / "config.json", tmp_path / "lora")  # as in a folder that holds everything
    qwen, qwen_inputs = qwen2_vl(tmp_path / "qwen")

    names = ("stock", "language", "linear", "gelu", "same", "lora", "qwen")
    for name in names:
        code = ["--code"] if name in ("linear", "gelu", "lora") else []
        assert main(["export", str(tmp_path / name), str(tmp_path / "out" / name), *code]) == 0
    export(tmp_path / "shards", tmp_path / "out" / "shards", max_shard_size="20KB")
    said = capsys.readouterr().out.splitlines()
    assert f"TAFLlavaForConditionalGeneration in fp32, LoRA and TAF merged -> {tmp_path / 'out' / 'lora'}" in said
    assert f"LlavaForConditionalGeneration in fp32, TAF merged -> {tmp_path / 'out' / 'same'}" in said
    assert f"TAFLlavaForConditionalGeneration in fp32 -> {tmp_path / 'out' / 'gelu'}" in said
    assert len(list((tmp_path / "out" / "shards").glob("model-*.safetensors"))) > 2
    source = (HERE.parent / "cdistill" / "models" / "taf.py").read_bytes()
    assert (tmp_path / "out" / "linear" / "modeling_cdistill_taf.py").read_bytes() == source
    assert not list((tmp_path / "out" / "stock").glob("*.py"))

    cases = {name: case(tmp_path / "out" / name, images, chats()) for name in ("stock", "shards", "same")}
    cases |= {name: case(tmp_path / "out" / name, images, chats(), code=True) for name in ("linear", "gelu", "lora")}
    cases["language"] = case(tmp_path / "out" / "language", texts, text_chats())
    cases["qwen"] = case(tmp_path / "out" / "qwen", qwen_inputs, None)  # its video processor needs torchvision
    results = fresh("without", cases, tmp_path / "fresh")
    for name in ("stock", "shards"):
        assert_loads_alike(results[name], expected(stock, images), "LlavaForConditionalGeneration", inputs=images)
    assert results["stock"]["class"].startswith("transformers.")
    assert_loads_alike(results["language"], expected(language, texts), "Qwen2ForCausalLM", inputs=texts)
    assert_loads_alike(results["gelu"], expected(gelu, images), "TAFLlavaForConditionalGeneration", inputs=images)
    assert_loads_alike(results["qwen"], expected(qwen, qwen_inputs), "Qwen2VLForConditionalGeneration")
    assert (tmp_path / "out" / "qwen" / "tokenizer.json").read_bytes() == (
        tmp_path / "qwen" / "tokenizer.json"
    ).read_bytes()
    ours, theirs = (AutoImageProcessor.from_pretrained(tmp_path / name) for name in ("out/qwen", "qwen"))
    assert ours.to_dict() == theirs.to_dict()
    merged = {"linear": linear, "lora": adapted, "same": same}
    for name, model in merged.items():
        kind = "LlavaForConditionalGeneration" if name == "same" else "TAFLlavaForConditionalGeneration"
        plain = expected(model, images)
        assert_loads_alike(results[name], plain, kind, exact=False, inputs=images, rtol=1e-4, atol=1e-4)
        exact = model.double()(**images | {"pixel_values": images["pixel_values"].double()}).logits
        ours, eager = (results[name]["logits"] - exact).abs().max(), (plain["logits"] - exact).abs().max()
        assert ours <= 2 * eager + 1e-5 * exact.abs().max()


@pytest.mark.parametrize("order", ["before", "after"])
def test_importing_cdistill_is_enough_for_the_auto_classes(order, tmp_path):
    student, inputs = taf_student(), batch()
    save(student, tmp_path / "student")
    export(tmp_path / "student", tmp_path / "kept", merge_taf=False)
    export(tmp_path / "student", tmp_path / "merged", code=True)
    cases = {name: case(tmp_path / name, inputs, chats()) for name in ("kept", "merged")}
    results = fresh(order, cases, tmp_path / "fresh")
    wanted = expected(student, inputs)
    assert_loads_alike(results["kept"], wanted, "TAFLlavaForConditionalGeneration", inputs=inputs)
    assert_loads_alike(results["merged"], wanted, "TAFLlavaForConditionalGeneration", exact=False, rtol=1e-4, atol=1e-4)
    assert {result["class"].rpartition(".")[0] for result in results.values()} == {"cdistill.models.taf"}


def test_registration_survives_any_first_import_and_a_reload():
    code = (
        "import importlib, sys\n"
        "import cdistill.models.taf\n"
        "from transformers.models.auto import configuration_auto as auto\n"
        "kind = cdistill.models.taf.TAFLlavaConfig\n"
        "assert auto.CONFIG_MAPPING['cdistill_taf_llava'] is kind\n"
        "importlib.reload(auto)\n"
        "assert auto.CONFIG_MAPPING['cdistill_taf_llava'] is kind\n"
        "importlib.reload(cdistill)\n"
        "assert sum(type(finder).__module__ == 'cdistill._register' for finder in sys.meta_path) == 1\n"
        "assert type(auto.__loader__) is type(auto.__spec__.loader) is type(cdistill.__loader__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)


def conversation(item, data, index):
    """The messages of a sample of the built-in task, taken from its tokens."""
    words = " ".join(data.tokenizer.convert_ids_to_tokens(item["input_ids"])).replace(f"{IMAGE_TOKEN} ", "")
    messages = []
    for turn in words.split(f"{USER} ")[1:]:
        question, answer = turn.split(f" {ASSISTANT} ")
        asked = [{"type": "text", "text": question}]
        if not messages and "pixel_values" in item:
            asked.insert(0, {"type": "image", "image": to_image(item["pixel_values"].numpy())})
        answer = answer.strip().removesuffix(f" {EOS}")
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return messages


@pytest.mark.parametrize("modality", ["image", "text"])
def test_chat_template_and_processor_make_what_the_dataset_holds(modality):
    data = BuiltinDataset(BuiltinTask(modality=modality, turns=3, caption=0.5), size=8, seed=11)
    processor = AutoProcessor.from_pretrained(ASSETS / "teacher")
    for index in range(len(data)):
        item = data[index]
        messages = conversation(item, data, index)
        result = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        assert torch.equal(result["input_ids"][0], item["input_ids"])
        assert torch.equal(torch.as_tensor(result["assistant_masks"][0]).bool(), item["labels"] != IGNORE_INDEX)
        assert ("pixel_values" in result) == (modality == "image")
        if modality == "image":
            difference = (result["pixel_values"][0] - item["pixel_values"]).abs().max()
            assert 0.25 / 127.5 < difference <= 0.501 / 127.5
            again = data.tokenizer.apply_chat_template(messages[1:], tokenize=False)
            assert again == processor.apply_chat_template(messages[1:])
    with pytest.raises(Exception, match="roles are user and assistant, got system"):
        processor.apply_chat_template([{"role": "system", "content": "x"}])


def test_built_in_models_have_the_processor_that_is_built_for_them(tmp_path):
    teacher = load_model(ASSETS / "teacher")
    build_processor(teacher.config, build_tokenizer(), "teacher").save_pretrained(tmp_path / "teacher")
    build_tokenizer().save_pretrained(tmp_path / "student-base")
    for name in ("teacher", "student-base"):
        for path in (tmp_path / name).iterdir():
            assert path.read_text() == (ASSETS / name / path.name).read_text(), path.name
    assert (tmp_path / "teacher" / "processor_config.json").is_file()


def test_results_of_a_run_have_a_processor_and_the_last_is_exported(models, tmp_path, capsys):
    from cdistill.train.recipes import recipe_from_dict

    shutil.copytree(models / "teacher", tmp_path / "teacher")
    build_processor(llava().config, build_tokenizer(), "teacher").save_pretrained(tmp_path / "teacher")
    settings = json.loads((tmp_path / "teacher" / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.25, 0.5, 0.75]  # the teacher's own, not its encoder's usual one
    (tmp_path / "teacher" / "processor_config.json").write_text(json.dumps(settings))
    values = recipe_values(tmp_path / "run", models, teacher=str(tmp_path / "teacher"), stages=["dpt", "sft"])
    for name in ("dpt", "sft"):
        values["stage"][name]["samples"] = 4
    final = run(recipe_from_dict(values))
    for number in (3, 10):
        shutil.copytree(final, tmp_path / "run" / f"{number}-more")
    (tmp_path / "run" / "11-more.part").mkdir()
    (tmp_path / "run" / "10-more" / "chat_template.jinja").write_text("the last")
    seal(tmp_path / "run" / "10-more", stage="more")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("TAFLlavaForConditionalGeneration in fp32, TAF merged")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "the last"
    for folder in (tmp_path / "run" / "1-dpt", final, tmp_path / "out"):
        processor = AutoProcessor.from_pretrained(folder)
        assert list(processor.image_processor.image_mean) == [0.25, 0.5, 0.75]
        assert processor.image_token_id == build_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN)


def test_merging_is_one_product_in_fp64_rounded_once():
    torch.manual_seed(9)
    features = torch.randn(5, 36, VISION["hidden_size"])
    for width, dtype in ((64, torch.float32), (32, torch.float32), (64, torch.bfloat16)):
        student = taf_student(width=width)
        adapter = student.model.multi_modal_projector
        merged = merge_taf_map(student, dtype)
        projector = merged.model.multi_modal_projector
        assert type(merged) is (LlavaForConditionalGeneration if width == 32 else TAFLlavaForConditionalGeneration)
        assert (type(projector) is MergedAdapter) == (width == 64)
        assert not any(p.is_meta for p in merged.parameters())
        assert type(student.model.multi_modal_projector) is TAFAdapter and student.config.taf_activation == "linear"
        last, first = adapter.teacher[2], adapter.map
        product = first.weight.double() @ last.weight.double()
        assert torch.equal(projector.linear_2.weight, product.to(dtype))
        bias = first.weight.double() @ last.bias.double() + first.bias.double()
        assert torch.equal(projector.linear_2.bias, bias.to(dtype))
        if dtype == torch.float32:
            plain, ours = adapter(features), projector(features)
            exact = adapter.double()(features.double())
            allowed = 2 * (plain - exact).abs().max() + 1e-5 * exact.abs().max()
            assert (ours - exact).abs().max() <= allowed


def test_a_teacher_without_biases_leaves_a_llava_that_has_the_maps(tmp_path):
    student = taf_student(width=32)
    student.config.multimodal_projector_bias = False
    student = TAFLlavaForConditionalGeneration(student.config).eval()
    torch.nn.init.normal_(student.model.multi_modal_projector.map.bias)
    save(student, tmp_path / "student")
    result = export(tmp_path / "student", tmp_path / "out")
    assert result.model_class == "LlavaForConditionalGeneration" and result.merged == ("TAF",)
    loaded = load_model(tmp_path / "out")
    assert not loaded.model.multi_modal_projector.linear_1.bias.any()
    torch.testing.assert_close(loaded(**batch()).logits, student(**batch()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens", "q_proj")])
@pytest.mark.parametrize("kind", ["language", "stock", "taf"])
def test_an_adapter_of_tied_embeddings_changes_only_the_one_it_was_trained_for(kind, targets, tmp_path):
    base, inputs = tmp_path / "base", text_batch() if kind == "language" else batch()
    if kind == "language":
        save_base(base)
    else:
        save(taf_student() if kind == "taf" else llava(), base)
    assert load_model(base).config.tie_word_embeddings
    adapted = add_lora(base, tmp_path / "lora", targets)
    export(tmp_path / "lora", tmp_path / "out")
    loaded = load_model(tmp_path / "out").eval()
    torch.testing.assert_close(loaded(**inputs).logits, adapted(**inputs).logits, rtol=1e-4, atol=1e-4)
    plain = load_model(base).eval()(**inputs).logits
    assert (adapted(**inputs).logits - plain).abs().max() > 0.1
    for config in (loaded.config, loaded.config.get_text_config()):
        assert not config.tie_word_embeddings


def test_embeddings_stay_tied_where_the_adapter_leaves_them_alone(tmp_path):
    save_base(tmp_path / "base")
    add_lora(tmp_path / "base", tmp_path / "lora", ("q_proj",))
    export(tmp_path / "lora", tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.config.tie_word_embeddings and loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_is_merged_in_fp32_and_rounded_once(base_dtype, tmp_path):
    save(load_model(save_base(tmp_path / "first"), dtype=base_dtype), tmp_path / "base")
    adapted = add_lora(tmp_path / "base", tmp_path / "lora", ("q_proj", "v_proj"))
    assert export(tmp_path / "lora", tmp_path / "fp32", dtype="fp32").dtype == "fp32"
    exact = load_model(tmp_path / "fp32", dtype="auto")
    assert exact.dtype == torch.float32
    inputs = text_batch()
    torch.testing.assert_close(exact(**inputs).logits, adapted(**inputs).logits, rtol=1e-4, atol=1e-4)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[base_dtype]
    assert export(tmp_path / "lora", tmp_path / "own").dtype == name  # that of the base by default
    rounded = load_model(tmp_path / "own", dtype="auto").state_dict()
    for key, value in exact.state_dict().items():
        assert rounded[key].dtype == base_dtype and torch.equal(rounded[key], value.to(base_dtype))


def test_a_merged_student_is_trained_as_one_with_its_own_adapter(models, tmp_path):
    from cdistill.train.objectives import OBJECTIVES, set_trained
    from cdistill.train.recipes import recipe_from_dict

    values = recipe_values(tmp_path / "run", models)
    student = build_models(recipe_from_dict(values)).student
    save(student, tmp_path / "student")
    export(tmp_path / "student", tmp_path / "merged")
    values["student"] = {"base": str(tmp_path / "merged"), "taf": True}
    with pytest.raises(ValueError, match=r"student\.taf must be false: student\.base was made without it"):
        build_models(recipe_from_dict(values))
    values["student"]["taf"] = False
    built = build_models(recipe_from_dict(values))
    check_pair(built.student, built.teacher)
    set_trained(built.student, OBJECTIVES["dpt"])
    trained = {name for name, p in built.student.named_parameters() if p.requires_grad}
    layers = {f"linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert trained == {f"model.multi_modal_projector.{name}" for name in layers}
    with pytest.raises(ValueError, match="composed with linear or gelu"):
        taf_student(activation="merged")
    with pytest.raises(ValueError, match="teacher_hidden_size must be positive"):
        TAFLlavaForConditionalGeneration(taf.TAFLlavaConfig())


def test_number_formats(tmp_path):
    student = taf_student()
    save(student, tmp_path / "student")
    result = export(tmp_path / "student", tmp_path / "bf16", dtype="bf16")
    assert result.dtype == "bf16"
    assert export(tmp_path / "bf16", tmp_path / "again").dtype == "bf16"  # that of the model by default
    weights = [load_model(tmp_path / name, dtype="auto").state_dict() for name in ("bf16", "again")]
    wanted = merge_taf_map(student, torch.bfloat16).to(torch.bfloat16).state_dict()
    for state in weights:
        assert state.keys() == wanted.keys()
        assert all(
            torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in wanted.items()
        )
    assert export(tmp_path / "bf16", tmp_path / "fp32", dtype="fp32").dtype == "fp32"
    assert load_model(tmp_path / "fp32", dtype="auto").dtype == torch.float32


def test_an_adapter_brings_its_own_tokenizer_and_the_code_of_an_earlier_export_does_not_stay(tmp_path):
    save(taf_student(), tmp_path / "base")
    export(tmp_path / "base", tmp_path / "coded", merge_taf=False, code=True)
    adapted = add_lora(tmp_path / "coded", tmp_path / "lora", ("q_proj",))
    (tmp_path / "coded" / "chat_template.jinja").write_text("of the base")
    assert export(tmp_path / "lora", tmp_path / "one").remarks == ()
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == "of the base"
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "of the adapter"
    tokenizer.save_pretrained(tmp_path / "lora")
    add_lora(tmp_path / "base", tmp_path / "plain", ("q_proj",))
    tokenizer.save_pretrained(tmp_path / "plain")
    built = export(tmp_path / "plain", tmp_path / "three")  # no image processor anywhere: one is built
    assert "usual one was taken" in built.remarks[0]
    assert AutoProcessor.from_pretrained(tmp_path / "three").chat_template == "of the adapter"
    result = export(tmp_path / "lora", tmp_path / "two", merge_taf=False)
    assert result.merged == ("LoRA",)
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == "of the adapter"
    assert "auto_map" not in json.loads((tmp_path / "two" / "config.json").read_text())
    torch.testing.assert_close(
        load_model(tmp_path / "two")(**batch()).logits, adapted(**batch()).logits, rtol=1e-4, atol=1e-4
    )


def test_an_older_result_whose_template_takes_words_alone_is_exported_with_one_for_images(models, tmp_path):
    folder = shutil.copytree(models / "teacher", tmp_path / "teacher")
    build_processor(llava().config, build_tokenizer(), "teacher").save_pretrained(folder)
    words = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(words)
    remarks = export(folder, tmp_path / "out").remarks
    assert any("takes words alone" in line for line in remarks)
    content = [{"type": "image"}, {"type": "text", "text": "is there a ring ?"}]
    text = AutoProcessor.from_pretrained(tmp_path / "out").apply_chat_template([{"role": "user", "content": content}])
    assert text == f"user: {IMAGE_TOKEN}\nis there a ring ?\n"
    assert not any("takes words alone" in line for line in export(tmp_path / "out", tmp_path / "again").remarks)


def test_processors_of_vision_encoders(tmp_path):
    config = llava().config
    config.vision_config = CLIPVisionConfig(**{k: v for k, v in VISION.items() if k != "vision_use_head"})
    config.image_seq_length = NUM_VISUAL_TOKENS + 1
    processor = build_processor(config, build_tokenizer(), "model")
    ids = processor(text=f"{USER} {IMAGE_TOKEN}", images=to_image(next(images())))["input_ids"][0]
    assert ids[1:] == [config.image_token_id] * (NUM_VISUAL_TOKENS + 1)
    config.vision_feature_select_strategy = "default"
    with pytest.raises(ValueError, match="model: its processor makes 36 tokens 2 of an image, the model takes 37"):
        build_processor(config, build_tokenizer(), "model")
    with pytest.raises(ValueError, match=r"model: the image processor of .*nothing/prep.*\.json cannot be loaded: "):
        (tmp_path / "nothing").mkdir()
        (tmp_path / "nothing" / "preprocessor_config.json").write_text("{}")
        build_processor(config, build_tokenizer(), "model", source=tmp_path / "nothing")
    config.vision_config = ViTConfig(image_size=48, patch_size=8)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is missing, and vit has no usual"):
        build_processor(config, build_tokenizer(), "model")


CHECKS = {
    "processor": lambda folder: load_processor(folder, "student.base"),
    "image": lambda folder: check_image_processors({"student.base": folder}),
    "composed": lambda folder: build_processor(llava().config, build_tokenizer(), "student.base", source=folder),
}


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"image_processor_type": 3}', "\0\n"])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_a_corrupt_processor_is_told_in_one_line(check, text, file, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=rf"^student\.base: .*{re.escape(str(tmp_path / file))} .+") as error:
        check(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_a_processor_whose_package_is_missing_is_told_in_one_line(check, tmp_path, monkeypatch):
    def without_package(*args, **kwargs):
        raise ImportError("\nFastProcessor requires the Torchvision library\nbut it was not found")

    save(llava(), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    for auto in (AutoProcessor, AutoImageProcessor):
        monkeypatch.setattr(auto, "from_pretrained", without_package)
    file = re.escape(str(tmp_path / "preprocessor_config.json"))
    message = f"{file} cannot be loaded: FastProcessor requires the Torchvision library but it was not found$"
    with pytest.raises(ValueError, match=rf"^student\.base: the (image )?processor of {message}"):
        check(tmp_path)
