"""What must hold before `linear_distillation` is timed, against float64, each check in a process of its own.

`python -m benchmarks._exactness_distillation NAME` runs one. The definition is `reference.linear_distillation`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks._contenders import DTYPES
from benchmarks._distillation import IGNORED, Contender, Problem, Size, draw
from benchmarks._exactness import Check, InexactError, Results, check_assertion, fault, gradients, main, worst
from benchmarks._measure import rehearsing
from cdistill.choices import DIVERGENCES
from cdistill.ops import linear_distillation, reference

MODULE = "benchmarks._exactness_distillation"
WEIGHTS = (0.7, 1.3)


def by_rows(p: Problem, dtype: torch.dtype, divergence: str, alone: bool, rows: int = 512) -> Results:
    """The mean per token that contenders compute and its gradients, by definition in ``dtype``, some rows at a time.

    Sums are in fp32 or wider, so that it can be had at any size.
    """
    wide, tokens = torch.promote_types(dtype, torch.float32), (p.labels != IGNORED).sum()
    student_head, teacher_hidden, teacher_head = (x.detach().to(dtype) for x in p[1:4])
    student_head.requires_grad_(p.student_head.requires_grad)
    loss = torch.zeros((), dtype=wide, device=p.labels.device)
    of_hidden, of_head = [], [torch.zeros_like(student_head, dtype=wide)] * student_head.requires_grad
    for start in range(0, len(p.labels), rows):
        part = slice(start, start + rows)
        hidden = p.student_hidden[part].detach().to(dtype).requires_grad_()
        result = reference.linear_distillation(
            hidden, student_head, teacher_hidden[part], teacher_head, p.labels[part], divergence=divergence
        )
        mean = (result.kd if alone else 0.5 * (result.ce + result.kd)) / tokens
        grads = torch.autograd.grad(mean, [hidden, student_head][: len(p.leaves)])
        loss += mean.detach()
        of_hidden.append(grads[0])
        for total, x in zip(of_head, grads[1:], strict=True):
            total += x
    found = [torch.cat(of_hidden), *(x.to(dtype) for x in of_head)]
    return {"loss": loss, **dict(zip(("dhidden", "dhead"), found, strict=False))}


def results_of(run: Callable, p: Problem) -> Results:
    """What `by_rows` defines, as ``run`` of a contender computes it."""
    loss = run(*p)
    return gradients({"loss": loss}, [torch.ones_like(loss)], dict(zip(("hidden", "head"), p.leaves, strict=False)))


def errors(p: Problem, divergence: str) -> Callable[[Contender], tuple[float, str]]:
    """Of contenders at this problem: `worst`."""

    @cache
    def wanted(alone: bool) -> list[Results]:
        return [by_rows(p, dtype, divergence, alone) for dtype in (p.student_hidden.dtype, torch.float64)]

    return lambda c: worst(results_of(c.run, p), *wanted(c.alone))


@dataclass(frozen=True)
class Config:
    """What one launch configuration is checked on, at odd sizes."""

    dtype: str
    kind: str = "plain"
    temperature: float = 1.0
    rows: int = 133
    widths: tuple[int, int] = (72, 136)
    vocab: tuple[int, int] = (1531, 1531)
    vocab_size: int | None = None  # the rest of both heads is padding
    bias: bool = False
    topk: int = 0
    trained: bool = True
    chunk_size: int = 48

    def __str__(self) -> str:
        return f"{self.dtype}-{self.kind}"

    @property
    def used(self) -> int:
        return self.vocab_size or min(self.vocab)


CONFIGS = [
    config
    for dtype in DTYPES
    for config in (
        Config(dtype),
        Config(dtype, "biased", 2.5, vocab=(1600, 1537), vocab_size=1507, bias=True),
        Config(dtype, "top-k", 1.5, topk=50),
        Config(dtype, "frozen", vocab=(5003, 5056), trained=False),
    )
]


def draw_config(config: Config, device: torch.device) -> dict[str, Tensor]:
    """Tensors by the names of the op's arguments; a top-k teacher as the log-probabilities and indices it would give."""
    g = torch.Generator(device).manual_seed(config.rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(DTYPES[config.dtype])

    labels = torch.randint(config.used, (config.rows,), generator=g, device=device)
    labels[torch.rand(config.rows, generator=g, device=device) < 0.3] = IGNORED
    x = {"labels": labels}
    for side, width, vocab in zip(("student", "teacher"), config.widths, config.vocab, strict=True):
        x[f"{side}_hidden"], x[f"{side}_head"] = normal(config.rows, width), normal(vocab, width) * 3 * width**-0.5
        if config.bias:
            x[f"{side}_bias"] = normal(vocab)
    if config.topk:
        logits = x.pop("teacher_hidden").double() @ x.pop("teacher_head").double().T / config.temperature
        values, x["indices"] = logits[:, : config.used].log_softmax(1).topk(config.topk)
        x["values"] = values.float()
    return x


def config_results(config: Config, x: dict[str, Tensor], dtype: torch.dtype, divergence: str, own: bool) -> Results:
    """Both losses and the gradients of their weighted sum."""
    names = ["student_hidden", *["student_head"] * config.trained, *["student_bias"] * config.bias]
    x = {name: y.to(dtype) if y.dtype == DTYPES[config.dtype] and name != "values" else y for name, y in x.items()}
    x |= {name: x[name].detach().requires_grad_() for name in names}
    positional = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "labels")
    options = {"divergence": divergence, "temperature": config.temperature, "vocab_size": config.vocab_size}
    options |= {name: y for name, y in x.items() if name.endswith("bias")}
    if config.topk:
        options["teacher_topk"] = (x["values"], x["indices"])
    function = reference.linear_distillation
    if own:
        function = partial(linear_distillation, loss_weights=WEIGHTS, chunk_size=config.chunk_size, impl="triton")
    result = function(*(x.get(name) for name in positional), **options)
    weights = [torch.tensor(w, device=result.ce.device) for w in WEIGHTS]
    return gradients({"ce": result.ce, "kd": result.kd}, weights, {name: x[name] for name in names})


def check_config(config: Config, device: torch.device) -> None:
    """Every divergence."""
    if rehearsing():  # Triton's interpreter has no bf16
        tiny = {"rows": 21, "widths": (24, 40), "vocab": (67, 71), "vocab_size": 65, "chunk_size": 8}
        config = replace(config, **tiny, topk=min(config.topk, 5), dtype=config.dtype.replace("bf", "fp"))
    x, inexact = draw_config(config, device), {}
    for divergence in DIVERGENCES:
        results = partial(config_results, config, x, divergence=divergence)
        exact, same = (results(dtype=dtype, own=False) for dtype in (torch.float64, DTYPES[config.dtype]))
        if found := fault(partial(results, dtype=DTYPES[config.dtype], own=True), same, exact):
            inexact[divergence] = found
    if inexact:
        raise InexactError(inexact)


SMALL = Size("small", 700, 512, 640, 32003, ignored=100)


def check_repeats(device: torch.device, size: Size = SMALL, dtype: str = "bf16") -> None:
    """Two backwards of one graph, and a second run, agree bit for bit."""
    p, runs = draw(size, DTYPES[dtype], device), []
    for _ in range(2):
        losses = linear_distillation(*p, chunk_size=size.rows // 3, impl="triton")[:2]
        for _ in range(2):
            grads = torch.autograd.grad(losses, p.leaves, [torch.ones_like(x) for x in losses], retain_graph=True)
            runs.append([*(x.detach() for x in losses), *grads])
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))


BAD_LABEL = """
import torch
from cdistill.ops import linear_distillation
x = torch.randn(64, 64, dtype=torch.bfloat16, device="cuda")
for last in (63, 64):
    linear_distillation(x[:2], x, x[:2], x, torch.tensor([1, last], device="cuda"))
    torch.cuda.synchronize()
    print("accepted", last)
"""

MANY = Size("many", 16384, 64, 64, 151936)


def check_offsets(device: torch.device, size: Size = MANY, dtype: str = "bf16") -> None:
    """Logits of more than 2^31 elements in one chunk: losses as in small chunks, gradients of the last rows."""
    p = draw(size, DTYPES[dtype], device)
    whole, parts = (linear_distillation(*p, chunk_size=n, impl="triton") for n in (size.rows, size.rows // 16))
    torch.testing.assert_close(whole.ce, parts.ce, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(whole.kd, parts.kd, rtol=1e-5, atol=0.0)
    (dhidden,) = torch.autograd.grad(0.5 * (whole.ce + whole.kd), p.student_hidden)
    last = Problem(p[0][-8:], p[1], p[2][-8:], *p[3:])._replace(labels=p.labels[-8:])
    same, exact = (by_rows(last, x, "forward_kl", alone=False)["dhidden"] * 8 for x in (DTYPES[dtype], torch.float64))
    ratio, _ = worst({"dhidden": dhidden[-8:]}, {"dhidden": same}, {"dhidden": exact})
    assert ratio <= 1, f"dhidden: error {ratio:.2f} times what is allowed"


TOGETHER: dict[str, Check] = {
    **{str(config): partial(check_config, config) for config in CONFIGS},
    "repeats": check_repeats,
    "bad-label": partial(check_assertion, script=BAD_LABEL),
}
ALONE: dict[str, Check] = {"offsets": check_offsets}  # 12 GB


if __name__ == "__main__":
    raise SystemExit(main((TOGETHER | ALONE)[sys.argv[1]]))
