"""The programs of `examples/`, as they stand there: each says what it has learned."""

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
OF_RANKS = "fsdp2.py"
LEARNED = re.compile(r"^(?:alignment )?loss (\d+\.\d{3}) -> (\d+\.\d{3})$", re.MULTILINE)


@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.glob("*.py")} - {OF_RANKS}))
def test_an_example_says_that_it_has_learned(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    ((first, last),) = LEARNED.findall(capsys.readouterr().out)
    assert float(last) < 0.7 * float(first)
    if name == "lightning_loop.py":  # whose page says what its checkpoints hold
        assert list(names["module"].state_dict()) == [f"model.{key}" for key in names["student"].state_dict()]


def sharded_on_a_rank():
    return runpy.run_path(str(EXAMPLES / OF_RANKS))["train"](torch.device("cpu"))


def test_the_example_of_fsdp_learns_on_two_processes(ranks):
    ours, theirs = ranks.call(sharded_on_a_rank)
    assert ours == theirs and ours[-1] < 0.7 * ours[0]
