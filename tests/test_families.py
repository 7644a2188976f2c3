"""The table of families: a row from outside is all that a model type needs whose fields and modules have names of their own."""

import copy
import os
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from family_models import build_pair, draw
from transformers.models.internvl.modeling_internvl import InternVLModel

import cdistill
from cdistill import Family, families, register_family
from cdistill.families import COMMON, TABLE, family_of, require_known_everywhere
from cdistill.models.parts import named_parts
from cdistill.vat import VATConfig, attention_layers, visual_token_ids

HERS = {
    "multi_modal_projector": "beak",
    "vision_tower": "retina",
}  # what a parrot's modules are called, by InternVL's names


class ParrotConfig(transformers.PreTrainedConfig):
    """InternVL's, but for the field with the id of a visual token."""

    model_type = "parrot"
    sub_configs = transformers.InternVLConfig.sub_configs

    text_config: Any = None
    vision_config: Any = None
    seed_token: int = 0
    downsample_ratio: float = 0.5
    projector_hidden_act: str = "gelu"
    vision_feature_layer: int = -1
    vision_feature_select_strategy: str = "default"
    tie_word_embeddings: bool = False


class ParrotModel(InternVLModel):
    def __init__(self, config):
        super().__init__(config)
        for theirs, hers in HERS.items():
            self._modules[hers] = self._modules.pop(theirs)

    multi_modal_projector = property(lambda self: self.beak)
    vision_tower = property(lambda self: self.retina)

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        return (input_ids == self.config.seed_token)[..., None]


class Parrot(transformers.InternVLForConditionalGeneration):
    config: ParrotConfig
    config_class = ParrotConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = ParrotModel(config)
        self.post_init()


ROW = Family("parrot", image_token=("seed_token",), adapters=("beak",), encoders=("retina",))


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """A table of this test's own."""
    monkeypatch.setattr(families, "TABLE", dict(TABLE))
    families._joined.cache_clear()
    yield
    families._joined.cache_clear()


def hers(name):
    return ".".join(HERS.get(word, word) for word in name.split("."))


def parrot_of(model):
    """A parrot with the weights of an InternVL."""
    config = copy.deepcopy(model.config)
    parts = {"text_config": config.text_config, "vision_config": config.vision_config}
    parrot = Parrot(ParrotConfig(**parts, seed_token=config.image_token_id))
    parrot.load_state_dict({hers(name): value for name, value in model.state_dict().items()})
    return parrot.eval()


def trained(teacher, student, batch):
    """Losses of a batch, and the gradients that they give the student."""
    losses = cdistill.distill(teacher, student, vat=VATConfig(layers="all"))(batch)
    losses["loss"].backward()
    return losses, {name: p.grad for name, p in student.named_parameters() if p.requires_grad}


def test_a_registered_family_is_distilled_like_the_one_that_it_is_made_of():
    student, teacher = build_pair("internvl")
    batch = draw("internvl", seed=5)
    own = [parrot_of(model) for model in (teacher, student)]
    expected, wanted = trained(teacher, student, batch)
    register_family(ROW)
    losses, found = trained(*own, batch)
    assert losses["vat"] > 0 and all(torch.equal(losses[name], value) for name, value in expected.items())
    assert found.keys() == {hers(name) for name in wanted}  # the encoder is frozen
    for name, gradient in wanted.items():
        assert (gradient is None and found[hers(name)] is None) or torch.equal(found[hers(name)], gradient)
    parts = {name.split(".")[1]: part for name, _, part in named_parts(own[1])}
    assert parts["beak"] == "adapter" and parts["retina"] == "vision" and parts["language_model"] == "language"


UNKNOWN = "belongs neither to its language model nor to a known adapter or encoder"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, "^ParrotConfig names no image_token_id "),
        (replace(ROW, image_token=()), "^ParrotConfig names no image_token_id "),
        (replace(ROW, adapters=()), rf"^model\.beak\.\S+ of Parrot {UNKNOWN}: "),
        (replace(ROW, encoders=()), rf"^model\.retina\.\S+ of Parrot {UNKNOWN}: "),
    ],
    ids=["row", "token", "adapter", "encoder"],
)
def test_without_its_row_or_a_part_of_it_such_a_family_is_refused(row, message):
    student, teacher = (parrot_of(model) for model in build_pair("internvl"))
    if row is not None:
        register_family(row)
    with pytest.raises(ValueError, match=message + r".*cdistill\.register_family") as refused:
        cdistill.distill(teacher, student)(draw("internvl", seed=5))
    assert "\n" not in str(refused.value)


def test_both_models_must_have_one_token_by_its_own_name():
    student, teacher = (parrot_of(model) for model in build_pair("internvl"))
    register_family(ROW)
    teacher.config.seed_token += 1
    with pytest.raises(ValueError, match=r"^seed_token differs: student \d+, teacher \d+$"):
        cdistill.distill(teacher, student)


def test_a_blank_is_what_the_row_says():
    student, teacher = (parrot_of(model) for model in build_pair("internvl"))
    made = []

    def blank(model, kind):
        made.append((model, kind))
        return {"pixel_values": torch.ones(1, 3, 8, 8)}

    register_family(replace(ROW, blank=blank))
    batch = {name: value for name, value in draw("internvl", seed=5).items() if name != "pixel_values"}
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == student.config.seed_token, 3)
    distillation = cdistill.distill(teacher, student, train_vision=True)
    distillation(batch)["loss"].backward()
    assert made == [(student, "image")]
    assert all(p.grad is not None for p in student.model.beak.parameters())


def test_what_a_row_says_is_known_of_the_whole_model():
    config = transformers.LlavaConfig(text_config=transformers.Qwen2Config(num_hidden_layers=2))
    config.text_config.layer_types = ["full_attention", "telepathy"]
    with pytest.raises(
        ValueError, match=r"unknown type telepathy; register the family of qwen2 \(cdistill\.register_family"
    ):
        attention_layers(config)
    register_family(
        Family("qwen2", attention_layers=("telepathy",), logit_fields={"warmth": "factor"}, router_fields=("toll",))
    )
    register_family(Family("llava", refused_keywords={"mood": "moods"}))
    assert attention_layers(config) == (0, 1)
    known = family_of(config)
    assert known.logit_fields == {**COMMON.logit_fields, "warmth": "factor"}
    assert known.router_fields == ("toll", *COMMON.router_fields)
    assert known.refused_keywords == {**COMMON.refused_keywords, "mood": "moods"}
    assert visual_token_ids(config) == (config.image_token_id,)
    assert family_of(transformers.LlamaConfig()) == replace(COMMON, model_type="llama")
    assert family_of(transformers.PreTrainedConfig()) == COMMON


def test_a_keyword_that_a_row_refuses_is_refused_in_its_layers():
    student, teacher = (parrot_of(model) for model in build_pair("internvl"))
    register_family(replace(ROW, refused_keywords={"mood": "moods"}))
    distillation = cdistill.distill(teacher, student)
    batch = draw("internvl", seed=5)
    with pytest.raises(ValueError, match=r"^layer \d uses moods, which visual attention alignment does not support"):
        distillation(batch | {"mood": torch.ones(())})


def test_rows_are_checked():
    for change, message in (
        ({"adapters": "beak"}, "adapters must be a tuple of names, got 'beak'"),
        ({"encoders": ("retina", 3)}, r"encoders must be a tuple of names, got \('retina', 3\)"),
        ({"refused_keywords": ("mood",)}, r"refused_keywords must say of each keyword what it is, got \('mood',\)"),
        ({"logit_fields": {"warmth": "root"}}, "logit_fields must say factor, divisor or softcap of each field"),
        ({"blank": 3}, "blank must be a function, got 3"),
        ({"model_type": ""}, "model_type must be a model type of transformers"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(ROW, **change)
    with pytest.raises(ValueError, match=r"family must be a cdistill\.Family, got str"):
        register_family("parrot")
    register_family(ROW)
    for taken in (ROW, Family("deepseek_v4"), Family("any")):
        with pytest.raises(ValueError, match=f"family '{taken.model_type}' has a row already"):
            register_family(taken)
    assert {field.name for field in fields(Family)} == {
        *families._NAMES,
        "model_type",
        *families._MAPPINGS,
        "own_head",
        "blank",
    }


def test_a_row_of_one_process_does_not_serve_several():
    register_family(ROW)
    config = SimpleNamespace(model_type="parrot")
    require_known_everywhere([config], 1)
    with pytest.raises(
        ValueError, match=r"family 'parrot' is known in this process alone, and processes is 2: set it to 1"
    ):
        require_known_everywhere([SimpleNamespace(model_type="internvl"), config], 2)


def test_a_plugin_registers_in_every_process(tmp_path):
    (tmp_path / "parrot-1.0.dist-info").mkdir()
    (tmp_path / "parrot-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot\nVersion: 1.0\n")
    (tmp_path / "parrot-1.0.dist-info" / "entry_points.txt").write_text("[cdistill.plugins]\nparrot = parrot\n")
    (tmp_path / "parrot.py").write_text(
        'import cdistill\ncdistill.register_family(cdistill.Family("parrot", adapters=("beak",)))'
    )
    code = (
        "import sys; from types import SimpleNamespace; from cdistill.families import family_of, require_known_everywhere\n"
        "parrot = SimpleNamespace(model_type='parrot')\n"
        "assert family_of(parrot).adapters[0] == 'beak'\n"
        "require_known_everywhere([parrot], 2)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
