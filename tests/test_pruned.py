"""Students that begin as a part of a larger model: what is kept computes what it did, and what is left out adds nothing."""

import copy

import pytest
import torch
import transformers
from builtin_models import make_recipe
from family_models import build, draw
from family_table import FAMILIES
from torch import nn

from cdistill.models.load import load_model
from cdistill.models.parts import language_model
from cdistill.models.pruned import prune
from cdistill.plan.blueprint import student_of
from cdistill.train import run
from cdistill.train.recipes import load_recipe

LAYERS = 5


class Skipped(nn.Module):
    """Stands where a layer was and adds nothing."""

    def __init__(self, layer):
        super().__init__()
        for name in ("attention_type", "layer_type", "block_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@torch.no_grad()
def logits(model, name):
    batch = draw(name, 3)
    return model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits


def without_layers(model, kept):
    model = copy.deepcopy(model)
    layers = language_model(model).layers
    for number in set(range(len(layers))) - set(kept):
        layers[number] = Skipped(layers[number])
    return model


def read_back(model, folder):
    model.save_pretrained(folder)
    return load_model(folder).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_that_are_kept_compute_what_they_did(name, tmp_path):
    model, kept = build(name, 1, LAYERS), [0, 1, 4]
    wanted = logits(without_layers(model, kept), name)
    prune(model, "pruning", layers=kept)
    torch.testing.assert_close(logits(model, name), wanted)
    torch.testing.assert_close(logits(read_back(model, tmp_path), name), wanted)


@torch.no_grad()
def without_neurons(model, size):
    """The MLPs' outputs without the neurons whose norms are smallest, by definition."""
    model = copy.deepcopy(model)
    for layer in language_model(model).layers:
        mlp = layer.mlp
        into = [getattr(mlp, name) for name in ("gate_proj", "up_proj", "fc1") if hasattr(mlp, name)]
        out = mlp.down_proj if hasattr(mlp, "down_proj") else mlp.fc2
        heavy = [
            float(out.weight[:, i].norm()) * torch.tensor([float(x.weight[i].norm()) for x in into]).prod()
            for i in range(out.in_features)
        ]
        for i in sorted(range(out.in_features), key=lambda i: heavy[i])[: out.in_features - size]:
            out.weight[:, i] = 0
    return model


@torch.no_grad()
def without_groups(model, groups):
    """Attention without the groups of heads whose norms are smallest, by definition."""
    model = copy.deepcopy(model)
    config = model.config.get_text_config(decoder=True)
    shared = config.num_attention_heads // config.num_key_value_heads
    for layer in language_model(model).layers:
        v, o = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        size = len(v) // config.num_key_value_heads
        wide = [slice(i * shared * size, (i + 1) * shared * size) for i in range(config.num_key_value_heads)]
        heavy = [float(v[i * size : (i + 1) * size].norm() * o[:, wide[i]].norm()) for i in range(len(wide))]
        for i in sorted(range(len(wide)), key=lambda i: heavy[i])[: len(wide) - groups]:
            o[:, wide[i]] = 0
    return model


WIDE = ["llava_llama", "llava_qwen2", "llava_qwen3", "idefics3", "qwen3_vl", "internvl"]


@pytest.mark.parametrize("name", WIDE)
def test_neurons_and_heads_that_are_kept_compute_what_they_did(name, tmp_path):
    model = build(name, 1, width=64, heads=4, kv_heads=2)
    wanted = logits(without_groups(without_neurons(model, 24), 1), name)
    prune(model, "pruning", intermediate_size=24, key_value_heads=1)
    torch.testing.assert_close(logits(model, name), wanted)
    again = read_back(model, tmp_path)
    torch.testing.assert_close(logits(again, name), wanted)
    text = again.config.get_text_config(decoder=True)
    assert (text.intermediate_size, text.num_attention_heads, text.num_key_value_heads) == (24, 2, 1)


def causal(kind, **changes):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(2)
    config = transformers.AutoConfig.for_model(kind, **(sizes | heads | changes))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


TEXT = {
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False},
    "mixtral": {"num_local_experts": 2},
    "olmo2": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
}


@pytest.mark.parametrize("kind", TEXT)
def test_language_models_whose_layers_differ(kind, tmp_path):
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    model = causal(kind, **TEXT[kind])
    wanted = without_layers(model, [0, 3])(ids, use_cache=False).logits
    prune(model, "pruning", layers=2)
    torch.testing.assert_close(model(ids).logits, wanted)
    torch.testing.assert_close(read_back(model, tmp_path)(ids).logits, wanted)


def test_a_family_whose_heads_have_no_size_of_their_own_keeps_all():
    model = build("qwen2_vl", 1, width=64, heads=4, kv_heads=2)
    with pytest.raises(
        ValueError, match=r"^pruning\.key_value_heads must be null: the configuration of a qwen2_vl_text model"
    ):
        prune(model, "pruning", key_value_heads=1)


REFUSED = {
    "more layers": ("qwen2", {}, {"layers": [0, 4]}, "pruning.layers must be of the 4 layers that there are, 0 to 3"),
    "more than all": ("qwen2", {}, {"layers": 5}, "pruning.layers must be of the 4 layers that there are"),
    "more neurons": ("qwen2", {}, {"intermediate_size": 49}, "pruning.intermediate_size must be at most 48"),
    "more heads": ("qwen2", {}, {"key_value_heads": 3}, "pruning.key_value_heads must be at most 2"),
    "experts": ("mixtral", {"num_local_experts": 2}, {"intermediate_size": 8}, "the MLP of a mixtral model"),
    "joined weights": ("phi3", {}, {"key_value_heads": 1}, "queries, keys and values of a phi3 model"),
    "layers by number": (
        "deepseek_v3",
        {"num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
        {"layers": [0, 2, 3]},
        "what would be layer 1 has another",
    ),
    "another place for layers": ("gpt2", {}, {"layers": 1}, "does not know where the layers of a gpt2 model are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_configuration_cannot_say_is_refused(case):
    kind, changes, options, said = REFUSED[case]
    with pytest.raises(ValueError, match=r"^pruning") as caught:
        prune(causal(kind, **changes), "pruning", **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_evenly_spread_layers():
    for count, kept in ((1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])):
        model = causal("qwen2")
        marks = [layer.self_attn.q_proj.weight.clone() for layer in model.model.layers]
        prune(model, "pruning", layers=count)
        assert all(
            torch.equal(marks[i], x.self_attn.q_proj.weight) for i, x in zip(kept, model.model.layers, strict=True)
        )


def test_a_recipe_trains_a_part_of_its_teacher(models, tmp_path):
    teacher = str(models / "teacher")
    student = {"base": teacher, "taf": False, "pruning": {"layers": [0, 2], "intermediate_size": 24}}
    recipe = make_recipe(tmp_path / "run", models, student=student)
    planned = student_of(recipe, recipe.stage["dft"]).model
    run(recipe)
    trained = load_model(tmp_path / "run" / "2-dft")
    assert {n: p.shape for n, p in planned.named_parameters()} == {n: p.shape for n, p in trained.named_parameters()}
    assert trained.config.text_config.num_hidden_layers == 2 and trained.config.text_config.intermediate_size == 24


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{}", "student.pruning.layers, intermediate_size or key_value_heads must say what is kept"),
        ("{layers: []}", "student.pruning.layers must keep at least one layer"),
        ("{layers: [2, 1]}", "student.pruning.layers must be in order and each once, got [2, 1]"),
        ("{layers: 0}", "student.pruning.layers must be"),
        ("{layers: [-1]}", "student.pruning.layers"),
        ("{hidden_size: 8}", "student.pruning.hidden_size"),
    ],
)
def test_mistakes_of_the_keys_are_told(value, said):
    with pytest.raises(ValueError) as caught:
        load_recipe("demo-compodistill", [f"student.pruning={value}"])
    assert said in str(caught.value)
