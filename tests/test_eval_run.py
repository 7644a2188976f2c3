"""`cdistill eval MODEL --task`: replies into a folder, killed, resumed and shared, and every mistake in one line."""

import json
import shutil
from importlib.metadata import version

import pytest
import torch
from builtin_models import llava, text_config
from op_cases import assert_as_exact_as_eager
from PIL import Image
from survive_runs import command
from tqdm import tqdm
from transformers import Qwen2ForCausalLM

from cdistill.builtin.dataset import build_tokenizer
from cdistill.builtin.scorer import evaluate
from cdistill.builtin.writer import write
from cdistill.cli import main
from cdistill.eval import benchmarks, tasks
from cdistill.eval.builtin_task import Exam
from cdistill.eval.contract import Answer, Question
from cdistill.eval.inference import Inference
from cdistill.eval.loading import load
from cdistill.eval.pictures import Pictures
from cdistill.eval.prompts import Prompts
from cdistill.eval.results import Results
from cdistill.eval.runner import Runner, by_images
from cdistill.models.load import load_for_evaluation, resolve_folder

N = 2  # entries per sub-type: 14 images, 28 questions


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The built-in world's SugarCrepe, and the files of two tasks in one folder."""
    folder = tmp_path_factory.mktemp("data")
    for task in ("sugarcrepe", "winoground"):
        write(task, folder / task, n=N)
    return folder


def run(*arguments):
    """`cdistill eval` in this process."""
    return main(["eval", *map(str, arguments)])


def refused(capsys, *arguments):
    """The one line that it ends with."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "cdistill: error" in line]
    assert len(lines) == 1
    return lines[0].removeprefix("cdistill: error: ")


def lines(folder, task="sugarcrepe"):
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole")
    assert run("builtin:teacher", "--task", "sugarcrepe", "--data", data, "--output", output, "--batch-size", 8) == 0
    return output


def test_replies_are_transformers_and_files_are_scored_again(data, whole, tmp_path, capsys):
    said = lines(whole)
    assert [line["id"] for line in said] == [q.id for q in benchmarks.get("sugarcrepe").questions(data / "sugarcrepe")]
    loaded = load("builtin:teacher")
    for line in said[::9]:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": line["prompt"]}]}]
        text = loaded.processor.apply_chat_template(chat, add_generation_prompt=True)
        image = Image.open(data / "sugarcrepe" / line["images"][0])
        inputs = loaded.processor(text=text, images=image, return_tensors="pt")
        made = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=line["max_new_tokens"])
        reply = loaded.processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert (line["reply"], line["cut"]) == (reply, False)
    result = json.loads((whole / "sugarcrepe.json").read_text())
    assert main(["eval", "score", "sugarcrepe", str(whole / "sugarcrepe.jsonl"), "--json", str(tmp_path / "o")]) == 0
    again = json.loads((tmp_path / "o").read_text())
    assert {name: result[name] for name in ("metrics", "counts", "cut", "unparsed")} == {
        name: again[name] for name in ("metrics", "counts", "cut", "unparsed")
    }
    assert result["run"]["name"] == "builtin:teacher" and result["versions"]["torch"] == version("torch")


@pytest.mark.parametrize("batch_size", ["1", "32", "auto"])
def test_batches_of_any_size_say_the_same(data, whole, tmp_path, capsys, batch_size):
    options = ("--task", "sugarcrepe", "--data", data, "--output", tmp_path, "--batch-size", batch_size)
    assert run("builtin:teacher", *options) == 0
    assert lines(tmp_path) == lines(whole)
    said = capsys.readouterr()
    assert "sugarcrepe: 28 questions about 14 images" in said.out and "forward passes" in said.out
    assert "28/28" in said.err and "questions/s" in said.err


def test_several_tasks_have_folders_of_their_own(data, tmp_path):
    out = tmp_path / "results.json"
    tasks_ = ("--task", "winoground", "--task", "sugarcrepe")
    assert run("builtin:teacher", *tasks_, "--data", data, "--output", tmp_path / "o", "--json", out) == 0
    assert set(json.loads(out.read_text())) == {"winoground", "sugarcrepe"}
    scores = [line["score"] for line in lines(tmp_path / "o", "winoground")]
    assert all(0.0 <= score <= 1.0 for score in scores) and len(set(scores)) > 4
    loaded = load("builtin:teacher")
    line = lines(tmp_path / "o", "winoground")[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": line["prompt"]}]}]
    text = loaded.processor.apply_chat_template(chat, add_generation_prompt=True)
    image = Image.open(data / "winoground" / line["images"][0])
    with torch.no_grad():
        logits = loaded.model(**loaded.processor(text=text, images=image, return_tensors="pt")).logits[0, -1]
    (token,) = loaded.processor.tokenizer(line["continuation"])["input_ids"]
    assert scores[0] == pytest.approx(float(logits.softmax(-1)[token]), rel=1e-4)


ASK = ("eval", "builtin:teacher", "--task", "sugarcrepe", "--batch-size", "4")


def test_a_killed_run_goes_on_where_it_was(data, whole, tmp_path):
    options = (*ASK, "--data", data, "--output", tmp_path)
    code, _ = command(*options, plan={"call": "cdistill.eval.results.write_line", "nth": 11})
    assert code == -9 and len(lines(tmp_path)) == 10
    path = tmp_path / "sugarcrepe.jsonl"
    path.write_bytes(path.read_bytes()[:-40])  # a line that was being written
    asked = []
    generate = Inference.generate

    def counted(self, prompts):
        asked.extend(prompts)
        return generate(self, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inference, "generate", counted)
        assert main([*map(str, options), "--resume"]) == 0
    assert len(asked) == 28 - 9
    assert (tmp_path / "sugarcrepe.jsonl").read_bytes() == (whole / "sugarcrepe.jsonl").read_bytes()
    assert (tmp_path / "sugarcrepe.json").read_bytes() == (whole / "sugarcrepe.json").read_bytes()


def test_a_signal_stops_after_the_batch(data, tmp_path):
    plan = {"set": ["cdistill.eval.results", "write_line", _stop_after_a_line]}
    code, said = command(*ASK, "--data", data, "--output", tmp_path, plan=plan)
    assert code == 143 and f"replies are in {tmp_path}; go on with --resume" in said
    assert len(lines(tmp_path)) == 4 and not (tmp_path / "sugarcrepe.json").exists()


def _stop_after_a_line(descriptor, line):
    import os
    import signal

    os.write(descriptor, line.encode())
    os.kill(os.getpid(), signal.SIGTERM)


def test_two_processes_share_the_work(data, whole, tmp_path):
    options = (*ASK, "--data", data, "--output", tmp_path, "--processes", "2")
    code, said = command(*options, plan={"call": "cdistill.eval.results.write_line", "nth": 6, "rank": 1})
    assert code == 1 and "process 1 of 2 was killed by SIGKILL" in said
    assert 5 <= len(lines(tmp_path)) < 28
    code, said = command(*options, "--resume")
    assert code == 0, said
    assert (tmp_path / "sugarcrepe.jsonl").read_bytes() == (whole / "sugarcrepe.jsonl").read_bytes()
    assert said.count("mean ") == 1


def test_a_folder_of_something_else_is_refused(data, whole, tmp_path, capsys):
    def ask(*changed, model="builtin:teacher", output=whole, options=("--resume",)):
        return refused(capsys, model, "--task", "sugarcrepe", "--data", data, "--output", output, *options, *changed)

    before = {path: path.read_bytes() for path in whole.iterdir()}
    assert "holds replies to sugarcrepe; go on with --resume" in ask(options=())
    copy = shutil.copytree(resolve_folder("builtin:teacher", "model"), tmp_path / "copy")
    said = ask(model=copy)
    assert said.startswith(f"--output: {whole} is of another run: the model 'builtin:teacher' wrote it")
    assert "its form was another one (fp32, now bf16)" in ask("--dtype", "bf16")
    assert "limit was None, now 3" in ask("--limit", 3)
    weights = copy / "model.safetensors"
    data_ = bytearray(weights.read_bytes())
    assert run(copy, "--task", "sugarcrepe", "--data", data, "--limit", 2, "--output", tmp_path / "own") == 0
    data_[-1] ^= 1
    weights.write_bytes(data_)
    said = ask("--limit", 2, model=copy, output=tmp_path / "own")
    assert "its fingerprint was another one" in said
    other = shutil.copytree(data / "sugarcrepe", tmp_path / "sugarcrepe")
    text = (other / "swap_obj.json").read_text()
    (other / "swap_obj.json").write_text(text.replace("left", "right", 1).replace("above", "below", 1))
    said = refused(capsys, "builtin:teacher", "--task", "sugarcrepe", "--data", other, "--output", whole, "--resume")
    assert "to other questions: data was" in said
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_missing_images_are_named_and_left_out_or_wrong(data, tmp_path, capsys):
    own = shutil.copytree(data / "sugarcrepe", tmp_path / "data")
    gone = own / "images" / "add_att_1.png"
    gone.unlink()
    torn = own / "images" / "swap_obj_0.png"
    torn.write_bytes(torn.read_bytes()[:100])
    options = ("builtin:teacher", "--task", "sugarcrepe", "--data", own, "--output", tmp_path / "o")
    assert run(*options) == 0
    said = capsys.readouterr().out
    assert "1 of 14 images are missing" in said and "images/add_att_1.png" in said
    assert "the images of 2 questions cannot be read" in said and "swap_obj_0.png" in said
    assert "4 questions without their images are left out" in said
    result = json.loads((tmp_path / "o" / "sugarcrepe.json").read_text())
    assert (result["answers"], result["missing"]) == (24, 4)
    assert run(*options[:-1], tmp_path / "w", "--missing", "wrong") == 0
    wrong = json.loads((tmp_path / "w" / "sugarcrepe.json").read_text())
    assert (wrong["answers"], wrong["missing"]) == (28, 4)
    both = wrong["counts"]["add_att"], result["counts"]["add_att"]
    assert both == ({"right": 2, "n": 4}, {"right": 2, "n": 2})
    for name in (gone.name, torn.name):
        shutil.copy(data / "sugarcrepe" / "images" / name, own / "images" / name)
    assert run(*options[:-1], tmp_path / "w", "--missing", "wrong", "--resume") == 0  # they are asked, now
    assert json.loads((tmp_path / "w" / "sugarcrepe.json").read_text())["counts"]["add_att"] == {"right": 4, "n": 4}
    shutil.rmtree(own / "images")
    assert "none of its images is there" in refused(capsys, *options[:-2])


def test_a_limit_cuts_no_entry_and_takes_all_kinds(data, tmp_path):
    """Two entries of each of seven files: a quarter of 28 questions are four entries, whole."""
    assert run("builtin:teacher", "--task", "sugarcrepe", "--data", data, "--limit", 7, "--output", tmp_path) == 0
    asked = [line["id"] for line in lines(tmp_path)]
    entries = list(dict.fromkeys(name.rsplit("/", 1)[0] for name in asked))
    assert asked == [f"{entry}/{order}_first" for entry in entries for order in ("positive", "negative")]
    assert len(entries) == len({entry.split("/")[0] for entry in entries}) == 4


def test_mistakes_in_one_line(data, tmp_path, capsys):
    ask = ("builtin:teacher", "--task", "sugarcrepe")
    for message, *arguments in (
        ("--data must name the folder", *ask),
        ("--data: there is no folder", *ask, "--data", tmp_path / "none"),
        ("has none of SugarCrepe's files", *ask, "--data", tmp_path),
        ("has no folder sade", "builtin:teacher", "--task", "compositional", "--data", data),
        ("there is no task 'sugarcrap'", "builtin:teacher", "--task", "sugarcrap", "--data", data),
        ("--limit must be at least 1", *ask, "--data", data, "--limit", 0),
        ("--resume needs --output", *ask, "--data", data, "--resume"),
        ("--processes needs --output", *ask, "--data", data, "--processes", 2),
        ("--load-in 4bit needs a CUDA GPU", *ask, "--data", data, "--load-in", "4bit"),
        ("sees no images, and sugarcrepe shows some", "builtin:student-base", *ask[1:], "--data", data),
        ("--n is of the built-in task", *ask, "--data", data, "--n", 5),
        ("--limit is of benchmarks", "builtin:teacher", "--limit", 5),
        ("--limit is of benchmarks", "builtin:teacher", "--limit", 0),
        ("--processes is of benchmarks", "builtin:teacher", "--processes", 2),
        ("model: there is no folder 'nowhere'", "nowhere", *ask[1:], "--data", data),
    ):
        assert message in refused(capsys, *arguments)


def test_models_that_cannot_be_loaded_are_told_in_one_line(data, tmp_path, capsys):
    folder = shutil.copytree(resolve_folder("builtin:teacher", "model"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "processor_config.json").unlink()
    ask = ("--task", "sugarcrepe", "--data", data)
    assert "m has no image processor (preprocessor_config.json" in refused(capsys, folder, *ask)
    assert run(folder, "--n", 1) == 0  # the built-in task comes with its pixels
    other = {"model_type": "internvl", "vision_config": {}, "text_config": {"model_type": "qwen2"}}
    for values, message in (
        (config | {"model_type": "nothing_known"}, "model_type 'nothing_known' is not one that transformers knows"),
        (other, "has no image processor"),
        ({"model_type": "siglip_vision_model"}, "do not fit its config.json"),
    ):
        (folder / "config.json").write_text(json.dumps(values))
        said = refused(capsys, folder)
        assert said.startswith("model: ") and message in said and "\n" not in said
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink()
    assert "it has no chat template" in refused(capsys, folder)


def test_an_adapter_is_measured_with_its_base(tmp_path, data):
    from peft import LoraConfig, get_peft_model

    folder = resolve_folder("builtin:teacher", "model")
    model = load_for_evaluation("builtin:teacher", "model")
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(folder)}))
    loaded = load(str(tmp_path / "adapter"))
    assert loaded.processor.image_processor is not None and loaded.form == "fp32"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        merged, eager = (model(input_ids=ids).logits for model in (loaded.model, adapted.eval()))
        assert_as_exact_as_eager([merged], [eager], [adapted.double()(input_ids=ids).logits])
    assert loaded.fingerprint != load("builtin:teacher").fingerprint


def test_memory_that_runs_out_halves_the_batches(data, monkeypatch):
    said, sizes = [], []
    loaded = load("builtin:teacher")
    prompts = Prompts(loaded.processor)
    task = tasks.prepare("sugarcrepe", data)

    def tight(batch):
        if len(batch) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch))
        return [Answer(question) for question, _ in batch]

    runner = Runner(Inference(loaded.model, prompts), tasks.source(task.pictures, prompts), 16, tight, say=said.append)
    bar = tasks.tqdm(total=28, disable=True)
    answered = [answer.question.id for answers in runner.answers(task.asked, bar) for answer in answers]
    assert sorted(answered) == sorted(question.id for question in task.asked)
    assert runner.batch_size == 4 and max(sizes) == 4
    assert said[0] == "memory does not suffice for 16 questions at once: batches of 8 from here on"


def test_the_plan_says_what_will_be_done(data):
    questions = benchmarks.get("sugarcrepe").questions(data / "sugarcrepe")
    loaded = load("builtin:teacher")
    prompts = Prompts(loaded.processor)
    inference = Inference(loaded.model, prompts)
    runner = Runner(inference, tasks.source(Pictures([data / "sugarcrepe"]), prompts), 7)
    work = runner.plan(questions)
    assert (work.questions, work.groups, work.batch) == (28, len(by_images(questions)), 7)
    lengths = [len(p.ids) for q in questions for p in runner.source([q])]
    assert work.tokens == pytest.approx(sum(lengths), rel=0.1)
    before = inference.passes
    with tasks.tqdm(total=28, disable=True) as bar:
        list(runner.answers(questions, bar))
    assert inference.passes - before <= work.passes
    chosen = Runner(inference, runner.source)
    assert chosen.plan(questions).batch == chosen.batch_size == 32


def test_images_in_parquet_files_and_of_several_names(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    pixels = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(5)]
    for i, image in enumerate(pixels):
        image.save(tmp_path / f"{i}.png")
    cells = [{"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": "x.png"} for i in range(5)]
    parquet.write_table(
        pa.table({"a.b": cells, "plain": [c["bytes"] for c in cells]}), tmp_path / "t.parquet", row_group_size=2
    )
    pictures = Pictures([tmp_path / "elsewhere", tmp_path])
    for name in ("t.parquet#3.a.b", "t.parquet#3.plain", "3.png", "none.png|3.png"):
        assert pictures.missing(name) is None
        assert pictures.open(name).getpixel((0, 0)) == (3, 0, 0)
    assert "has no row 5" in pictures.missing("t.parquet#5.plain")
    assert "has no column" in pictures.missing("t.parquet#0.other")
    assert "u.parquet#0.plain is missing" in pictures.missing("u.parquet#0.plain")
    with pytest.raises(ValueError, match="outside its root"):
        pictures.missing("../x.png")


def test_answers_are_found_again_only_where_they_answer(tmp_path):
    asked = [Question(str(i), "what", (f"{i}.png",), facts={"label": "A"}) for i in range(3)]
    results = Results(tmp_path / "new", {"name": "m"})
    results.check("t", {"data": 1}, resume=False)
    results.begin("t", {"data": 1})
    results.append("t", [Answer(asked[0], "A"), Answer(asked[1], "", None)])
    assert list(results.answers("t", asked)) == ["0"]  # an empty reply of no token stands for none
    with pytest.raises(ValueError, match="line 1: is no answer to a question of t as it is asked now"):
        results.answers("t", [Question("0", "who", ("0.png",), facts={"label": "A"})])
    with pytest.raises(ValueError, match="is of another run: the model 'm' wrote it"):
        Results(tmp_path / "new", {"name": "other"})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x.jsonl").touch()
    with pytest.raises(ValueError, match="holds files of something else"):
        Results(tmp_path / "old", {"name": "m"})


def test_the_built_in_task_by_the_runner_is_exactly_what_its_scorer_says(capsys, tmp_path):
    model = load_for_evaluation("builtin:teacher", "model")
    expected = evaluate(model, n=12, seed=3)
    assert Exam(n=12, seed=3).evaluate(model) == expected
    assert run("builtin:teacher", "--n", 12, "--seed", 3, "--json", tmp_path / "o.json") == 0
    assert json.loads((tmp_path / "o.json").read_text()) == expected
    said = capsys.readouterr()
    assert "accuracy in % on held-out scenes (image), 12 questions per sub-type" in said.out and "120/120" in said.err
    torch.manual_seed(0)
    worse = llava()
    assert Exam(n=12).evaluate(worse) == evaluate(worse, n=12)
    student = load_for_evaluation("builtin:student-base", "model")
    assert Exam(n=6, modality="text").evaluate(student) == evaluate(student, n=6, modality="text")
    with pytest.raises(ValueError, match="modality must be text"):
        Exam(n=6).evaluate(student)


def test_a_model_that_knows_other_words_takes_the_built_in_task_in_its_own(tmp_path, capsys):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(text_config(vocab_size=len(build_tokenizer()) + 1))
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["more"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert run(tmp_path, "--n", 2) == 0
    assert "accuracy in % on held-out scenes (text), 2 questions" in capsys.readouterr().out


def test_presets_say_what_to_fetch(capsys):
    assert main(["eval", "presets"]) == 0
    said = capsys.readouterr().out
    for name in benchmarks.NAMES:
        assert name in said
    assert main(["eval", "presets", "sugarcrepe"]) == 0
    said = capsys.readouterr().out
    assert "SugarCrepe (2023)" in said and "MIT" in said and "7,511" in said and "val2017" in said


def test_data_check_counts_questions_and_images(data, tmp_path, capsys):
    own = shutil.copytree(data / "sugarcrepe", tmp_path / "data")
    (own / "images" / "swap_att_0.png").write_bytes(b"no image")
    assert main(["data", "check", str(own), "--preset", "sugarcrepe"]) == 1
    said = capsys.readouterr().out
    assert "sugarcrepe: 28 questions about 14 images, 13 of them good" in said
    assert "swap_att 2 (not 666)" in said and "unreadable image" in said


def test_what_is_not_a_number_is_no_wrong_answer(data, monkeypatch):
    """As of fp16 that overflows: of every question, before one is asked, or of a single one."""
    loaded = load("builtin:teacher")
    inference = Inference(loaded.model, Prompts(loaded.processor))
    questions = benchmarks.get("winoground").questions(data / "winoground")[:4]
    pictures = Pictures([data / "winoground", data / "winoground" / "images"])

    def source(group):
        return inference.prompts.about(group, [pictures.open(name) for name in group[0].images])

    with monkeypatch.context() as patch:
        patch.setattr(inference, "log_likelihoods", lambda prompts: [0.0] * (len(prompts) - 1) + [float("nan")])
        with pytest.raises(ValueError, match=r"the log-likelihood of question '.*' is not a number in torch\.float32"):
            list(Runner(inference, source, batch_size=4).answers(questions, tqdm(disable=True)))
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"model: \w+ gives no numbers in torch\.float32; take --dtype"):
        inference.find_way()
