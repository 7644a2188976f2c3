"""Mixes of sources, the order of a run, and which reader a path gets."""

import itertools
import pickle

import numpy as np
import pytest
from data_files import as_json, record, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from cdistill.data.mix import Mix, Order, Part, open_source


class Numbers:
    """A source of so many samples that nobody reads."""

    name = "numbers"

    def __init__(self, count, in_order=False):
        self.count, self.in_order = count, in_order

    def __len__(self):
        return self.count


parts = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from([0.5, 1.0, 2.0, 2.5, 0.3, 1 / 3]), st.booleans()),
    min_size=1,
    max_size=4,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(parts, st.integers(0, 2**40))
def test_every_sample_comes_as_often_as_its_weight_says(made, seed):
    mix = Mix([Part(Numbers(n, in_order), np.arange(n), w) for n, w, in_order in made], name="mix")
    if not sum(round(n * w) for n, w, _ in made):
        with pytest.raises(ValueError, match="mix has no samples"):
            Order(mix, seed)
        return
    order = Order(mix, seed)
    size = order.epoch_size
    epochs = [[order[e * size + i] for i in range(size)] for e in range(4)]
    assert epochs == [order.epoch(e).tolist() for e in range(4)]
    start = 0
    for n, w, in_order in made:
        mine = [[x - start for x in epoch if start <= x < start + n] for epoch in epochs]
        start += n
        for epoch in mine:
            assert len(epoch) == round(n * w)
            times = np.bincount(epoch, minlength=n)
            assert times.min(initial=99) >= int(w) or not n
            assert times.max(initial=0) <= int(w) + 1
            if in_order:
                assert sum(b < a for a, b in itertools.pairwise(epoch)) <= int(w)
        if w == 0.5 and n % 2 == 0:
            assert sorted(mine[0] + mine[1]) == list(range(n))
    numbers = [3 * size + size // 2, 1, 0, 2 * size]
    assert [pickle.loads(pickle.dumps(order))[i] for i in numbers] == [Order(mix, seed)[i] for i in numbers]


def test_orders_differ_by_epoch_and_seed_and_are_what_they_were():
    orders = [Order(Numbers(1000), seed).epoch(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert np.mean([np.corrcoef(order, range(1000))[0, 1] ** 2 for order in orders]) < 0.01
    assert Order(Numbers(10), 0).epoch(0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


def test_mix_of_files(tmp_path):
    (tmp_path / "sets" / "deep").mkdir(parents=True)
    (tmp_path / "sets" / "a.json").write_bytes(as_json([record(i) for i in range(10)], lines=False))
    (tmp_path / "sets" / "deep" / "b.json").write_bytes(as_json([record(i, 0) for i in range(4)], lines=True))
    write_tar(tmp_path / "c.tar", [("k.txt", b"text"), ("k.jpg", b"1")])
    text = """
sources:
  - {path: sets/a.json, images: pictures, cap: 3, weight: 2, name: first}
  - path: sets/deep/b.json
    images: {x: one, "": two}
  - {path: c.tar, weight: 0.5}
"""
    (tmp_path / "mix.yaml").write_text(text)
    mix = open_source(str(tmp_path / "mix.yaml"), seed=3)
    assert [part.source.name for part in mix.parts] == ["first", "b", "c"] and mix.name == "mix"
    assert len(mix) == 8 and Order(mix, 0).epoch_size == 6 + 4 + round(0.5)
    kept = mix.parts[0].kept.tolist()
    assert kept == sorted(set(kept)) and len(kept) == 3
    assert [mix[i].id for i in range(3)] == [str(i) for i in kept]
    assert mix[0].images[0].path == tmp_path / "pictures" / f"{kept[0]}-0.jpg"
    assert mix.locate(3) == (1, 0) and mix.locate(7) == (2, 0) and mix[-1].images[0].data == b"1"
    assert mix.sizes().images.tolist() == [1] * 3 + [0] * 4 + [1]
    others = {tuple(open_source(str(tmp_path / "mix.yaml"), seed=s).parts[0].kept) for s in range(20)}
    assert len(others) > 10
    assert np.array_equal(open_source(str(tmp_path / "mix.yaml"), seed=3).parts[0].kept, mix.parts[0].kept)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no mix"),
        ("sources: []", "is no mix"),
        ("{source: []}", "unknown key 'source'"),
        ("{sources: [{path: a.json}], seed: 3}", "unknown key 'seed'"),
        ("[a.json]", "source 1: a source is a mapping with a path, got 'a.json'"),
        (
            "[{path: a.json}, {path: a.json, weigth: 2}]",
            "source 2: unknown key 'weigth', there are path, images, weight",
        ),
        ("[{path: a.json, weight: 0}]", "weight must be above 0"),
        ("[{path: a.json, weight: .nan}]", "weight must be above 0"),
        ("[{path: a.json, weight: '2'}]", "weight must be above 0"),
        ("[{path: a.json, cap: 1.5}]", "cap must be a whole number"),
        ("[{path: 5}]", "path must be a string"),
        ("[{path: ''}]", "path must be a string"),
        ("[{path: a.json, name: 5}]", "name must be a string"),
        ("[{path: a.json, allow_urls: 'no'}]", "allow_urls must be true or false"),
        ("[{path: a.json, streaming: 1}]", "streaming must be true or false"),
        ("[{path: a.json, images: [x]}]", "images must be a folder or a mapping to folders"),
        ("[{path: a.json, images: {x: 5}}]", "images must be a folder or a mapping to folders"),
        ("[{path: a.json, columns: image}]", "columns must be a mapping to names of columns"),
        ("[{path: a.json, weight: 2001-99-99}]", "source 1: weight must be above 0 and at most 1000, got '2001-99-99'"),
        ("[" * 3000, "is no YAML"),
        ("[[&a [x, x, x], &b [*a, *a, *a], &c [*b, *b, *b], &d [*c, *c, *c], [*d, *d, *d]]]", "a mapping with a path"),
        ("[{path: none.json}]", "source 1: no such file"),
        ("[{path: mix.yaml}]", "a mix holds no mixes"),
        ("[{path: a.json", "is no YAML"),
        ("!!python/object/apply:os.system ['true']", "is no YAML"),
    ],
)
def test_mixes_that_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(as_json([record(0)], lines=False))
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError) as raised:
        open_source(str(tmp_path / "mix.yaml"))
    assert message in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.tar", {"images": "y"}, "images of tars lie within them"),
        ("x.tar", {"columns": {"caption": "y"}}, "columns is for sets of datasets"),
        ("x.yaml", {"split": "val"}, "split is for sets of datasets"),
        ("x.yaml", {"images": "y"}, "stand in the mix itself"),
        ("x.json", {"config": "y"}, "config is for names on the hub"),
        ("", {}, "is a folder without tars"),
        ("none.parquet", {}, "no such files"),
        ("x.xml", {"columns": {"caption": "y"}}, "datasets are read from .json"),
    ],
)
def test_sources_that_are_refused(tmp_path, name, options, message):
    for other in ("x.json", "x.yaml"):
        (tmp_path / other).write_text("[]")
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / name), **options)
