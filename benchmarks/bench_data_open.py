"""Opening a made-up set the size of LLaVA-mix-665K, and decoding its kind of images, against PIL alone.

`python -m pytest benchmarks/bench_data_open.py`, about 4 minutes on two cores, 1.1 GB of disk. Files are opened in fresh
processes, after they were written: they lie in the page cache.
"""

import io
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from benchmarks._data_open import MODES, RECORDS, photo, write
from cdistill.data.images import open_image
from cdistill.data.samples import ImageBytes

pytestmark = pytest.mark.long

MOST_SECONDS, MOST_MB = 20.0, 1536.0
SIDE = 384
ROUNDS = 15


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.replace(" ", "-"))
def test_opening_a_set_of_665k(benchmark, cpu_environment, target, tmp_path, mode):
    path = tmp_path / "set.json"
    size = write(path, mode)
    found = {}

    def opened():
        command = [sys.executable, "-m", "benchmarks._data_open", str(path)]
        found.update(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    benchmark.pedantic(opened, rounds=1)
    path.unlink()
    benchmark.extra_info.update(cpu_environment, mode=mode, megabytes=size / 1e6, **found)
    assert found["records"] == RECORDS
    target("seconds to open", found["open_s"], at_most=MOST_SECONDS)
    target("MB of the whole process", found["whole_process_peak_mb"], at_most=MOST_MB)


@pytest.mark.parametrize("size", [(384, 384), (640, 480), (2048, 1536), (4000, 3000)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_decoding_a_jpeg_to_384(benchmark, cpu_environment, target, size):
    """Decoding and bicubic resizing: PIL alone, `open_image`, and `open_image` told what the image is for."""
    data = photo(*size)
    ways = {
        "pil": lambda: Image.open(io.BytesIO(data)).convert("RGB"),
        "open_image": lambda: open_image(ImageBytes("x", data)),
        "open_image about 384": lambda: open_image(ImageBytes("x", data), about=SIDE),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}

    def all_ways():
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = np.asarray(way().resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(float)
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(all_ways, rounds=ROUNDS)
    difference = np.abs(results["open_image about 384"] - results["pil"])
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    benchmark.extra_info.update(
        cpu_environment,
        size=size,
        images_per_s={name: 1 / taken for name, taken in median.items()},
        times_pil={name: median["pil"] / taken for name, taken in median.items()},
        mean_difference=difference.mean(),
        largest_difference=difference.max(),
    )
    assert (results["open_image"] == results["pil"]).all()
    assert difference.mean() < 2
    target("open_image over PIL", median["open_image"] / median["pil"], at_most=1.1)
    if min(size) >= 4 * SIDE:
        target("open_image about 384 over PIL", median["open_image about 384"] / median["pil"], at_most=0.8)
