"""Inputs for the tests of linear_distillation, the op where it is tested, and the comparison with float64."""

import torch
from op_cases import assert_as_exact_as_eager, device_of, moved

from cdistill.ops import linear_distillation, linear_token_losses, reference

LEAVES = ("student_hidden", "student_head", "student_bias")
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
DTYPES = {
    "torch": [torch.float32, torch.float16, torch.bfloat16],
    "cpp": [torch.float32, torch.float16, torch.bfloat16],
    "triton": [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available(),
}
IMPL_DTYPES = [(impl, dtype) for impl, dtypes in DTYPES.items() for dtype in dtypes]


def draw(n=13, vocab=(29, 31), width=(8, 12), dtype=torch.float32, ignored=0.4, seed=0):
    """Arguments by name; the shares of rows that are ignored are random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(min(vocab), (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = -100
    return {
        "student_hidden": normal(n, width[0]),
        "student_head": normal(vocab[0], width[0]),
        "teacher_hidden": normal(n, width[1]),
        "teacher_head": normal(vocab[1], width[1]),
        "labels": labels,
        "student_bias": normal(vocab[0]),
        "teacher_bias": normal(vocab[1]),
    }


def with_topk(inputs, k, temperature=1.0):
    """The same student; of the teacher, log-probabilities and indices of its k most probable tokens."""
    vocab = len(inputs["student_head"])
    logits = inputs["teacher_hidden"].double() @ inputs["teacher_head"].double().T + inputs["teacher_bias"].double()
    values, indices = (logits[:, :vocab] / temperature).log_softmax(1).topk(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))  # stored in no order
    without = dict.fromkeys(("teacher_hidden", "teacher_head", "teacher_bias"))
    return inputs | without | {"teacher_topk": (values[:, order].float(), indices[:, order])}


def call(function, inputs, **options):
    """function on the inputs, its tensors positional where the contract says so."""
    inputs = dict(inputs)
    tensors = [inputs.pop(name) for name in list(inputs)[:5]]
    return function(*tensors, **inputs, **options)


def run(impl, inputs, **options):
    """The op on the device where this implementation is tested."""
    inputs = dict(inputs)
    topk = inputs.pop("teacher_topk", None)
    device = device_of(impl)
    if topk is not None:
        options["teacher_topk"] = tuple(x.to(device) for x in topk)
    return call(linear_distillation, moved(inputs, device), impl=impl, **options)


def call_tokens(impl, inputs, **options):
    """linear_token_losses on the device where this implementation is tested."""
    inputs, device = dict(inputs), device_of(impl)
    topk = inputs.pop("teacher_topk", None)
    if topk is not None:
        options["teacher_topk"] = tuple(x.to(device) for x in topk)
    return call(linear_token_losses, moved(inputs, device), impl=impl, **options)


def gradients_of(function, inputs, weights, leaves=LEAVES):
    """ce, kd and the gradients of weights[0] * ce + weights[1] * kd."""
    inputs = inputs | {name: inputs[name].detach().requires_grad_() for name in leaves}
    result = function(inputs)
    (weights[0] * result.ce + weights[1] * result.kd).backward()
    return [result.ce.detach(), result.kd.detach(), *(inputs[name].grad for name in leaves)]


def values_and_gradients(impl, inputs, weights=(1.0, 1.0), leaves=LEAVES, **options):
    return gradients_of(lambda x: run(impl, x, **options), inputs, weights, leaves)


def doubled(inputs):
    return {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}


def of_row(inputs, i):
    """The inputs of one row."""
    cut = {name: inputs[name][i : i + 1] for name in ("student_hidden", "labels", "weights") if name in inputs}
    if inputs.get("teacher_hidden") is not None:
        cut["teacher_hidden"] = inputs["teacher_hidden"][i : i + 1]
    if inputs.get("teacher_topk") is not None:
        cut["teacher_topk"] = tuple(x[i : i + 1] for x in inputs["teacher_topk"])
    return inputs | cut


def check_roundings(ours, eager, exact, oracle, inputs):
    """As `assert_as_exact_as_eager`, where results round 8 or 11 bits at several places and the largest error is luck.

    A sum's error is that of eager's rows together, as those in its own sum may happen to cancel; a gradient's its root mean
    square.
    """
    rows = [of_row(inputs, i) for i in range(len(inputs["labels"])) if inputs["labels"][i] != -100]
    with torch.no_grad():
        pairs = [(oracle(row), oracle(doubled(row))) for row in rows]
    for index, found in enumerate(ours[:2]):
        rounded = sum(abs(float(x[index]) - float(y[index])) for x, y in pairs)
        error, allowed = abs(float(found) - float(exact[index])), 2 * rounded + 1e-5 * abs(float(exact[index]))
        assert error <= allowed, f"sum {index}: error {error:.3e}, allowed {allowed:.3e}"
    for index, (x, y, z) in enumerate(zip(ours[2:], eager[2:], exact[2:], strict=True)):
        error, rounded, size = (t.double().square().mean().sqrt() for t in (x.cpu() - z, y - z, z))
        assert error <= 2 * rounded + 1e-5 * size, f"gradient {index}: error {error:.3e}, eager's {rounded:.3e}"


def check(impl, inputs, leaves=LEAVES, weights=(0.7, -1.3), chunk_size=4, loss_weights=None, **options):
    def oracle(x):
        return call(reference.linear_distillation, x, **options)

    exact = gradients_of(oracle, doubled(inputs), weights, leaves)
    eager = gradients_of(oracle, inputs, weights, leaves)
    ours = values_and_gradients(
        impl, inputs, weights, leaves, **options, chunk_size=chunk_size, loss_weights=loss_weights or weights
    )
    assert [x.dtype for x in ours[:2]] == [torch.float32] * 2
    assert [x.dtype for x in ours[2:]] == [inputs[name].dtype for name in leaves]
    if inputs["student_hidden"].dtype in (torch.float16, torch.bfloat16):
        check_roundings(ours, eager, exact, oracle, inputs)
    else:
        assert_as_exact_as_eager(ours, eager, exact)
    return ours
