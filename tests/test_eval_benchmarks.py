"""Each benchmark's published files as they are, its authors' rules on replies, and the built-in world in these files."""

import json
import random

import pyarrow
import pytest
from eval_files import write_csv
from PIL import Image
from pyarrow import parquet

from cdistill.builtin import questions as builtin_questions
from cdistill.builtin import scenes
from cdistill.builtin.writer import holds
from cdistill.cli import main
from cdistill.eval import benchmarks
from cdistill.eval.benchmarks import builtin
from cdistill.eval.contract import Answer
from cdistill.eval.replies import agreement, first_word, letter, short_answer, yes_or_no_at_start, yes_unless_no


def lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def answers(questions, replies):
    return [Answer(question, reply) for question, reply in zip(questions, replies, strict=True)]


def metrics(name, folder, replies):
    benchmark = benchmarks.get(name)
    return {
        metric: round(value.percent, 4)
        for metric, value in benchmark.metrics(answers(benchmark.questions(folder), replies)).items()
    }


REPLIES = {
    # "NO", "no!" and "doesn't" are yes; commas go, the first sentence counts, a tab or a line's end does not part words
    yes_unless_no: {
        "No": "no",
        "no, it is": "no",
        "It does not. Yes": "no",
        "NO": "yes",
        "no!": "yes",
        "doesn't": "yes",
        "Yes. No": "yes",
        "": "yes",
        "It,s no": "no",
        "No\nway": "yes",
        "knot": "yes",
    },
    yes_or_no_at_start: {
        "Yes, no": "yes",
        "No.": "no",
        "  NO": "no",
        "noyes": "no",
        "know": "no",
        "It is yes": None,
        "y": None,
        "": None,
    },
    lambda reply: letter(reply, "AB"): {
        "A": "A",
        "a cat": "A",
        "(b)": "B",
        "AB B": "B",
        "The answer is B, not A": "B",
        "Abba": None,
        "": None,
        "C": None,
    },
    lambda reply: first_word(reply, ("yes", "no")): {"Nope, yes.": "yes", "NO yes": "no", "not": None},
    short_answer: {
        "A dog!": "dog",
        "the Two, three": "2 3",
        "2,000": "2000",
        "x-ray": "x ray",
        "x - ray": "x ray",
        "3.5 ft.": "3.5 ft",
        "dont": "don't",
        "couldntve": "couldntve",
        "couldnt've": "couldn't've",
        "none": "0",
        "U.S.A": "usa",
        "man's": "man's",
    },
    lambda reply: short_answer(reply, words_first=True): {"Yes?": "yes", "man's": "man 's", "1,5": "15"},
}


@pytest.mark.parametrize("rule", REPLIES)
def test_replies_are_read_by_each_rule(rule):
    assert {reply: rule(reply) for reply in REPLIES[rule]} == REPLIES[rule]


def test_agreement_leaves_out_each_of_ten_people():
    for same, expected in {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0, 10: 1.0}.items():
        assert agreement("x", ["x"] * same + ["y"] * (10 - same)) == pytest.approx(expected)


def test_rbench_by_the_authors_script(tmp_path, capsys):
    """Ten right of ten give 99.9994; lists count ids as often as they name them, and pass over those without an answer."""
    labels = ["Yes", "no", "It is not", "yes", "yes", "", "yes", "no.", "Yes", "yes"]
    records = [{"question_id": i, "image": f"{i}.jpg", "text": "?", "label": label} for i, label in enumerate(labels)]
    asked = tmp_path / "image-level_filterd.json"
    asked.write_text(json.dumps(records))
    ids = {1: list(range(10)), 2: [0, 1, 1, 77], 3: [3], 4: [4], 5: [9]}
    for number, each in ids.items():
        (tmp_path / f"nocaps_image-level_rel_ids_{number}.json").write_text(json.dumps(each))
    truth = ["no" if "no" in label.lower() else "yes" for label in labels]
    found = metrics("rbench", tmp_path, truth)
    eps = 1e-5

    def f1(right, false, missed):
        precision, recall = right / (right + false + eps), right / (right + missed + eps)
        return 2 * precision * recall / (precision + recall + eps)

    assert found["ids_1/f1"] == pytest.approx(100 * f1(7, 0, 0), abs=1e-4)
    assert round(f1(10, 0, 0), 6) == 0.999994
    assert found["f1"] == pytest.approx(20 * (f1(7, 0, 0) + 4 * f1(1, 0, 0)), abs=1e-4)
    assert (found["ids_2/accuracy"], found["ids_2/yes_ratio"]) == (100, pytest.approx(100 / 3, abs=1e-4))
    replies = lines(tmp_path / "out.jsonl", *({"question_id": i, "text": "Yes"} for i in (0, 1)))
    out = tmp_path / "out.json"
    files = [*map(str, sorted(tmp_path.glob("*_ids_?.json"))), str(asked), str(replies)]
    assert main(["eval", "score", "rbench", *files, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["metrics"]["ids_2/f1"] == pytest.approx(100 * f1(1, 2, 0))
    assert result["metrics"]["f1"] == pytest.approx(50 * (f1(1, 1, 0) + f1(1, 2, 0)))
    assert "no question of id list 3, 4, 5" in result["remarks"][0]
    assert main(["eval", "score", "rbench", files[0]]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_pope_by_split_and_their_mean(tmp_path):
    for split in ("random", "popular", "adversarial"):
        records = [{"question_id": i, "image": "a.jpg", "text": "?", "label": ["yes", "no"][i % 2]} for i in range(4)]
        lines(tmp_path / f"coco_pope_{split}.json", *records)
    found = metrics("pope", tmp_path, [*["No", "Yes", "Yes", "No"], *["No", "No"] * 2, *["Yes", "no"] * 2])
    assert (found["adversarial/precision"], found["adversarial/recall"], found["adversarial/f1"]) == (50, 50, 50)
    assert (found["popular/f1"], found["popular/precision"], found["popular/yes_ratio"]) == (0, 0, 0)
    assert (found["random/f1"], found["f1"], found["accuracy"], found["yes_ratio"]) == (100, 50, 66.6667, 33.3333)
    assert list(found)[-1] == "f1"


def test_reefknot_weighs_every_question_alike(tmp_path):
    shared = {"type": "Multichoice", "mllm_name": "", "response": ""}
    records = [
        {"image_id": "7", "query_prompt": "A. on B. in", "label": label, "relation_type": kind, **shared}
        for label, kind in (("D", "cognitive"), ("B", "cognitive"), ("A", "perception"), ("C", "cognitive"))
    ]
    lines(tmp_path / "Multichoice.jsonl", *records)
    found = metrics("reefknot", tmp_path, ["D. into", "C", "a", "C."])
    assert found == {"perception": 100, "cognitive": 66.6667, "total": 75}
    lines(tmp_path / "YESNO.jsonl", records[0] | {"label": "no", "relation_type": "perception"})
    lines(tmp_path / "VQA.jsonl", records[0] | {"label": "bag is on ground."})
    questions = benchmarks.get("reefknot").questions(tmp_path)
    assert questions[0].images == ("VG_100K/7.jpg|VG_100K_2/7.jpg",)
    found = metrics("reefknot", tmp_path, ["D. into", "C", "a", "C.", "Bag is on the ground", "No, yes"])
    assert (found["free/total"], found["yes_no/total"], found["total"]) == (100, 100, 75)
    lines(tmp_path / "YESNO.jsonl", records[0], {"image_id": "1"})
    with pytest.raises(ValueError, match=r"YESNO.jsonl line 1: label must be one of yes, no, got 'D'"):
        benchmarks.get("reefknot").questions(tmp_path)


def test_vsr_mmvp_and_naturalbench(tmp_path):
    records = [
        {"image": f"{i}.jpg", "image_link": "", "caption": "c", "label": i % 2, "relation": "on"} for i in range(4)
    ]
    lines(tmp_path / "vsr" / "test.jsonl", *records)
    found = metrics("vsr", tmp_path / "vsr", ["False", "true.", "Yes", "neither"])
    assert found == {"false": 50, "true": 50, "accuracy": 50}
    rows = [
        {"Index": i, "Question": "Which?", "Options": "(a) x (b) y", "Correct Answer": "(a)" if i % 2 else "(b)"}
        for i in (1, 2, 3, 4, 5)
    ]
    write_csv(tmp_path / "Questions.csv", rows)
    found = metrics("mmvp", tmp_path, ["A", "(b) y", "a", "A", "A"])
    assert found == {"accuracy": 75, "pairs": 50}  # the fifth has no partner
    assert "1 of 3 groups lack a question" in " ".join(
        benchmarks.get("mmvp").remarks(benchmarks.get("mmvp").questions(tmp_path))
    )
    row = {
        "Index": "0",
        "Question_0": "Is it?",
        "Question_1": "Is it not?",
        **{f"Image_{i}_Question_{q}": "Yes" if i == q else "No" for i in (0, 1) for q in (0, 1)},
        "Question_Type": "yes_no",
    }
    choice = row | {"Index": "1", "Question_Type": "multiple_choice"}
    choice |= {f"Image_{i}_Question_{q}": "A" if i == q else "B" for i in (0, 1) for q in (0, 1)}
    parquet.write_table(pyarrow.Table.from_pylist([row, choice]), tmp_path / "test.parquet")
    found = metrics("naturalbench", tmp_path, ["Yes", "no", "yes", "yes, no", "A", "B", "B", "The A."])
    assert found == {"accuracy": 87.5, "question": 75, "image": 75, "group": 50}
    asked = benchmarks.get("naturalbench").questions(tmp_path)
    assert asked[1].images == ("test.parquet#0.Image_1",) and asked[1].prompt == "Is it? Please answer Yes or No."


SAID = ["2"] * 3 + ["two cats"] * 7


def test_vqav2_vizwiz_and_textvqa_among_ten_people(tmp_path):
    people = [{"answer": answer, "answer_id": i} for i, answer in enumerate(SAID)]
    for name, key, records in (
        (
            "v2_OpenEnded_mscoco_val2014_questions",
            "questions",
            [{"image_id": 9, "question": "How?", "question_id": 90}],
        ),
        (
            "v2_mscoco_val2014_annotations",
            "annotations",
            [{"question_id": 90, "answer_type": "number", "answers": people}],
        ),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"info": {"a": [1]}, key: records}))
    asked = benchmarks.get("vqav2").questions(tmp_path)
    assert asked[0].images == ("COCO_val2014_000000000009.jpg",)
    assert asked[0].prompt == "How?\nAnswer the question using a single word or phrase."
    assert metrics("vqav2", tmp_path, ["Two."]) == {"number": 90, "accuracy": 90}
    assert metrics("vqav2", tmp_path, ["the 2 cats"]) == {"number": 100, "accuracy": 100}

    vizwiz = [{"image": "v.jpg", "question": "What?", "answers": people, "answer_type": "other", "answerable": 1}]
    (tmp_path / "val.json").write_text(json.dumps(vizwiz))
    assert metrics("vizwiz", tmp_path, ["2"]) == {"other": 90, "accuracy": 90}
    assert "respond with 'Unanswerable'.\nAnswer" in benchmarks.get("vizwiz").questions(tmp_path)[0].prompt
    (tmp_path / "val.json").write_text(json.dumps([{"image": "v.jpg", "question": "What?", "answer_type": "other"}]))
    with pytest.raises(ValueError, match=r"val.json line 1: answers is missing; take the validation split"):
        benchmarks.get("vizwiz").questions(tmp_path)

    text = [{"question_id": 1, "image_id": "i", "question": "what is IT?", "answers": SAID}]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": text}))
    with pytest.raises(ValueError, match="OCR"):
        benchmarks.get("textvqa").questions(tmp_path)
    tokens = {"data": [{"image_id": "i", "ocr_tokens": ["STOP", "2"]}]}
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps(tokens))
    prompt = "What is it?\nReference OCR token: STOP, 2\nAnswer the question using a single word or phrase."  # in LLaVA's words
    assert benchmarks.get("textvqa").questions(tmp_path)[0].prompt == prompt
    lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", {"question_id": "i", "image": "i.jpg", "text": prompt})
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    assert benchmarks.get("textvqa").questions(tmp_path)[0].prompt == prompt
    assert metrics("textvqa", tmp_path, ["2, cats?"]) == {"accuracy": 100}
    assert metrics("textvqa", tmp_path, ["cats"]) == {"accuracy": 0}


def test_gqa_compares_strings(tmp_path):
    kinds = [{"structural": kind} for kind in ("query", "verify", "choose")]
    gqa = {str(i): {"imageId": "n1", "question": "?", "answer": "yes", "types": kind} for i, kind in enumerate(kinds)}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(gqa))
    assert metrics("gqa", tmp_path, ["Yes.", "yes!", "YES"]) == {"binary": 50, "open": 100, "accuracy": 66.6667}


def test_mme_sums_accuracy_of_questions_and_of_images(tmp_path, capsys):
    for task, folder in (
        ("count", "count"),
        ("scene", "scene/questions_answers_YN"),
        ("code_reasoning", "code_reasoning"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        for i in (1, 2):
            text = f"Is it {task}? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
            (tmp_path / folder / f"{i}.txt").write_text(text)
    found = metrics("mme", tmp_path, [*["Yes", "no"] * 2, *["Yes", "Yes", "yes", "No."], *["It is", "no", "No", "no"]])
    assert (found["count"], found["scene"], found["code_reasoning"]) == (200, 75 + 50, 50)
    assert (found["perception"], found["perception/20"], found["cognition"]) == (325, 16.25, 50)
    asked = benchmarks.get("mme").questions(tmp_path)
    assert asked[0].prompt == "Is it count?\nAnswer the question using a single word or phrase."
    assert asked[4].images == ("scene/images/1.jpg",)
    written = tmp_path / "count.txt"
    written.write_text("1.jpg\tIs it?\tYes\tyes\n1.jpg\tIs it not?\tNo\tYes\n")
    assert main(["eval", "score", "mme", str(written)]) == 0
    assert "1 of 2" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("count/acc "))


def test_sade_compares_means_per_token(tmp_path):
    lines(tmp_path / "relation.jsonl", {"image": "a.jpg", "positive": "x", "negatives": ["y", "z"]})
    benchmark = benchmarks.get("sade")
    asked = benchmark.questions(tmp_path)
    assert [(q.kind, q.continuation) for q in asked] == [("log_likelihood", text) for text in "xyz"]
    scored = [Answer(q, score=s, tokens=n) for q, s, n in zip(asked, (-9.0, -4.0, -5.0), (9, 3, 4), strict=True)]
    assert benchmark.metrics(scored)["mean"].percent == 100
    scored[1] = Answer(asked[1], score=-3.0, tokens=3)  # as likely is not more likely
    assert benchmark.metrics(scored)["mean"].percent == 0
    assert "not comparable" in benchmark.remarks(asked)[-1]


def test_a_record_that_lacks_a_field_is_named_by_file_line_and_field(tmp_path):
    path = tmp_path / "add_obj.json"
    path.write_text(
        '{"0": {"filename": "a.jpg", "caption": "x",\n"negative_caption": "y"},\n"1": {"filename": "a.jpg"}}'
    )
    with pytest.raises(ValueError, match=r"add_obj.json line 3: the field caption is missing"):
        benchmarks.get("sugarcrepe").questions(tmp_path)
    with pytest.raises(ValueError, match=r"has no examples\.jsonl"):
        benchmarks.get("winoground").questions(tmp_path)
    lines(tmp_path / "coco_pope_random.json", *[{"question_id": 4, "image": "a", "text": "?", "label": "no"}] * 2)
    with pytest.raises(ValueError, match="question random/4 of pope is there twice"):
        benchmarks.get("pope").questions(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        benchmarks.get("gqa").questions(tmp_path / "none")
    with pytest.raises(ValueError, match="there are sugarcrepe, "):
        benchmarks.get("none")


def test_every_benchmark_of_a_group_is_there_and_says_what_to_download():
    for name in benchmarks.NAMES:
        benchmark = benchmarks.get(name)
        assert benchmark.name == name and benchmark.title and benchmark.licence and benchmark.download
    assert all(name in benchmarks.NAMES for group in benchmarks.GROUPS for name in benchmarks.names(group))
    assert benchmarks.names("paper")[:5] == ("vqav2", "vizwiz", "gqa", "textvqa", "mme")


WRITTEN = {"sugarcrepe": "sugarcrepe", "winoground": "winoground", "bivlc": "bivlc", "rbench": "rbench", "vqa": "vqav2"}


@pytest.mark.parametrize("task", WRITTEN)
def test_the_built_in_world_in_the_files_of_a_benchmark(tmp_path, capsys, task):
    for folder in ("a", "b"):
        assert main(["builtin", "write", "--task", task, str(tmp_path / folder), "--n", "3"]) == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    asked = benchmarks.get(WRITTEN[task]).questions(tmp_path / "a")
    entries = {"sugarcrepe": 42, "winoground": 24, "bivlc": 84, "rbench": 3, "vqa": 12}
    assert len(asked) == entries[task]
    for name in {name for question in asked for name in question.images if "#" not in name}:
        with Image.open(tmp_path / "a" / name) as picture:
            assert (picture.format, picture.size) == ("PNG", (48, 48))
    assert main(["builtin", "write", "--task", task, str(tmp_path / "a")]) == 2
    assert "name a folder that is new or empty" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_captions_hold_of_the_scenes_they_are_made_of():
    rng = random.Random(5)
    for _ in range(300):
        scene = scenes.sample_scene(rng)
        for subtype in builtin_questions.COMPOSITIONAL:
            pair = builtin_questions.caption_pair(scene, subtype, rng)
            assert pair is None or (holds(scene, pair[0]), holds(scene, pair[1])) == (True, False)


def test_the_built_in_task_asks_what_its_scorer_asks():
    asked = builtin.BENCHMARK.draw(n=2, seed=3)
    assert len(asked) == 20 and len({question.id for question in asked}) == 20
    found = builtin.BENCHMARK.metrics([Answer(question, f"{question.facts['label']} ") for question in asked[:-2]])
    assert found["recognition"].percent == found["compositional"].percent == 100 and "add_att" not in found
    picture = builtin.image(asked[0].images[0])
    from cdistill.builtin.scorer import held_out_questions

    turn = held_out_questions("colour", n=2, seed=3).messages(0)
    assert picture.tobytes() == turn[0]["content"][0]["image"].tobytes()
    assert asked[0].prompt == turn[0]["content"][1]["text"]
    assert builtin.BENCHMARK.right(Answer(asked[0], "")) == 0
    text = builtin.BENCHMARK.draw(n=1, seed=3, modality="text")[0]
    assert text.images == () and text.prompt.endswith(asked[0].prompt) and " ; " in text.prompt
