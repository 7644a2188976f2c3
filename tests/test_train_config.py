import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cdistill.cli import main
from cdistill.data.presets import find_preset
from cdistill.train.objectives import OBJECTIVES
from cdistill.train.recipes import load_recipe, recipe_from_dict, recipe_to_dict, shipped_recipes
from cdistill.train.recipes.values import first_difference
from cdistill.vat import VAT, layer_range

RECIPE = {
    "name": "r",
    "output": "out",
    "teacher": "t",
    "student": {"base": "s", "taf": True},
    "stages": ["dpt", "dft"],
    "stage": {
        "dpt": {"learning_rate": 1e-3, "samples": 640},
        "dft": {"learning_rate": 1e-4, "samples": 640, "global_batch_size": 32},
    },
}

SHIPPED = dict(OBJECTIVES)  # as importing makes them; tests register others


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_valid_and_described(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert shipped_recipes()[name]
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_objectives_are_those_of_the_paper_three_that_make_the_built_in_models_and_baselines():
    assert {name: (o.losses, o.trained) for name, o in SHIPPED.items()} == {
        "vision": (("patch",), ("vision",)),
        "text": (("ar",), ("language",)),
        "ground": (("ar", "ground"), ("language", "adapter")),
        "pt": (("ar",), ("adapter",)),
        "dpt": (("ar", "kd"), ("adapter",)),
        "dft": (("ar", "kd", "vat"), ("language", "adapter")),
        "opd": (("ar", "kd", "vat"), ("language", "adapter")),
        "sft": (("ar",), ("language", "adapter")),
        "hidden": (("ar", "kd", "hidden"), ("language", "adapter")),
        "mdist": (("ar", "kd", "mdist"), ("language", "adapter")),
        "rdist": (("ar", "kd", "rdist"), ("language", "adapter")),
        "llava_kd": (("ar", "kd", "mdist", "rdist"), ("language", "adapter")),
        "relation": (("ar", "kd", "relation"), ("language", "adapter")),
        "iva": (("ar", "kd", "iva"), ("language", "adapter")),
        "llava_kd_dpt": (("ar", "kd", "mdist", "rdist"), ("adapter",)),
    }


@pytest.mark.parametrize("name", ["paper-qwen1.5-1.8b", "official"])
def test_paper_recipes_hold_the_papers_hyper_parameters(name):
    recipe = load_recipe(name)
    official = name == "official"
    stages = ("dpt", "dft", "sft")
    assert recipe.stages == (("pt", *stages) if official else stages)
    assert recipe.deepspeed == 2 and recipe.student.taf
    values = [(recipe.stage[s].global_batch_size, recipe.stage[s].learning_rate) for s in stages]
    later = 2e-4 if official else 1e-4
    assert values == [(256, 1e-3), (128, later), (128, later)]
    for stage in recipe.stage.values():
        assert (stage.weight_decay, stage.schedule, stage.warmup_ratio) == (0.0, "cosine", 0.03)
    assert (recipe.kd.weight, recipe.vat.weight, recipe.kd.temperature) == (1.0, 1.0, 1.0)
    vat, lora = recipe.vat, recipe.student.lora
    chosen = (vat.reduction, vat.rows, vat.layers, vat.sink_filter, vat.layer_sum)
    assert chosen == (
        ("column", "visual", "official", True, True) if official else ("row", "text", "intermediate", False, False)
    )
    assert (None if lora is None else (lora.r, lora.alpha)) == ((128, 256) if official else None)


MAIN = "paper-qwen1.5-1.8b"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("paper-qwen1.5-1.8b-from-7b", {"teacher": "checkpoints/llava-qwen2.5-7b"}),
        ("paper-qwen1.5-0.5b", {"student.base": "checkpoints/qwen1.5-0.5b"}),
        (
            "paper-qwen1.5-0.5b-from-1.8b",
            {"student.base": "checkpoints/qwen1.5-0.5b", "teacher": "checkpoints/llava-qwen1.5-1.8b"},
        ),
        (
            "paper-mobilellama-1.4b",
            {
                "student.base": "checkpoints/mobilellama-1.4b",
                "teacher": "checkpoints/llava-mobilellama-2.7b",
                "stage.dft.data.template": "vicuna_v1",
                "stage.sft.data.template": "vicuna_v1",
            },
        ),
        ("ablation-no-vat", {"vat.enabled": False}),
        ("ablation-no-taf", {"student.taf": False}),
        ("ablation-no-vat-no-taf", {"vat.enabled": False, "student.taf": False}),
        *((f"ablation-{loss}", {"vat.loss": loss}) for loss in ("mse", "kl")),
        *((f"ablation-{layers}", {"vat.layers": layers}) for layers in ("early", "later", "all")),
        *((f"ablation-{matching}", {"vat.matching": matching}) for matching in ("simple", "adaptive")),
        *(
            (f"ablation-{stages}", {"stages": stages.split("-")})
            for stages in ("pt-sft", "pt-dft", "dpt-sft", "dpt-dft", "dpt-sft-dft")
        ),
    ],
)
def test_pairs_and_ablations_differ_from_the_main_recipe_in_one_thing(name, changes):
    expected = recipe_to_dict(load_recipe(MAIN)) | {"name": name, "output": f"runs/{name}"}
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = expected
        for parent in parents:
            node = node[parent]
        assert node[last] != value
        node[last] = value
    assert recipe_to_dict(load_recipe(name)) == expected


@pytest.mark.parametrize(("name", "depths"), [("qwen2.5-vl-3b", (36, 28)), ("qwen3-vl-2b", (28, 36))])
def test_layers_of_the_qwen_pairs_match(name, depths):
    recipe = load_recipe(name)
    matches = VAT(recipe.vat, *depths).matches
    assert len(matches) == 11 and not recipe.student.taf
    used = {teacher for match in matches for teacher in match.teachers}
    assert used == set(layer_range(depths[1], "intermediate"))


def test_recipes_that_begin_from_others(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"extends: {MAIN}\nstage: {{dft: {{samples: 256}}}}\nstages: [dft]\n")
    recipe = load_recipe(tmp_path / "mine.yaml", ["seed=4"])
    main_recipe = load_recipe(MAIN)
    assert (recipe.name, recipe.output, recipe.seed) == ("mine", "runs/mine", 4)
    assert recipe.stages == ("dft",) and recipe.stage["dft"].samples == 256
    assert recipe.stage["dft"].learning_rate == main_recipe.stage["dft"].learning_rate
    assert recipe.stage["sft"] == main_recipe.stage["sft"] and recipe.teacher == main_recipe.teacher
    (tmp_path / "loop.yaml").write_text(f"extends: {tmp_path / 'loop.yaml'}\n")
    with pytest.raises(ValueError, match=r"loop\.yaml extends itself"):
        load_recipe(tmp_path / "loop.yaml")
    (tmp_path / "none.yaml").write_text("extends: nothing\n")
    with pytest.raises(ValueError, match="recipe 'nothing' is neither a file nor shipped"):
        load_recipe(tmp_path / "none.yaml")


def test_a_recipe_begins_from_one_in_its_own_folder_wherever_it_is_run(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "below.yaml").write_text(f"extends: {MAIN}\nseed: 7\n")
    (tmp_path / "recipes" / "mine.yaml").write_text("extends: below.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/mine.yaml").seed == 7
    (tmp_path / "below.yaml").write_text(f"extends: {MAIN}\nseed: 8\n")
    with pytest.raises(
        ValueError, match=r"mine\.yaml: extends below\.yaml may be recipes/below\.yaml or .*/below\.yaml: write"
    ):
        load_recipe("recipes/mine.yaml")
    monkeypatch.chdir("recipes")
    assert load_recipe("mine.yaml").seed == 7


def test_overrides_reach_every_level_and_are_yaml(path):
    recipe = load_recipe(
        path,
        [
            "seed=3",
            "vat.loss=mse",
            "stage.dft.learning_rate=2e-5",
            "stage.dpt.data.subtypes=[colour, count]",
            "stages=[dft]",
            "deepspeed=off",
            "student.base=null",
            "student.text_config.model_type=qwen2",
        ],
    )
    assert recipe.seed == 3 and recipe.vat.loss == "mse" and recipe.stages == ("dft",) and recipe.deepspeed == "off"
    assert recipe.stage["dft"].learning_rate == 2e-5 and recipe.stage["dft"].objective == "dft"
    assert recipe.stage["dpt"].data.subtypes == ("colour", "count")
    assert recipe.student.text_config == {"model_type": "qwen2"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 4


def test_five_mistakes_are_five_lines_whatever_they_are(path):
    wrong = ["sede=1", "kd.temperature=1e-320", "output=~/runs", "vat.layers=middle", f"stage.dft.samples={10**30}"]
    with pytest.raises(ValueError) as raised:
        load_recipe(path, wrong)
    lines = str(raised.value).splitlines()
    assert len(lines) == 5
    for override in wrong:
        assert sum(override.partition("=")[0] in line for line in lines) == 1, (override, lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output=~/runs", r"output must be written out, got '~/runs': shells alone know what ~ is"),
        ("sede=1", r"sede is not a known key; did you mean seed\?"),
        ("stage.dft.lr=1", r"stage\.dft\.lr is not a known key"),
        ("vat.rows=question", r"vat\.rows must be one of answer, predicting, text, visual, all, got 'question'"),
        ("vat.layers=middle", r"vat\.layers must be one of early"),
        ("vat.sink_filter=true", r"vat\.sink_filter needs vat.reduction column"),
        ("vat.enabled=maybe", r"vat\.enabled must be true or false"),
        ("stage.dft.samples=1e30", r"stage\.dft\.samples must be a whole number"),
        (f"stage.dft.samples={2**63}", r"stage\.dft\.samples must be at most 9,007,199,254,740,992, got 9\.22e\+18"),
        ('output="a\\0b"', r"output must hold no null character, got 'a\\x00b'"),
        ("stage.dft.data.turns=1001", r"stage\.dft\.data\.turns must be at most 1000, got 1001"),
        ("stage.dft.data.sentences=1000000000", r"stage\.dft\.data\.sentences must be at most 1000, got"),
        ("processes=1000000", r"processes must be at most 1024, got 1000000"),
        (
            "kd.temperature=1e-320",
            r"kd\.temperature must be between 1e-30 and 1e\+30 in size, which fp32 can hold, got 1e-320",
        ),
        ("kd.weight=1e300", r"kd\.weight must be between 1e-30 and 1e\+30 in size"),
        ("workers=1000000", r"workers must be at most 1024, got 1000000"),
        ("student.lora={alpha: 0}", r"student\.lora\.alpha must be at least 1, got 0"),
        ("kd.temperature=0", r"kd\.temperature must be above 0"),
        ("kd.temperature=.inf", r"kd\.temperature must be above 0 and finite"),
        ("kd.weight=.inf", r"kd\.weight must be at least 0 and finite"),
        ("kd.beta=1", r"kd\.beta must be between 0 and 1"),
        ("kd.divergence=l2", r"kd\.divergence must be one of forward_kl, reverse_kl, jsd"),
        ("seed=1.5", r"seed must be a whole number, got 1\.5"),
        ("seed=true", r"seed must be a whole number, got True"),
        ("deepspeed=4", r"deepspeed must be one of 0, 1, 2, 3, off"),
        ("precision=int8", r"precision must be one of auto, fp32, bf16, fp16"),
        ("stages=[]", r"stages must name at least one"),
        ("stages=[dpt, dpt]", r"stages must not repeat 'dpt'"),
        ("stages=[sft]", r"stages must name sections of stage \(dft, dpt\), got 'sft'"),
        ("stage.dft.objective=rl", r"stage\.dft\.objective must be one of vision, text, ground, pt"),
        ("stage.dft.samples=3", r"stage\.dft\.samples must be at least global_batch_size \(32\), got 3"),
        ("stage.dft.learning_rate=-1", r"stage\.dft\.learning_rate must be above 0"),
        ("stage.dft.micro_batch_size=5", r"stage\.dft\.micro_batch_size must divide global_batch_size \(32\), got 5"),
        ("stage.dft.betas=[0.9]", r"stage\.dft\.betas must be a list of 2"),
        ("stage.dft.data.subtypes=[shade]", r"stage\.dft\.data\.subtypes must be some of colour"),
        ("stage.dft.data.caption=2", r"stage\.dft\.data\.caption must lie between 0 and 1"),
        ("stage.dpt.data.modality=text", r"stage\.dpt\.data\.modality must be image for objective dpt"),
        ("teacher=null", r"teacher must be given for student\.taf"),
        ("student.text_config={model_type: qwen2}", r"student\.base or text_config must be given, and not both"),
        ("student.vision=elsewhere", r"student\.vision must be null or the teacher"),
        ("student.taf_activation=relu", r"student\.taf_activation must be one of linear, gelu"),
        ("student.lora={r: 0}", r"student\.lora\.r must be at least 1, got 0"),
        ("student.lora={rank: 4}", r"student\.lora\.rank is not a known key; allowed: r, alpha, dropout"),
        ("student.lora.dropout=1", r"student\.lora\.dropout must be at least 0 and below 1, got 1"),
        ("teacher_memory.zero=2", r"teacher_memory\.zero must be one of 3, off, got 2"),
        ("teacher_memory.offload=true", r"teacher_memory\.offload needs zero 3"),
        ("teacher_memory.quantization=2bit", r"teacher_memory\.quantization must be one of 8bit, 4bit"),
        ("teacher_memory={zero: 3, quantization: 8bit}", r"teacher_memory\.quantization and zero 3 exclude each other"),
        ("max_nonfinite_steps=0", r"max_nonfinite_steps must be at least 1, got 0"),
        (
            "vat={target: recomputed, engine: auto}",
            r"vat\.target recomputed needs vat\.engine sdpa, got 'auto': engines",
        ),
        ("gradient_checkpointing=reentrant", r"gradient_checkpointing must not be reentrant with vat\.enabled"),
        ("name.deep=1", r"override 'name\.deep=1': name has no keys below it"),
        ("seed", r"must have the form key=value"),
        ("seed=[", r"is not valid YAML"),
        ("vat.wieght=2", r"vat\.wieght is not a known key; did you mean weight\?$"),
        ("sede=1", r"; did you mean seed\?$"),
        ("stage.dft.data.max_lenght=64", r"; did you mean max_length\?$"),
        ("kd={weight: 1, weight: 2}", r"^override 'kd=\{weight: 1, weight: 2\}': kd\.weight is given twice"),
        ("seed=010", r"seed must be a whole number, got '010'"),
        ("stage.dft.samples=1:30", r"stage\.dft\.samples must be a whole number, got '1:30'"),
        ("stage.dft.samples=1e3", r"stage\.dft\.samples must be a whole number, got 1000\.0"),
        ("vat.enabled='no'", r"vat\.enabled must be true or false, got 'no'"),
        ("name=12", r"name must be a string, got 12"),
        ("stage.dft.learning_rate=.inf", r"stage\.dft\.learning_rate must be above 0 and finite, got inf"),
        ("stage.dft.learning_rate=.nan", r"stage\.dft\.learning_rate must be above 0 and finite, got nan"),
        ("vat.weight=.inf", r"vat\.weight must be at least 0 and finite, got inf"),
        ("stage.dft.weight_decay=.inf", r"stage\.dft\.weight_decay must be at least 0 and finite, got inf"),
        ("seed=4294967295", r"seed must be at most 4294967000, got 4294967295"),
        ("stage.dft.data.seed=-1", r"stage\.dft\.data\.seed must be at least 0, got -1"),
    ],
)
def test_bad_values_are_one_line_that_names_the_key(path, override, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name in sorted(shipped_recipes()) for stage in load_recipe(name).stage]
)
def test_an_override_of_a_stage_changes_that_stage_alone(name, stage):
    """The shipped recipes share sections by YAML's anchors."""
    expected = recipe_to_dict(load_recipe(name))
    expected["stage"][stage]["data"]["seed"] = 77
    expected["stage"][stage]["betas"] = [0.5, 0.6]
    overrides = [f"stage.{stage}.data.seed=77", f"stage.{stage}.betas=[0.5, 0.6]"]
    assert recipe_to_dict(load_recipe(name, overrides)) == expected


def test_overrides_share_nothing_either(path):
    shared = "stage={dpt: &a {samples: 64, learning_rate: 1e-3, data: &d {turns: 2}}, dft: {<<: *a, data: *d}}"
    recipe = load_recipe(path, [shared, "stage.dft.data.caption=0.5"])
    assert [recipe.stage[name].data.caption for name in ("dpt", "dft")] == [0.0, 0.5]
    assert [recipe.stage[name].data.turns for name in ("dpt", "dft")] == [2, 2]


def test_a_key_that_stands_twice_in_a_recipe(path, tmp_path):
    text = path.read_text()
    path.write_text(f"{text}vat: {{loss: kl}}\nseed: 1\nvat: {{rows: text}}\n")
    line = len(text.splitlines()) + 1
    message = rf"recipe {path}, line {line + 2}: vat is given twice \(first in line {line}\): leave one of them out"
    with pytest.raises(ValueError, match=message):
        load_recipe(path)
    (tmp_path / "mine.yaml").write_text(f"extends: {path}\n")
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.json").write_text(
        '{"extends": "paper-qwen1.5-1.8b", "kd": {"weight": 1, "beta": 0.5, "weight": 2}}'
    )
    with pytest.raises(ValueError, match=r"mine\.json: kd\.weight is given twice"):
        load_recipe(tmp_path / "mine.json")


def test_overrides_that_undo_others(path):
    def refused(*overrides):
        with pytest.raises(ValueError, match=r"^override .* undoes .*: leave one of them out$") as error:
            load_recipe(path, overrides)
        assert repr(overrides[-1]) in str(error.value) and repr(overrides[0]) in str(error.value)

    refused("stage.dft.samples=64", "seed=1", "stage.dft.samples=128")
    refused("stage.dft.samples=64", "stage.dft={samples: 128, learning_rate: 1e-3}")
    refused("stage.dft.samples=64", "seed=1", "stage.dft={learning_rate: 1e-3}")
    refused("stage.dft={samples: 64, learning_rate: 1e-3}", "stage.dft.samples=128")
    refused("vat.enabled=true", "vat.enabled=1")
    refused("student.lora.r=8", "student.lora=null")
    recipe = load_recipe(path, ["stage.dft={samples: 64, learning_rate: 1e-3}", "stage.dft.weight_decay=0.1", "seed=2"])
    assert (recipe.stage["dft"].samples, recipe.stage["dft"].weight_decay) == (64, 0.1)
    assert load_recipe(path, ["seed=2", "seed=2", "student.lora={r: 8}", "student.lora.alpha=4"]).student.lora.r == 8


def test_words_and_numbers_of_a_recipe_mean_what_their_key_wants(path):
    path.write_text(
        "vat: {enabled: no}\npacking: off\ngradient_checkpointing: on\ndeepspeed: off\ngroup_by: ~\nname: no\noutput: o\n"
        "student: {text_config: {model_type: qwen2, tie: no, eps: 1e-6}}\nstages: [on]\nstage:\n"
        "  on: {objective: sft, learning_rate: 1e-3, samples: 1_000}\n"
        "  010: {objective: sft, learning_rate: 2, samples: 64}\n"
    )
    recipe = load_recipe(path)
    assert (recipe.vat.enabled, recipe.packing, recipe.gradient_checkpointing) == (False, False, True)
    assert (recipe.deepspeed, recipe.group_by, recipe.name, recipe.stages) == ("off", None, "no", ("on",))
    assert list(recipe.stage) == ["on", "010"]
    assert recipe.stage["on"].learning_rate == 0.001 and recipe.stage["on"].samples == 1000
    assert recipe.student.text_config == {"model_type": "qwen2", "tie": False, "eps": 1e-6}
    values = recipe_to_dict(recipe)
    assert yaml.safe_load(yaml.safe_dump(values)) == values, "words have become strings"


def test_distilling_stages_need_a_teacher(path):
    with pytest.raises(ValueError, match=r"teacher must be given for stage 'dpt', whose objective dpt distils"):
        load_recipe(path, ["teacher=null", "student.taf=false"])


def test_reentrant_checkpointing_is_allowed_without_alignment(path):
    assert load_recipe(path, ["gradient_checkpointing=reentrant", "vat.enabled=false"]).gradient_checkpointing


def test_unknown_and_broken_recipe_files(tmp_path):
    with pytest.raises(ValueError, match="'nope' is neither a file nor shipped"):
        load_recipe("nope")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_recipe(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("name: c\n")
    with pytest.raises(ValueError, match="output is missing"):
        load_recipe(tmp_path / "c.yaml")


def test_first_difference_names_the_key():
    a = {"x": 1, "y": {"z": [1, 2]}}
    assert first_difference(a, {"x": 1, "y": {"z": [1, 2]}}) is None
    assert first_difference(a, {"x": 1, "y": {"z": [1, 3]}}) == "y.z"
    assert first_difference(a, {"x": 1, "y": {"z": [1, 2]}, "w": 0}) == "w"


def test_command_line_lists_recipes_and_tells_mistakes_in_one_line(capsys, path, tmp_path):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == sorted(shipped_recipes())
    assert main(["train", str(path), "--resume", "seed=x"]) == 2
    assert capsys.readouterr().err == "cdistill: error: seed must be a whole number, got 'x'\n"
    assert main(["train", str(path), f"output={tmp_path / 'o'}"]) == 2
    assert capsys.readouterr().err == "cdistill: error: teacher: there is no folder 't'\n"
    assert not (tmp_path / "o").exists()
    with pytest.raises(SystemExit) as exit_code:
        main(["train", str(path), "--fast"])
    assert exit_code.value.code == 2


def test_help_imports_nothing_heavy():
    code = (
        "import sys, cdistill.cli, cdistill.train\n"
        "heavy = {'torch', 'numpy', 'transformers', 'deepspeed', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_papers_recipes_train_on_its_sets():
    """The files that `cdistill data presets` tells to download, below the folder data, once each."""
    expected = {"dpt": "llava-558k", "dft": "llava-665k", "sft": "llava-665k"}
    for name in ("paper-qwen1.5-1.8b", "paper-mobilellama-1.4b", "qwen2.5-vl-3b", "qwen3-vl-2b", "official"):
        recipe = load_recipe(name)
        for stage, preset in expected.items():
            (part,), data = find_preset(preset).parts, recipe.stage[stage].data
            assert (data.path, Path(data.images)) == (f"data/{part.annotation}", Path("data") / part.images)
            assert recipe.stage[stage].samples == part.records
    extended = load_recipe("paper-extended")
    assert {extended.stage[stage].samples for stage in ("dft", "sft")} == {find_preset("extended").records}
    assert load_recipe("paper-mobilellama-1.4b").stage["sft"].data.template == "vicuna_v1"
