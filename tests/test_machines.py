"""Machines of one run: what they must have in common is checked before the first step. Two processes stand for two machines."""

import os
import socket
import time
from contextlib import ExitStack

import pytest
import torch.distributed as dist
from builtin_models import recipe_values, save_base, save_teacher

from cdistill.runtime import pulse
from cdistill.runtime.machines import on_other_machines, require_common_folder, several_machines
from cdistill.train.prepare import prepare_together
from cdistill.train.recipes import recipe_from_dict


def said(action):
    """What an action raises as a ValueError, or None."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return None


def as_machines(folders, action, *args):
    """Call something on each process in a folder of its own, as the only one of its machine."""
    os.environ["LOCAL_RANK"], before = "0", os.getcwd()
    os.chdir(folders[dist.get_rank()])
    try:
        return action(*args)
    finally:
        os.chdir(before)


def folder_on_a_rank(folders, folder):
    def there():
        folder.mkdir(parents=True, exist_ok=True)

    def check():
        if dist.get_rank() == 0:
            there()
        require_common_folder(folder, "output")

    return as_machines(folders, said, check)


def test_a_folder_that_only_one_machine_sees_is_told_by_its_name(ranks, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    assert ranks.call(folder_on_a_rank, folders, tmp_path / "common") == [None, None]
    assert not list((tmp_path / "common").iterdir()), "nothing is left"
    (relative,) = set(ranks.call(folder_on_a_rank, folders, (tmp_path / "own").relative_to(tmp_path)))
    here = socket.gethostname()
    assert relative == (
        f"output: {tmp_path}/b/own on {here} (process 1) is not the folder of process 0, {tmp_path}/a/own on {here}: "
        "name a folder that all machines share, by its whole path"
    )


def checks_on_a_rank(fails):
    def check():
        if fails:
            raise FileNotFoundError(2, "No such file or directory", "data.json")

    assert not several_machines(), "ranks of one machine"
    assert said(lambda: on_other_machines(check)) is None, "the first machine has checked for itself"
    os.environ["LOCAL_RANK"] = "0"
    assert several_machines()
    return said(lambda: on_other_machines(check))


def test_what_one_machine_lacks_all_are_told(ranks):
    assert ranks.call(checks_on_a_rank, False) == [None, None]
    (line,) = set(ranks.call(checks_on_a_rank, True))
    assert "No such file" in line and line.endswith(f"(on {socket.gethostname()}, process 1)")


def prepare_on_a_rank(folders, values, seeds=(0, 0)):
    recipe = recipe_from_dict(values | {"seed": seeds[dist.get_rank()]})

    def prepare():
        with ExitStack() as at_end:
            prepare_together(recipe, at_end=at_end, output=folders[0].parent / "out", resume=False)

    return as_machines(folders, said, prepare)


def test_a_machine_with_another_recipe_or_teacher_is_told_before_the_first_step(ranks, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        save_teacher(folder / "teacher", seed=i)
        save_base(folder / "base")
    values = recipe_values(tmp_path / "out", tmp_path, stages=["dft"])
    values |= {"teacher": "teacher", "student": values["student"] | {"base": "base"}}
    here = f"(on {socket.gethostname()}, process 1)"
    (seed,) = set(ranks.call(prepare_on_a_rank, folders, values, (3, 4)))
    assert seed == f"recipe is not what it is on the machine of process 0: seed (3 there, 4 here) {here}"
    (teacher,) = set(ranks.call(prepare_on_a_rank, folders, values))
    assert (
        teacher.startswith("teacher is not what it is on the machine of process 0: model.safetensors (")
        and here in teacher
    )
    save_teacher(folders[1] / "teacher", seed=0)
    assert ranks.call(prepare_on_a_rank, folders, values) == [None, None]


def test_a_process_that_ends_with_an_error_ends_the_others(monkeypatch):
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(pulse, "END_SECONDS", 0.0)
    store, codes = dist.HashStore(), []
    monkeypatch.setattr(pulse._Together, "connect", lambda self: store)

    def leave(code):
        codes.append(code)
        raise RuntimeError("ended")

    monkeypatch.setattr(pulse.os, "_exit", leave)
    monkeypatch.setattr(pulse, "_together", pulse._Together("here", 0, 1, 2))
    pulse.Pulse(store, 0, ends=True)
    time.sleep(0.1)
    assert not codes
    with pytest.raises(OSError, match="gone"), pulse.ending_together():
        raise OSError("gone")
    time.sleep(0.2)
    assert codes == [pulse.PEER_LOST] and store.get(pulse.END) == b"gone"
