"""VAT between tokenizers: mean rows of spans, against float64 and, with one tokenizer, against plain VAT."""

import pytest
import torch

from cdistill.choices import VATConfig
from cdistill.ops import reference
from cdistill.vat import TeacherTargets
from cdistill.vat.matching import LayerMatch
from cdistill.vat.recorders import StudentAlignment
from cdistill.vat.regions import Regions
from cdistill.vat.resample import Resampling
from cdistill.vat.spans import SpanAlignment, numbers_of_rows, span_rows

MATCHES = [LayerMatch(0, (0, 1))]
COLS = torch.tensor([[1, 2, 3], [0, 2, -1]])
ROWS = torch.tensor([[4, 5, 6, 7, 8], [3, 4, 7, -1, -1]])
THEIR_ROWS = torch.tensor([[4, 5, 6, 9, 10, 11], [5, 6, 7, 8, -1, -1]])
# sample 0: span 1 of two and one rows, 2 of one and two, none, 4 on one side, 5 of one and two; sample 1: 6 and 7
NUMBERS = torch.tensor([[1, 1, 2, 4, 5], [6, 7, 7, 0, 0]])
THEIR_NUMBERS = torch.tensor([[1, 2, 2, 0, 5, 5], [6, 6, 7, 7, 0, 0]])
SPANS = [[1, 2, 5], [6, 7]]


def drawn(heads, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, 12, 16, generator=generator) for h in heads]


def spans_of(slices, numbers, wanted):
    """Mean rows of the spans of one sample (..., S, V)."""
    return torch.stack([slices[..., [n == span for n in numbers.tolist()], :].mean(-2) for span in wanted], -2)


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize(
    ("loss", "reduction"), [("cosine", "row"), ("kl", "row"), ("mse", "matrix"), ("jsd", "column")]
)
def test_losses_and_gradients_are_those_of_mean_rows(heads, loss, reduction):
    config = VATConfig(loss=loss, reduction=reduction, heads=heads, rows="answer")
    layers = [drawn((4, 2), seed) for seed in (1, 2)]
    teacher = TeacherTargets(MATCHES, Regions(THEIR_ROWS, COLS), key_mask=None, heads=heads)
    for layer, (q, k) in enumerate(layers):
        teacher.record(layer, q, k, k, scale=None, causal=True)
    q, k = (x.requires_grad_() for x in drawn((4, 2), 3))
    rows = span_rows(NUMBERS, THEIR_NUMBERS)
    student = SpanAlignment(MATCHES, Regions(ROWS, COLS), teacher, rows, config, key_mask=None)
    student.record(0, q, k, k, scale=None, causal=True)
    found = student.losses()[0]

    exact = [x.detach().double().requires_grad_() for x in (q, k)]
    a = reference.attention_slice(*exact, ROWS, COLS, heads=heads)
    target = torch.stack(
        [reference.attention_slice(q.double(), k.double(), THEIR_ROWS, COLS, heads=heads) for q, k in layers]
    ).mean(0)
    losses = []
    for b in range(2):
        real = COLS[b] >= 0
        ours, theirs = (spans_of(x[b], n[b], SPANS[b])[..., real] for x, n in ((a, NUMBERS), (target, THEIR_NUMBERS)))
        pairs = zip(ours, theirs, strict=True) if heads == "each" else [(ours, theirs)]
        losses.append(torch.stack([reference.slice_distance(x, y, loss, reduction) for x, y in pairs]).mean())
    expected = torch.stack(losses)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    gradients = torch.autograd.grad(found.sum(), (q, k)), torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close([x.double() for x in gradients[0]], list(gradients[1]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_spans_of_one_row_give_plain_vat(autocast):
    config = VATConfig(rows="answer")
    teacher = TeacherTargets(MATCHES, Regions(ROWS, COLS), key_mask=None)
    for layer in (0, 1):
        q, k = drawn((4, 2), layer)
        teacher.record(layer, q, k, k, scale=None, causal=True)
    q, k = (x.requires_grad_() for x in drawn((4, 2), 3))
    numbers = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    both = (
        StudentAlignment(MATCHES, Regions(ROWS, COLS), teacher, key_mask=None),
        SpanAlignment(MATCHES, Regions(ROWS, COLS), teacher, span_rows(numbers, numbers), config, key_mask=None),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for recorder in both:
            recorder.record(0, q, k, k, scale=None, causal=True)
    plain, spans = (recorder.loss() for recorder in both)
    torch.testing.assert_close(plain, spans)
    torch.testing.assert_close(*(torch.autograd.grad(x, (q, k)) for x in (plain, spans)))


def test_a_sample_without_common_spans_counts_zero():
    numbers, others = torch.tensor([[1, 2], [0, 0]]), torch.tensor([[3, 0], [0, 0]])
    rows, cols = torch.tensor([[4, 5], [-1, -1]]), torch.tensor([[1, 2], [1, 2]])
    made = span_rows(numbers, others)
    assert not made.valid.any() and (made.places(rows) == -1).all()
    teacher = TeacherTargets(MATCHES, Regions(rows, cols), key_mask=None)
    q, k = drawn((4, 2), 1)
    for layer in (0, 1):
        teacher.record(layer, q, k, k, scale=None, causal=True)
    q.requires_grad_()
    student = SpanAlignment(MATCHES, Regions(rows, cols), teacher, made, VATConfig(), key_mask=None)
    student.record(0, q, k, k, scale=None, causal=True)
    student.loss().backward()
    assert not student.loss() and not q.grad.any()


def test_predicting_rows_belong_to_the_span_of_the_token_behind():
    spans = torch.tensor([[0, 0, 1, 1, 2, 0]])
    rows = torch.tensor([[1, 2, 3, 4, -1]])
    assert numbers_of_rows(rows, spans, "predicting").tolist() == [[1, 1, 2, 0, 0]]
    assert numbers_of_rows(rows, spans, "answer").tolist() == [[0, 1, 1, 2, 0]]


def test_other_numbers_of_visual_tokens_are_refused():
    teacher = TeacherTargets(MATCHES, Regions(ROWS, COLS[:, :2]), key_mask=None)
    rows = span_rows(NUMBERS, NUMBERS)
    with pytest.raises(ValueError, match="equally many visual tokens in every sample"):
        SpanAlignment(MATCHES, Regions(ROWS, COLS), teacher, rows, VATConfig(), key_mask=None)


def test_targets_are_averaged_and_resampled():
    """Three columns of the student's from the teacher's four: the middle one has half of two."""
    teacher = TeacherTargets(MATCHES[:1], Regions(THEIR_ROWS, torch.tensor([[0, 1, 2, 3]] * 2)), key_mask=None)
    for layer in (0, 1):
        q, k = drawn((4, 2), layer)
        teacher.record(layer, q, k, k, scale=None, causal=True)
    w = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1.0]])
    places = torch.tensor([[[0, -1], [1, 2], [3, -1]]] * 2)
    shares = torch.tensor([[[1.0, 0], [0.5, 0.5], [1.0, 0]]] * 2)
    cols = torch.tensor([[1, 2, 3], [0, 1, 2]])
    rows = span_rows(NUMBERS, THEIR_NUMBERS)
    config, options = VATConfig(loss="mse"), {"key_mask": None, "resampling": Resampling(places, shares)}
    student = SpanAlignment(MATCHES, Regions(ROWS, cols), teacher, rows, config, **options)
    q, k = drawn((4, 2), 3)
    student.record(0, q, k, k, scale=None, causal=True)
    a = reference.attention_slice(q.double(), k.double(), ROWS, cols)
    expected = [
        reference.slice_distance(
            spans_of(a[b], NUMBERS[b], SPANS[b]),
            spans_of(teacher.targets[0][b].double(), THEIR_NUMBERS[b], SPANS[b]) @ w.double().T,
            "mse",
            "row",
        )
        for b in range(2)
    ]
    torch.testing.assert_close(student.losses()[0].double(), torch.stack(expected), rtol=1e-4, atol=1e-7)
