"""Every op beside its rivals on this computer's CPU, speed and memory: `pytest benchmarks/`, 2 to 3 minutes on two cores.

Every contender's result is compared with float64 at the size that is timed. All then take turns, so that other load on the
machine meets all of them, and times are medians; memory is what a step adds to a fresh process at most. One table ends the
run; a picture and all figures go to benchmarks/results/<processor>/, or to the folder CDISTILL_RESULTS.
"""

from collections.abc import Iterator
from functools import partial

import pytest

from benchmarks._cases import measured
from benchmarks._measure import rates, rounds
from benchmarks._overview import CPU, DTYPE, PROBLEMS, fresh_peaks
from benchmarks._results import ResultsFile, results_folder
from benchmarks.conftest import RESULTS

ROUND_SECONDS = 4.0  # of a problem, or three rounds


@pytest.fixture(scope="session")
def results(request) -> Iterator[ResultsFile]:
    """Ceilings are the best of before and after: other load must not lower them."""
    file = ResultsFile.new(results_folder(), CPU)
    before = rates(CPU, 1024, 2**26)
    file.add("rates", before)
    request.config.stash.setdefault(RESULTS, []).append(file.path)
    yield file
    after = rates(CPU, 1024, 2**26)
    file.add("rates", {name: max(before[name], rate) for name, rate in after.items()})


@pytest.fixture(scope="module")
def peaks(request) -> dict[str, dict[str, float]]:
    """MB of the contenders of all problems that were asked for."""
    tests = [item for item in request.session.items if item.path == request.path]
    return fresh_peaks([item.callspec.params["name"] for item in tests])


@pytest.mark.parametrize("name", PROBLEMS)
def test_ours_beside_its_rivals(name, results, peaks, target):
    problem = PROBLEMS[name]
    timer = partial(rounds, seconds=ROUND_SECONDS)
    rows, problems = measured(problem.case, DTYPE, CPU, timer=timer, peaks=peaks[name])
    results.add("rows", rows)
    assert not problems, "\n".join(problems)
    assert "both_ms" in rows[0], rows[0].get("skipped")
    for row in rows:
        if row["contender"] in problem.claims and "times_ours" in row:
            target(f"times as fast as {row['contender']}", row["times_ours"], at_least=problem.claims[row["contender"]])
