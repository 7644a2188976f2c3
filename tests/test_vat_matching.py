"""Layer spans, the three matchings and the KL distances between layers."""

import math

import pytest
import torch

from cdistill.vat import VAT, LayerMatch, VATConfig, layer_distances, layer_range, match_layers


@pytest.mark.parametrize("layers", range(3, 130))
def test_spans_follow_30_and_70_percent(layers):
    early, middle, later = (layer_range(layers, span) for span in ("early", "intermediate", "later"))
    assert early + middle + later == layer_range(layers, "all") == tuple(range(layers))
    assert abs(len(early) - 0.3 * layers) <= 1
    assert abs(len(middle) - 0.4 * layers) <= 0.5
    assert abs(len(later) - 0.3 * layers) <= 1


def test_spans_are_never_empty_and_never_shrink():
    for span in ("early", "intermediate", "later", "all"):
        sizes = [len(layer_range(layers, span)) for layers in range(1, 130)]
        assert sizes[0] == 1
        assert sizes == sorted(sizes)


def test_spans_of_small_models():
    assert layer_range(1, "early") == layer_range(1, "intermediate") == layer_range(1, "later") == (0,)
    assert layer_range(2, "early") == (0,)
    assert layer_range(2, "later") == (1,)
    assert layer_range(4, "intermediate") == (1, 2)
    assert layer_range(8, "intermediate") == (2, 3, 4)
    assert layer_range(24, "intermediate") == tuple(range(7, 17))
    assert layer_range(40, "intermediate") == tuple(range(12, 28))


@pytest.mark.parametrize(
    ("teacher", "starts", "window"),
    [(24, range(8, 15), 2), (28, range(9, 16), 3), (32, range(11, 18), 3), (40, range(13, 20), 5)],
)
def test_official_spans_give_the_authors_windows(teacher, starts, window):
    matches = VAT(VATConfig.official(), 24, teacher).matches
    assert matches == tuple(
        LayerMatch(student, tuple(range(start, start + window)))
        for student, start in zip(range(8, 15), starts, strict=True)
    )


def test_explicit_spans():
    assert layer_range(24, "8-14") == tuple(range(8, 15))
    assert layer_range(4, "3-3") == (3,)
    assert layer_range(24, [2, 5, 23]) == (2, 5, 23)
    assert layer_range(24, range(8, 15)) == tuple(range(8, 15))


@pytest.mark.parametrize(
    ("layers", "span", "message"),
    [
        (0, "all", "num_layers"),
        (12, "middle", "early, intermediate"),
        (12, "official", "24 layers only, got 12"),
        (4, "2-4", "0..3"),
        (4, f"0-{10**15}", "0..3"),
        (4, "3-2", "empty"),
        (4, [], "empty"),
        (4, [-1, 2], "0..3"),
        (4, [2, 1], "strictly increasing"),
        (4, [1, 1], "strictly increasing"),
        (4, [1.0], "integers"),
        (4, [True], "integers"),
    ],
)
def test_bad_spans(layers, span, message):
    with pytest.raises(ValueError, match=message):
        layer_range(layers, span)


def test_bad_role():
    with pytest.raises(ValueError, match="role must be one of student, teacher"):
        layer_range(24, "official", role="parent")


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("extra", [0, 1, 2, 5, 11])
def test_group_windows(n, extra):
    student, teacher = list(range(10, 10 + n)), list(range(20, 20 + n + extra))
    matches = match_layers(student, teacher)
    assert [m.student for m in matches] == student
    assert {t for m in matches for t in m.teachers} == set(teacher)
    for i, m in enumerate(matches):
        assert m.teachers == tuple(range(20 + i, 20 + i + extra + 1))


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("extra", [0, 1, 2, 5, 11])
def test_simple_matching_is_uniform(n, extra):
    m = n + extra
    picks = [match.teachers for match in match_layers(range(n), range(m), matching="simple")]
    assert all(len(pick) == 1 for pick in picks)
    flat = [pick[0] for pick in picks]
    assert flat[-1] == m - 1
    gaps = {b - a for a, b in zip([-1, *flat], flat, strict=False)}
    assert gaps <= {m // n, math.ceil(m / n)}


def test_simple_matching_of_the_papers_example():
    matches = match_layers(range(5), range(10), matching="simple")
    assert matches == tuple(LayerMatch(i, (2 * i + 1,)) for i in range(5))


def test_adaptive_picks_the_nearest_later_layer():
    distances = [[0.5, 0.1, 0.9, 0.9, 0.9], [0.0, 0.0, 0.3, 0.2, 0.9], [0.0, 0.0, 0.0, 0.0, 0.4]]
    matches = match_layers([4, 5, 6], [10, 11, 12, 13, 14], matching="adaptive", distances=distances)
    assert matches == (LayerMatch(4, (11,)), LayerMatch(5, (13,)), LayerMatch(6, (14,)))


def test_adaptive_leaves_layers_for_the_students_to_come():
    distances = torch.tensor([[3.0, 2.0, 0.0], [1.0, 1.0, 1.0]])  # the nearest layer of the first student is the last
    matches = match_layers([0, 1], [0, 1, 2], matching="adaptive", distances=distances)
    assert matches == (LayerMatch(0, (1,)), LayerMatch(1, (2,)))


def test_adaptive_is_increasing_for_any_distances():
    generator = torch.Generator().manual_seed(0)
    for n, m in [(1, 1), (3, 3), (2, 7), (5, 6), (6, 20)]:
        distances = torch.rand(n, m, generator=generator)
        picks = [
            match.teachers[0] for match in match_layers(range(n), range(m), matching="adaptive", distances=distances)
        ]
        assert picks == sorted(set(picks))
        for i, pick in enumerate(picks):  # no allowed layer was nearer
            allowed = range(picks[i - 1] + 1 if i else 0, m - n + i + 1)
            assert distances[i, pick] == distances[i, list(allowed)].min()


@pytest.mark.parametrize(
    ("students", "teachers", "options", "message"),
    [
        (3, 2, {}, "got 2 for 3"),
        (3, 2, {"matching": "simple"}, "got 2 for 3"),
        (0, 2, {}, "student_layers is empty"),
        (1, 2, {"matching": "nearest"}, "group, simple, adaptive"),
        (1, 2, {"matching": "adaptive"}, "needs them"),
        (1, 2, {"matching": "group", "distances": [[1.0, 2.0]]}, "no other matching"),
        (1, 2, {"matching": "adaptive", "distances": [[1.0]]}, r"\(1, 2\) matrix"),
        (1, 2, {"matching": "adaptive", "distances": torch.zeros(2)}, r"\(1, 2\) matrix"),
        (1, 2, {"matching": "adaptive", "distances": [[1.0, float("nan")]]}, "finite"),
    ],
)
def test_bad_matchings(students, teachers, options, message):
    with pytest.raises(ValueError, match=message):
        match_layers(range(students), range(teachers), **options)


def test_layer_distances_are_the_mean_kl_of_the_rows():
    generator = torch.Generator().manual_seed(1)
    student = [torch.rand(2, 3, 4, generator=generator) * 0.1 for _ in range(2)]
    teacher = [torch.rand(2, 3, 4, generator=generator) * 0.1 for _ in range(3)]
    for a in (*student, *teacher):
        a[0, 2] = 0  # a padded row
        a[1, :, 3] = 0  # a padded column
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for i, s in enumerate(student):
        for j, t in enumerate(teacher):
            rows = []
            for b, r, columns in [(0, 0, 4), (0, 1, 4), (1, 0, 3), (1, 1, 3), (1, 2, 3)]:
                p, q = t[b, r, :columns].double(), s[b, r, :columns].double()
                rows.append(torch.nn.functional.kl_div((q / q.sum()).log(), p / p.sum(), reduction="sum"))
            expected[i, j] = torch.stack(rows).mean()
    torch.testing.assert_close(layer_distances(student, teacher), expected, rtol=1e-4, atol=1e-6)
    assert layer_distances(student, student).diagonal().abs().max() < 1e-6


def test_bad_layer_distances():
    with pytest.raises(ValueError, match="one shape"):
        layer_distances([torch.rand(1, 2, 3)], [torch.rand(1, 2, 4)])
    with pytest.raises(ValueError, match="at least one row"):
        layer_distances([torch.zeros(1, 2, 3)], [torch.rand(1, 2, 3)])
    with pytest.raises(ValueError, match="at least one student and one teacher"):
        layer_distances([], [torch.rand(1, 2, 3)])


@pytest.mark.parametrize(
    "field",
    ["matching", "loss", "reduction", "layers", "rows", "heads", "sink_filter", "layer_sum"],
)
def test_config_names_the_bad_field(field):
    with pytest.raises(ValueError, match=rf"vat\.{field} must be"):
        VATConfig(**{field: "nonsense"})


def test_config_rejects_a_sink_filter_it_cannot_use():
    with pytest.raises(ValueError, match=r"sink_filter needs vat\.reduction column"):
        VATConfig(sink_filter=True)


def test_vat_spans_and_overrides():
    assert [m.student for m in VAT(VATConfig(), 4, 8).matches] == [1, 2]
    config = VATConfig(layers="later", student_layers="0-1", teacher_layers=[2, 4, 7])
    assert VAT(config, 4, 8).matches == (LayerMatch(0, (2, 4)), LayerMatch(1, (4, 7)))
    with pytest.raises(ValueError, match="as many teacher as student"):
        VAT(VATConfig(), 24, 4)
