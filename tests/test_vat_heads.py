"""Matched heads of models with unequal numbers of them, against transformers' eager attention in float64."""

import copy
from itertools import permutations, product

import pytest
import torch
from vat_models import draw_batch, gradients, inputs, regions_of, tiny_llava
from vat_oracle import assert_gradients_like_eager, assert_like_eager, eager_attentions, eager_loss, places_of

from cdistill import choices
from cdistill.ops import attention_alignment, attention_slice, reference, slice_alignment
from cdistill.vat import (
    VAT,
    HeadCounts,
    LayerMatch,
    TeacherTargets,
    VATConfig,
    head_counts,
    install,
    layer_distances,
    packed_regions,
)
from cdistill.vat.heads import assign_heads, group_heads

STUDENT_LAYERS, TEACHER_LAYERS = 2, 3


def pair(ours=4, theirs=6):
    """A student and a teacher, two query heads for each key head, whose hook is installed."""
    models = (
        tiny_llava(0, "qwen2", STUDENT_LAYERS, 16 * ours, ours, ours // 2),
        tiny_llava(1, "qwen2", TEACHER_LAYERS, 16 * theirs, theirs, theirs // 2),
    )
    for model in models:
        install(model)
    return models


def made(config, student, teacher, batch=None, impl="torch"):
    """The alignment, by measured heads where it needs them."""
    depths = [len(model.model.language_model.layers) for model in (student, teacher)]
    counts = head_counts(student, teacher)
    if not config.assigns_heads:
        return VAT(config, *depths, heads=counts, impl=impl)
    measured = VAT.measure_heads(config, *depths, impl=impl)
    regions = regions_of(batch, config.rows)
    recorders = [side(regions, batch["attention_mask"]) for side in (measured.student, measured.teacher)]
    with torch.no_grad():
        for model, recorder in zip((student, teacher), recorders, strict=True):
            model(**inputs(batch), cdistill_vat=recorder)
    measured.update(*recorders)
    return VAT(config, *depths, heads=counts, matches=measured.assigned(), impl=impl)


def aligned(vat, student, teacher, batch, mixture=None):
    """The student's recorder after both passes."""
    regions, mask = regions_of(batch, vat.config.rows), batch["attention_mask"]
    targets = vat.teacher(regions, mask)
    with torch.no_grad():
        teacher(**inputs(batch), cdistill_vat=targets)
    recorder = vat.student(regions, targets if mixture is None else mixture(targets.slices), mask)
    student(**inputs(batch), cdistill_vat=recorder)
    return recorder


@pytest.mark.parametrize(
    ("student", "teacher", "groups"),
    [
        (3, 3, ((0,), (1,), (2,))),
        (2, 6, ((0, 1, 2), (3, 4, 5))),
        (4, 6, ((0,), (1, 2), (3,), (4, 5))),
        (4, 2, ((0,), (0,), (1,), (1,))),
        (4, 3, ((0,), (0,), (1,), (2,))),
    ],
)
def test_neighbouring_heads_are_grouped(student, teacher, groups):
    assert group_heads(student, teacher) == groups


@pytest.mark.parametrize(("student", "teacher"), [(3, 3), (3, 5), (4, 2)])
def test_the_assignment_has_the_least_sum(student, teacher):
    distances = torch.rand(student, teacher, generator=torch.Generator().manual_seed(student), dtype=torch.float64)
    places = [j % teacher for j in range(teacher * -(-student // teacher))]
    least = min(sum(distances[i, j] for i, j in enumerate(order)) for order in permutations(places, student))
    found = [group[0] for group in assign_heads(distances)]
    assert sum(distances[i, j] for i, j in enumerate(found)) == least
    assert all(found.count(head) <= -(-student // teacher) for head in range(teacher))


@pytest.mark.parametrize(
    ("matching", "target", "engine", "heads"),
    [
        ("group", "stored", "sdpa", (4, 6)),
        ("group", "stored", "sdpa", (4, 2)),
        ("group", "recomputed", "sdpa", (2, 6)),
        ("assignment", "recomputed", "sdpa", (4, 6)),
        ("assignment", "stored", "torch_flash", (4, 2)),
    ],
)
def test_losses_and_gradients_equal_eager(matching, target, engine, heads):
    student, teacher = pair(*heads)
    config = VATConfig(heads="match", head_matching=matching, target=target, engine=engine, layers="all")
    batch = draw_batch(4)
    vat = made(config, student, teacher, batch)
    places = places_of(regions_of(batch, config.rows))
    (truth, exact), (eager, of_eager) = (
        eager_loss(student, teacher, batch, vat, places, dtype) for dtype in (torch.float64, torch.float32)
    )
    loss = aligned(vat, student, teacher, batch).loss()
    loss.backward()
    assert_like_eager(loss.detach(), eager, truth)
    assert_gradients_like_eager(gradients(student), of_eager, exact)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_the_identity_is_each_bit_for_bit(impl):
    student, teacher = pair(4, 4)
    batch, groups = draw_batch(5), group_heads(4, 4)
    each = made(VATConfig(heads="each"), student, teacher, impl=impl)
    match = VATConfig(heads="match", head_matching="assignment")
    same = [m._replace(heads=(groups,) * len(m.teachers)) for m in each.matches]
    matched = VAT(match, STUDENT_LAYERS, TEACHER_LAYERS, heads=HeadCounts(4, 4), matches=same, impl=impl)
    found = []
    for vat in (each, matched):
        student.zero_grad()
        loss = aligned(vat, student, teacher, batch).loss()
        loss.backward()
        found.append((loss, gradients(student)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())


def test_a_student_with_the_teachers_heads_in_another_order_gets_it_back_and_loses_nothing():
    teacher = tiny_llava(1, "qwen2", STUDENT_LAYERS, 64, 4, 2)
    student, order = copy.deepcopy(teacher), [2, 3, 1, 0]  # of query heads, a key head's together
    for layer in student.model.language_model.layers:
        attention = layer.self_attn
        for name, heads in (("q_proj", order), ("k_proj", [1, 0]), ("v_proj", [1, 0])):
            module = getattr(attention, name)
            for parameter in module.parameters():
                parameter.data = parameter.data.unflatten(0, (-1, 16))[heads].flatten(0, 1).clone()
        weight = attention.o_proj.weight
        weight.data = weight.data.unflatten(1, (-1, 16))[:, order].flatten(1).clone()
    for model in (student, teacher):
        install(model)
    batch, config = draw_batch(6), VATConfig(heads="match", head_matching="assignment", layers="all")
    vat = made(config, student, teacher, batch)
    assert vat.matches == tuple(LayerMatch(i, (i,), (tuple((j,) for j in order),)) for i in range(STUDENT_LAYERS))
    assert aligned(vat, student, teacher, batch).loss() < 1e-6
    assert aligned(made(VATConfig(heads="each", layers="all"), student, teacher), student, teacher, batch).loss() > 0.1


def test_packed_samples_are_compared_as_padded_ones_are():
    student, teacher = pair()
    ids, labels = (draw_batch(4)[name][2:3] for name in ("input_ids", "labels"))
    vat = made(VATConfig(heads="match", layers="all"), student, teacher)
    position = torch.cat([torch.arange(7), torch.arange(ids.shape[1] - 7)])[None]
    regions = packed_regions(ids, labels, position, visual_token_ids=60, rows="all")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, ids.shape[1], 16, generator=generator) for n in (6, 3))
    targets = TeacherTargets(vat.matches[:1], regions, key_mask=None, heads="each")
    for layer in vat.matches[0].teachers:
        targets.record(layer, q, k, k, scale=None, causal=True)
    groups = vat.matches[0].heads[0]
    for i, sample in enumerate(regions.samples):
        part = slice(sample.start, sample.stop)
        one = attention_slice(
            q[:, :, part], k[:, :, part], regions.rows[i : i + 1], regions.cols[i : i + 1], heads="each"
        )
        wanted = torch.stack([one[0, list(group)].mean(0) for group in groups])
        torch.testing.assert_close(targets.targets[0][i], wanted)


@pytest.mark.parametrize(("loss", "reduction"), [*product(choices.ALIGNMENT_LOSSES, choices.REDUCTIONS)])
def test_a_slice_is_compared_as_attention_alignment_compares_it_and_its_target_has_the_exact_gradient(loss, reduction):
    generator = torch.Generator().manual_seed(7)
    q, k = (torch.randn(2, heads, 9, 16, generator=generator, requires_grad=True) for heads in (4, 2))
    target = torch.rand(2, 4, 3, 4, generator=generator).requires_grad_()
    rows, cols = torch.tensor([[4, 6, 8], [5, 7, -1]]), torch.tensor([[0, 1, 2, 5], [1, 2, 3, -1]])
    how, weight = {"loss": loss, "reduction": reduction}, torch.tensor([1.0, -2.0])
    plain = attention_alignment(q, k, target, rows, cols, heads="each", **how)
    wanted = torch.autograd.grad((plain * weight).sum(), (q, k))
    a = attention_slice(q, k, rows, cols, heads="each")
    losses = slice_alignment(a, target, rows, cols, **how)
    *found, of_target = torch.autograd.grad((losses * weight).sum(), (q, k, target))
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    def oracle(t):
        total = 0.0
        for b, (n, m) in enumerate(((3, 4), (2, 3))):
            pairs = zip(a.detach().double()[b, :, :n, :m], t[b, :, :n, :m], strict=True)
            total = (
                total + weight[b] * torch.stack([reference.slice_distance(*x, loss, reduction) for x in pairs]).mean()
            )
        return total

    exact = target.detach().double().requires_grad_()
    torch.testing.assert_close(of_target.double(), torch.autograd.grad(oracle(exact), exact)[0], rtol=1e-4, atol=1e-6)
    moved, step = torch.randn(target.shape, generator=generator).double(), 1e-6
    slope = (oracle(exact + step * moved) - oracle(exact - step * moved)) / (2 * step)
    torch.testing.assert_close((of_target * moved).sum(), slope, rtol=1e-4, atol=1e-6)


def test_a_mixture_has_the_gradients_of_float64_for_its_weights_and_the_student():
    student, teacher = pair()
    config = VATConfig(heads="match", head_matching="mixture", layers="all")
    batch, vat = draw_batch(8), made(config, student, teacher)
    mixture = vat.mixture()
    assert torch.equal(mixture.weights(), torch.full((2, 4, 2, 6), 1 / 12))
    with torch.no_grad():
        mixture.logits.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
    loss = aligned(vat, student, teacher, batch, mixture).loss()
    loss.backward()
    exact = copy.deepcopy(student)
    with torch.no_grad():
        theirs = eager_attentions(copy.deepcopy(teacher), batch, torch.float64)
    ours = eager_attentions(exact, batch, torch.float64)
    places = places_of(regions_of(batch, config.rows))

    def oracle(logits, maps):
        total = 0.0
        for i, match in enumerate(vat.matches):
            weights = (100 * logits[i]).flatten(1).softmax(1)
            for b, r, c in places:
                if len(c):
                    window = torch.cat([theirs[layer][b][:, r[:, None], c] for layer in match.teachers])
                    target, a = torch.einsum("sw,wrv->srv", weights, window), maps[i][b][:, r[:, None], c]
                    total = total + (1 - torch.cosine_similarity(a, target, dim=-1)).mean()
        return total / (len(vat.matches) * len(places))

    logits = mixture.logits.detach().double().requires_grad_()
    truth = oracle(logits, ours)
    exact.zero_grad()
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixture.logits.grad.double(), logits.grad, rtol=1e-3, atol=1e-6)
    moved = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        slope = (oracle(logits + 1e-7 * moved, ours) - oracle(logits - 1e-7 * moved, ours)) / 2e-7
    torch.testing.assert_close((mixture.logits.grad * moved).sum(), slope, rtol=1e-3, atol=1e-5)
    found, wanted = gradients(student), gradients(exact)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        scale = wanted[name.replace("k_proj.bias", "k_proj.weight")].abs().max()
        assert (grad - wanted[name]).abs().max() <= 1e-4 * scale, name


def test_distances_of_one_head_are_those_of_layers():
    student, teacher = pair(2, 2)
    batch, config = draw_batch(9), VATConfig(heads="match", head_matching="assignment", layers="all")
    measured = VAT.measure_heads(config, STUDENT_LAYERS, TEACHER_LAYERS, impl="torch")
    regions = regions_of(batch)
    recorders = [side(regions, batch["attention_mask"]) for side in (measured.student, measured.teacher)]
    for model, recorder in zip((student, teacher), recorders, strict=True):
        model(**inputs(batch), cdistill_vat=recorder)
    measured.update(*recorders)
    match = measured.matches[1]
    ours, theirs = recorders[0].slices[match.student], recorders[1].slices[match.teachers[1]]
    wanted = layer_distances(list(ours.unbind(1)), list(theirs.unbind(1)))
    torch.testing.assert_close(measured.matrix(match.student, match.teachers[1]), wanted, rtol=1e-4, atol=1e-6)


MATCH = {"heads": "match"}


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        (MATCH, {}, r"^heads must be given for vat\.heads match: cdistill\.vat\.head_counts"),
        (MATCH | {"head_matching": "assignment"}, {}, r"^vat\.head_matching assignment needs measured heads"),
        (
            MATCH | {"target": "recomputed"},
            {"heads": HeadCounts(4, 6)},
            r"groups of equally many heads.* 6 heads of the teacher",
        ),
        (MATCH, {"matches": [LayerMatch(0, (1,))]}, r"^matches must have heads"),
        ({"heads": "each"}, {"matches": [LayerMatch(0, (1,), (((0,),),))]}, r"^matches must have no heads"),
        (
            MATCH,
            {"matches": [LayerMatch(0, (1,), (((2,),),))], "heads": HeadCounts(1, 2)},
            r"^matches must name heads of 0 to 1",
        ),
        (
            MATCH | {"head_matching": "mixture", "engine": "triton"},
            {},
            r"^vat\.engine must be sdpa .* mixture, got triton",
        ),
        (MATCH | {"head_matching": "mixture", "target": "recomputed"}, {}, r"^vat\.target must be stored .* mixture"),
    ],
)
def test_heads_that_cannot_be_matched_are_refused_in_one_line(values, more, message):
    with pytest.raises(ValueError, match=message) as error:
        VAT(VATConfig(**values), 4, 7, **more)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "wrong", "message"),
    [
        ("a", torch.rand(2, 3), "a must be"),
        ("target", torch.rand(1, 2, 4), "target must have shape"),
        ("target", torch.rand(1, 2, 3).double(), "target must be float32"),
        ("rows", torch.zeros(1, 5, dtype=torch.long), "rows must have shape"),
        ("loss", "reverse_kl", "loss must be one of"),
        ("rows", torch.tensor([[4.0, 5.0]]), "rows must have an integer dtype"),
        ("causal", "no", "causal must be True or False"),
        ("key_mask", torch.ones(1, 2, dtype=torch.bool), "key_mask must have all tokens that cols name, got T = 2"),
        ("key_mask", torch.ones(2, 6, dtype=torch.bool), "key_mask must be bool of shape"),
        ("key_mask", torch.ones(1, 6), "key_mask must be bool of shape"),
    ],
)
def test_slices_that_cannot_be_compared_are_refused(argument, wrong, message):
    given = {"a": torch.rand(1, 2, 3), "target": torch.rand(1, 2, 3), "loss": "mse"}
    given |= {"rows": torch.tensor([[4, 5]]), "cols": torch.tensor([[0, 1, 2]])} | {argument: wrong}
    with pytest.raises(ValueError, match=f"^{message}"):
        slice_alignment(**given)
