"""The programs and notebooks of `examples/`, as they stand there: each says what it has learned."""

import json
import re
import runpy
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import pyplot
from transformers import AutoModelForImageTextToText

matplotlib.use("agg")
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


@pytest.mark.parametrize("name", ["attention_maps", "distil_in_colab"])
def test_a_notebook_runs_from_its_first_cell_to_its_last(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyplot, "show", lambda: None)
    names = {}
    for cell in json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), names)
    assert len(pyplot.gcf().axes) == {"attention_maps": 12, "distil_in_colab": 1}[name]
    pyplot.close("all")
    if name == "attention_maps":
        assert (
            names["looks"].shape == (len(names["words"]), 36) and names["looks"].min() >= 0 and names["looks"].sum() > 0
        )
    else:
        assert all(values[-1] < values[0] for values in names["history"].values())
        assert len(AutoModelForImageTextToText.from_pretrained("student").model.language_model.layers) == 4
