"""Shared by the benchmarks: what is run, what a result must say about where it was measured, and how targets are noted.

A benchmark fails for a wrong result. A missed target is shown at the end of the run, and fails it with ``--strict`` only: cores
that are shared or slow say little of the code. Suites that take minutes run when they are named or with ``-m long``.
"""

from pathlib import Path

import pytest
import torch

from benchmarks import _results
from benchmarks._measure import rehearsing

RESULTS = pytest.StashKey[list[Path]]()
LONG = pytest.StashKey[list[str]]()
MISSED = pytest.StashKey[list[str]]()


def pytest_configure(config):
    """The markers, where another project's configuration is read."""
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; skipped where there is none")
    config.addinivalue_line("markers", "long: takes minutes; runs with -m long, or where its file is named")


def pytest_ignore_collect(collection_path, config):
    """What is long, or needs a GPU that is not there; unless its file is named, of which pytest does not ask, or -m given."""
    if config.option.markexpr or not collection_path.match("bench_*.py"):
        return None
    text = collection_path.read_text()
    is_long = "pytest.mark.long" in text
    if is_long:
        config.stash.setdefault(LONG, []).append(collection_path.name)
    return True if is_long or ("pytest.mark.gpu" in text and not torch.cuda.is_available()) else None


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not (torch.cuda.is_available() or rehearsing()):
        pytest.skip("needs a CUDA GPU: nothing was measured")


@pytest.fixture
def target(request):
    """A function that notes beside the result whether a measured number is ``at_least`` or ``at_most`` what it should be."""

    def note(name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        bound = f"at most {at_most:g}" if at_least is None else f"at least {at_least:g}"
        if "benchmark" in request.fixturenames:
            noted = request.getfixturevalue("benchmark").extra_info.setdefault("targets", {})
            noted[name] = {"value": value, "target": bound, "met": met}
        if not met:
            line = f"{request.node.nodeid.rpartition('/')[2]}: {name} {value:.3g}, target {bound}"
            request.config.stash.setdefault(MISSED, []).append(line)
            if request.config.getini("strict"):
                pytest.fail(line, pytrace=False)

    return note


def pytest_terminal_summary(terminalreporter, config):
    missed = config.stash.get(MISSED, [])
    if missed:
        terminalreporter.section("targets missed (--strict makes them fail)")
        for line in missed:
            terminalreporter.line(line)
    for path in config.stash.get(RESULTS, []):
        from benchmarks import report

        terminalreporter.section("ours beside its rivals")
        for line in report.closing(path):
            terminalreporter.line(line)
    left_out = config.stash.get(LONG, [])
    if left_out and any(Path(argument).is_dir() for argument in config.args):
        terminalreporter.line(f"not run, minutes each: {', '.join(left_out)}; name one, or give -m long")


@pytest.fixture
def cpu_environment():
    """For ``benchmark.extra_info``."""
    return _results.cpu_environment()
