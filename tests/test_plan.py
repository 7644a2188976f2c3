"""`cdistill plan`: weights and states of real runs, the paper's sizes by hand, suggestions, and the command."""

import pytest
from builtin_models import make_recipe
from transformers import LlavaConfig, Qwen2Config, SiglipVisionConfig, TrainerCallback

from cdistill.cli import main
from cdistill.plan.command import memory_size
from cdistill.plan.memory import plan
from cdistill.plan.suggestions import suggestions
from cdistill.train import run
from cdistill.train.build import build_models
from cdistill.train.recipes import load_recipe, with_overrides

PAPER = "paper-qwen1.5-1.8b"


class Held(TrainerCallback):
    """Bytes of what an optimizer and the gradients hold at the end of every stage."""

    def __init__(self):
        self.states, self.gradients, self.weights = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradients.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
            self.weights.append(sum(p.nbytes for p in model.parameters()))

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        self.states.append(sum(x.nbytes for s in inner.state.values() for x in s.values() if x.dim()))


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}])
def test_weights_gradients_and_states_are_exact(models, tmp_path, lora):
    recipe = make_recipe(tmp_path / "run", models, student__lora=lora)
    held = Held()
    run(recipe, callbacks=[held])
    planned = plan(recipe, gpus=1, device="cpu", precision="fp32", length=100, visual=36)
    steps = [stage.phases["optimizer step"] for stage in planned.stages]
    assert [step["student weights"] for step in steps] == held.weights
    assert [step["gradients"] for step in steps] == held.gradients
    assert [step["optimizer"] for step in steps] == held.states
    teacher = build_models(recipe).teacher  # whose vision encoder and adapter the student has
    own = sum(p.nbytes for part in (teacher.model.language_model, teacher.lm_head) for p in part.parameters())
    tied = teacher.lm_head.weight.nbytes
    assert [step.get("teacher weights") for step in steps] == [own - tied, own - tied, None]


def test_several_teachers_are_all_counted(models, tmp_path):
    one = str(models / "teacher")
    given = {"teacher": None, "student__taf_teacher": "a", "stages": ["dft"]}

    def planned(**weights):
        teachers = {name: {"model": one, "weights": {"default": weight}} for name, weight in weights.items()}
        recipe = make_recipe(tmp_path / "run", models, teachers=teachers, **given)
        return plan(recipe, gpus=1, device="cpu", precision="fp32", length=100, visual=36).stages[0].phases, recipe

    alone, _ = planned(a=1)
    both, recipe = planned(a=0.5, b=0.5)
    teachers = build_models(recipe).teachers.values()
    adapter = sum(p.nbytes for p in next(iter(teachers)).model.multi_modal_projector.parameters())  # b's is its own
    for phase, parts in both.items():
        assert parts["teacher weights"] == 2 * alone[phase]["teacher weights"] + adapter
    assert both["losses"]["targets"] == 2 * alone["losses"]["targets"]
    for phase in ("teacher", "forward", "losses", "backward begins"):
        assert sum(both[phase].values()) > sum(alone[phase].values()) + alone[phase]["teacher weights"]
    plain = plan(
        make_recipe(tmp_path / "run", models, stages=["dft"]),
        gpus=1,
        device="cpu",
        precision="fp32",
        length=100,
        visual=36,
    )
    assert plain.stages[0].phases.keys() == alone.keys()


def qwen(width, inner, layers, heads):
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """A folder with the configurations of the paper's models, and nothing else: SigLIP so400m/14@384, Qwen1.5-4B and 1.8B."""
    folder = tmp_path_factory.mktemp("paper")
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    teacher = LlavaConfig(
        vision_config=vision,
        text_config=qwen(2560, 6912, 40, 20),
        image_seq_length=729,
        image_token_index=151646,
        vision_feature_select_strategy="full",
    )
    teacher.save_pretrained(folder / "checkpoints" / "llava-qwen1.5-4b")
    qwen(2048, 5504, 24, 16).save_pretrained(folder / "checkpoints" / "qwen1.5-1.8b")
    return folder


@pytest.fixture
def there(paper, monkeypatch):
    monkeypatch.chdir(paper)


def qwen_parameters(width, inner, layers):
    layer = 4 * width * width + 3 * width + 3 * width * inner + 2 * width
    return 2 * 151936 * width + layers * layer + width


def test_the_papers_pair_by_hand(there):
    vision = 3 * 14 * 14 * 1152 + 1152 + 27 * 27 * 1152 + 2 * 1152
    vision += 27 * (4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 1152 + 4304 + 4 * 1152)
    projector, fetched_map = 1152 * 2560 + 2560 + 2560 * 2560 + 2560, 2560 * 2048 + 2048
    student, teacher = qwen_parameters(2048, 5504, 24), qwen_parameters(2560, 6912, 40)
    assert 1.83e9 < student < 1.84e9 and 3.94e9 < teacher < 3.96e9
    dpt, dft, sft = plan(load_recipe(PAPER), gpus=4).stages
    assert dft.phases["losses"] | {"activations": 0, "images": 0, "logits": 0} == {
        "CUDA and NCCL": 10**9,
        "student weights": 2 * (student + vision + projector + fetched_map),
        "optimizer": 12 * (student + fetched_map) // 4,
        "teacher weights": 2 * teacher,  # the student has its vision encoder and its adapter
        "gradients": 2 * (student + fetched_map) // 4,  # 16 micro-batches of 2 on each of 4 GPUs
        "activations": 0,
        "images": 0,
        "targets": 4 * 10 * 2 * (2048 - 729) * 729,  # 10 of 24 layers
        "logits": 0,
    }
    assert dpt.phases["optimizer step"]["optimizer"] == 12 * fetched_map // 4
    part = (student + fetched_map) // 4
    assert dft.phases["optimizer step"]["gradients"] == 2 * part + 2 * part + 4 * part  # in a list, flattened, in fp32
    bucket = 2 * 500_000_000
    assert dft.phases["backward begins"]["gradients"] == 2 * (student + fetched_map) // 4 + bucket
    assert "teacher weights" not in sft.phases["losses"]
    # 24 layers of checkpointed inputs in bf16, beside working memory
    assert dft.phases["losses"]["activations"] > 24 * 2 * 2048 * 2048 * 2
    logits = 2 * (2048 - 729) * 151936
    assert sft.phases["backward of the losses"]["logits"] == pytest.approx(12 * logits, rel=0.02)  # fp32 3 times


def totals(recipe, **options):
    return [stage.total for stage in plan(recipe, **options).stages]


@pytest.mark.parametrize("zero", [2, 3])
def test_more_gpus_smaller_batches_and_shorter_samples_never_need_more(there, zero):
    recipe = load_recipe(PAPER, [f"deepspeed={zero}"])
    for smaller, larger in ((2, 1), (4, 2), (8, 4)):
        assert all(a <= b for a, b in zip(totals(recipe, gpus=smaller), totals(recipe, gpus=larger), strict=True))
    by_batch = [totals(with_overrides(recipe, [f"stage.dft.micro_batch_size={n}"]), gpus=4)[1] for n in (1, 2, 4, 8)]
    assert by_batch == sorted(by_batch) and by_batch[0] < by_batch[-1]
    by_length = [totals(recipe, gpus=8, length=n) for n in (1024, 2048, 4096)]
    assert all(list(x) == sorted(x) and x[0] < x[-1] for x in zip(*by_length, strict=True))


def test_teachers_that_take_less(there):
    def held(*overrides):
        planned = plan(load_recipe(PAPER, overrides), gpus=4)
        return planned.stages[1].phases["losses"]["teacher weights"]

    sizes = [held(), held("teacher_memory.quantization=8bit"), held("teacher_memory.quantization=4bit")]
    sizes += [held("teacher_memory.zero=3"), held("teacher_memory.zero=3", "teacher_memory.offload=true")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    assert sizes[3:] == [sizes[0] // 4, 0]
    assert held("teacher_memory.cache=kept") == 0


@pytest.mark.parametrize(
    ("limit", "gpus", "overrides"),
    [(16e9, 4, []), (24e9, 1, ["deepspeed=off", "stages=[dft]"]), (24e9, 2, []), (10**9, 8, ["stages=[dft]"])],
)
def test_every_suggestion_can_be_planned_again_and_saves(there, limit, gpus, overrides):
    recipe = load_recipe(PAPER, overrides)
    planned = plan(recipe, gpus=gpus)
    found = suggestions(planned, int(limit), gpus=gpus)
    assert planned.total > limit and found
    applied = list(overrides)
    for suggestion in found:
        before = totals(load_recipe(PAPER, applied), gpus=gpus)
        applied += suggestion.overrides
        after = totals(load_recipe(PAPER, applied), gpus=gpus)
        assert max(after) == suggestion.total
        assert suggestion.saved == max(b - a for a, b in zip(after, before, strict=True)) > 0
    assert (max(after) <= limit) == (limit > 10**9)


def test_what_a_later_suggestion_makes_superfluous_is_left_out(there):
    found = suggestions(plan(load_recipe(PAPER), gpus=2), 24 * 10**9, gpus=2)
    assert [x.overrides for x in found] == [("teacher_memory.zero=3", "teacher_memory.offload=true")]


def test_nothing_is_suggested_for_what_fits(there):
    assert suggestions(plan(load_recipe(PAPER), gpus=8), 80 * 10**9, gpus=8) == []


def test_the_command_when_it_fits(there, capsys):
    assert main(["plan", PAPER, "--gpu", "80GB", "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "8 GPUs, bf16, deepspeed 2" in out and "student weights" in out and "fits:" in out


def test_the_command_when_it_does_not_and_then_with_what_it_suggests(there, capsys):
    command = ["plan", PAPER, "--gpu", "16GB", "--gpus", "4"]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and "with all of them it fits" in out
    keys = [word for line in out.splitlines() if line.startswith("  ") for word in line.split() if "=" in word]
    assert keys and main([*command, *keys]) == 0
    assert main(["plan", PAPER, "--gpu", "2GB", "--gpus", "4"]) == 1
    assert "no key that is left makes it fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--gpu", "24GB"], "recipe 'nothing' is neither a file nor shipped"),
        ([PAPER, "--gpu", "24 apples"], "gpu must be a size such as 24GB or 80GiB, got '24 apples'"),
        ([PAPER, "--gpu", "0GB"], "gpu must be a size"),
        ([PAPER, "--gpu", "24GB", "--gpus", "0"], "gpus must be at least 1, got 0"),
        ([PAPER, "--gpu", "24GB", "--gpus", "3"], "stage.dpt.global_batch_size must be a multiple of 3 processes"),
        ([PAPER, "--gpu", "24GB", "teacher=lost"], "teacher: there is no folder 'lost'"),
        ([PAPER, "--gpu", "24GB", "student.base=lost"], "student.base: there is no folder 'lost'"),
        ([PAPER, "--gpu", "24GB", "teacher=."], "teacher: config.json is missing"),
        ([PAPER, "--gpu", "24GB", "teacher=checkpoints/qwen1.5-1.8b"], "teacher: checkpoints/qwen1.5-1.8b holds no"),
        ([PAPER, "--gpu", "24GB", "--length", "1"], "length must be at least 2, got 1"),
        ([PAPER, "--gpu", "24GB", "--length", "700"], "visual must be at least 0 and below length 700, got 729"),
        ([PAPER, "--gpu", "24GB", "--answers", "2000"], "answers must be from 1 to 1319, got 2000"),
        (
            [PAPER, "--gpu", "24GB", "--sequence-parallel", "8"],
            "sequence_parallel must divide the teacher's 20 heads, got 8",
        ),
        ([PAPER, "--gpu", "24GB", "--sequence-parallel", "0"], "sequence_parallel must be at least 1, got 0"),
        (
            [PAPER, "--gpu", "24GB", "--sequence-parallel", "4", "--gpus", "2"],
            "must divide the number of processes, 2, got 4",
        ),
        ([PAPER, "--gpu", "24GB", "depspeed=3"], "depspeed is not a known key"),
        (
            ["builtin-student-base", "student.text_config.hidden_size=48"],
            "student.text_config: attention can be compared of heads whose dim is a multiple of 8 from 16 to 256, and the "
            "qwen2's is 12, hidden_size 48 by num_attention_heads 4",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(there, capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_sequences_that_are_shared_need_less_of_what_grows_with_them(there, capsys):
    options = {"gpus": 4, "length": 65536, "answers": 64}
    alone, shared = (plan(load_recipe(PAPER, [f"sequence_parallel={n}", "vat.rows=answer"]), **options) for n in (1, 4))
    for before, after in zip(alone.stages, shared.stages, strict=True):
        assert after.components["student weights"] == before.components["student weights"]
        assert (
            before.components["activations"] / 4
            < after.components["activations"]
            < before.components["activations"] / 2
        )
    assert main(["plan", PAPER, "--gpu", "80GB", "--sequence-parallel", "2", "vat.rows=answer"]) == 0
    assert "2 GPUs" in capsys.readouterr().out


def test_sizes_of_gpus():
    assert [memory_size(x) for x in ("24GB", "24gib", "80G", "1.5 GB")] == [
        24 * 10**9,
        24 * 2**30,
        8 * 10**10,
        15 * 10**8,
    ]


def test_recipes_of_the_builtin_task_can_be_planned():
    for name in ("builtin-teacher", "demo-compodistill"):
        planned = plan(load_recipe(name), gpus=1)
        assert 10**9 < planned.total < 3 * 10**9


def test_a_set_in_files_is_planned_by_its_max_length_without_opening_it(models, tmp_path):
    data = {"path": "nowhere.json", "max_length": 300}
    changes = {"stages": ["dft"], "stage__dft__data": data}
    (stage,) = plan(make_recipe(tmp_path / "run", models, **changes), gpus=1, device="cpu").stages
    assert (stage.setting.length, stage.setting.visual) == (300, 36)
