"""What was imported is used at once: as teacher of a run, as its student, and in evaluation, by the command line alone."""

import json

import layouts
import torch
from builtin_models import text_config
from conversation_cases import picture
from transformers import Qwen2ForCausalLM

from cdistill.builtin.writer import write
from cdistill.cli import main


def test_a_teacher_and_a_student_that_were_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    teacher = layouts.authors(tmp_path / "teacher")
    layouts.authors(tmp_path / "student", student=True, teacher=teacher)
    for name in ("teacher", "student"):
        assert main(["import", name, f"our-{name}"]) == 0
    records = []
    for i in range(4):
        picture(20, 30, i).save(tmp_path / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A red ring."}]
        records.append({"image": f"{i}.png", "conversations": turns})
    (tmp_path / "mine.json").write_text(json.dumps(records))
    speaker = layouts.make_tokenizer("qwen2")
    torch.manual_seed(0)
    Qwen2ForCausalLM(text_config(vocab_size=len(speaker) + 3)).save_pretrained(tmp_path / "base")
    speaker.save_pretrained(tmp_path / "base")
    given = ["--teacher", "our-teacher", "--student", "base", "--data", "mine.json", "--yes", "--gpus", "0"]
    assert main(["init", "recipe.yaml", *given]) == 0, capsys.readouterr().err
    assert "taf: true" in (tmp_path / "recipe.yaml").read_text()  # and planned: init makes no recipe that was not
    small = ["stages=[dft]", "stage.dft.samples=2", "stage.dft.global_batch_size=2"]
    for student in ("base", "our-student"):
        more = [f"student.base={student}", f"output=runs/{student}"]
        assert main(["train", "recipe.yaml", *small, *more]) == 0, capsys.readouterr().err
        logged = (tmp_path / "runs" / student / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)["vat"] > 0 for line in logged)
    assert main(["export", "runs/our-student", "theirs", "--format", "compodistill"]) == 0, capsys.readouterr().err
    assert main(["import", "theirs", "again"]) == 0, capsys.readouterr().err
    write("sugarcrepe", tmp_path / "data" / "sugarcrepe", n=1)
    words = ["eval", "again", "--task", "sugarcrepe", "--data", "data", "--output", "looks"]
    assert main(words) == 0, capsys.readouterr().err
