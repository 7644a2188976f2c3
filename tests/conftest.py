"""Shared by all tests: the triton interpreter where there is no GPU, one thread, and fixtures of the op tests."""

import gc
import os
from collections import Counter

import forks
import interpreter
import pytest
import torch
from garbage import freeze_imports
from hypothesis import settings
from op_cases import ISAS

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

torch.set_num_threads(1)

settings.register_profile("thorough", print_blob=True)  # as many calls of the ops as tests/test_any_call.py says


if not torch.cuda.is_available():
    interpreter.hasten()


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # not a worker of pytest-xdist, which shares the session's
        forks.begin_session()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    """Workers are forks of one process that has imported everything; not where there is a GPU, which does not survive it."""
    for spec in () if torch.cuda.is_available() else specs:
        spec.python = forks.AS_PYTHON


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        forks.end_session()


def pytest_collection_modifyitems(items):
    """Files of few tests hold the long ones: they are begun first, so that no worker is left with one at the end."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


def pytest_collection_finish():
    freeze_imports()
    gc.set_threshold(10_000, 20, 20)


def pytest_runtest_logfinish():
    freeze_imports()


with torch.device("cpu"):  # torch notes its constructors when it is first in such a context: these, not poisoned ones
    torch.empty(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill floating tensors of torch.empty, empty_like and new_empty with NaN, so that an unwritten entry shows."""

    def poisoned(create):
        def create_poisoned(*args, **kwargs):
            tensor = create(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return create_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(params=["torch", "cpp", "triton"])
def impl(request):
    """Each implementation of the attention ops."""
    return request.param


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Each instruction set of the C++ module that this processor runs."""
    monkeypatch.setenv("CDISTILL_CPU_ISA", request.param)
    return request.param


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder that holds a tiny teacher and a tiny base of the built-in task."""
    from builtin_models import save_base, save_teacher

    folder = tmp_path_factory.mktemp("models")
    save_teacher(folder / "teacher")
    save_base(folder / "base")
    return folder


@pytest.fixture(scope="session")
def ranks():
    """Warm processes of a distributed run (`ranks.Ranks`)."""
    from ranks import Ranks

    held = Ranks()
    yield held
    held.close()
