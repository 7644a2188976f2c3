"""`python -m benchmarks.gpu` as pytest shows it: a test for each check and each timing of a GPU, `-k` for some of them."""

import pytest

from benchmarks import gpu
from benchmarks._gpu_tasks import CHECKS, TASKS
from benchmarks._results import ResultsFile
from benchmarks.conftest import RESULTS

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def results(request) -> ResultsFile:
    """Of one run of all tests that were asked for."""
    names = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        file = gpu.run(names, gpu.SECONDS)
    request.config.stash.setdefault(RESULTS, []).append(file.path)
    return file


@pytest.mark.parametrize("name", [*CHECKS, *TASKS])
def test_on_a_gpu(name, results):
    if name not in results.data["done"]:
        pytest.skip(f"not reached in {gpu.SECONDS:.0f} s")
    assert not results.data["done"][name], "\n".join(results.data["done"][name])
