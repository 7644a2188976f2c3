"""The GPU benchmarks rehearsed on the CPU at tiny sizes, with Triton's interpreter: that they run, and what they refuse."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from cdistill.kernels import _launch
from cdistill.kernels._launch import Tile
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks import (
    _contenders,
    _distillation,
    _exactness_attention,
    _exactness_distillation,
    _passes,
    _relation,
    _report_distillation,
    report,
)
from benchmarks._by_definition import attention_by_definition, results_of, rows_alone
from benchmarks._cases import attention, measured, vocabulary
from benchmarks._contenders import Contender, Shape, draw
from benchmarks._distillation import CHUNKED, FUSED, OURS, SIZES, UNCOMPILED, Size
from benchmarks._exactness import InexactError, excess, worst
from benchmarks._exactness_attention import Config
from benchmarks._measure import judged, passes, rates
from benchmarks._results import ResultsFile
from benchmarks._tables import number
from cdistill.ops import reference

CPU = torch.device("cpu")
TINY = Shape("T4096", 1, 2, 1, 30, 16, 3, 9)
TINY_HEADS = Size("trained", 37, 24, 40, 301, ignored=9)
TINY_RELATION = _relation.Size("one-layer", 2, 3, 1, 3, 9, 30, 16)
SECONDS = 0.01  # of a timing
QUICK = partial(passes, pass_seconds=SECONDS)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmark itself runs")


def with_definition(losses_from_lse, detached):
    """The loss from an LSE that carries its gradient, or does not."""

    def run(q, k, v, target, rows, cols):
        out, lse = attention_by_definition(q.float(), k.float(), v.float(), True, None)
        return out.to(q.dtype), losses_from_lse(q, k, target, rows, cols, lse.detach() if detached else lse)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_rivals_compute_what_we_compute(dtype):
    p = draw(Shape("", 2, 4, 2, 200, 16, 30, 90), dtype, CPU)
    exact, same = (rows_alone(p, x)[1] for x in (torch.float64, dtype))
    runs = {
        "eager": _contenders.eager,
        "sdpa": _contenders.sdpa_einsum,
        "lse": with_definition(_contenders.losses_from_lse, False),
        "ours": _contenders.ours(None),
    }
    for name, run in runs.items():
        ratio, result = worst(results_of(run, p), same, exact)
        assert ratio <= 1, (name, result)
    ratio, result = worst(results_of(with_definition(_contenders.losses_from_lse, True), p), same, exact)
    assert ratio > 10 and result in ("dq", "dk")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_causal_blocks():
    made = _contenders.causal_blocks(384, CPU)
    wanted = create_block_mask(lambda b, h, i, j: i >= j, None, None, 384, 384, device="cpu")
    assert torch.equal(made.to_dense(), wanted.to_dense())
    assert torch.equal(made.full_kv_num_blocks, wanted.full_kv_num_blocks)
    assert torch.equal(made.q_num_blocks, wanted.q_num_blocks)
    p = draw(Shape("", 1, 4, 2, 384, 16, 30, 90), torch.float32, CPU)
    inputs = [x.detach() for x in p.inputs]
    out, losses = _contenders.flex_einsum(*inputs)
    plain, _ = _contenders.flex_plain(*inputs)
    wanted_out, wanted_losses = _contenders.eager(*inputs)
    torch.testing.assert_close(out, wanted_out)
    torch.testing.assert_close(plain, wanted_out)
    torch.testing.assert_close(losses, wanted_losses)


@pytest.mark.parametrize(
    "check",
    [
        partial(
            _exactness_attention.check_config, Config("fp32", 16, 2, 1, ("left", "right"), tokens=24, rows=17, cols=18)
        ),
        partial(
            _exactness_attention.check_config, Config("fp16", 24, 2, 2, ("",), causal=False, tokens=24, rows=7, cols=11)
        ),
        partial(_exactness_attention.check_losses, config=Config("fp32", 16, 2, 1, tokens=24, rows=7, cols=11)),
        partial(_exactness_attention.check_repeats, shape=TINY, dtype="fp32"),
        partial(_exactness_attention.check_slice_offsets, tokens=130, heads=1, dtype="fp16"),
        partial(_exactness_attention.check_flash_offsets, shape=Shape("", 2, 1, 1, 20, 16, 1, 1), dtype="fp16"),
    ],
    ids=["gqa-masked", "mha-full", "losses", "repeats", "slice-offsets", "flash-offsets"],
)
def test_checks_pass(check):
    check(CPU)


def test_a_wrong_result_is_reported_by_its_part(monkeypatch):
    def wrong(*arguments, **options):
        out, lse = attention_by_definition(*arguments, options["causal"], options["key_mask"])
        return out + 1e-3, lse

    monkeypatch.setattr(_exactness_attention, "flash_attention", wrong)
    config = Config("fp32", 16, 2, 1, ("",), tokens=24, rows=7, cols=11)
    with pytest.raises(InexactError) as raised:
        _exactness_attention.check_config(config, CPU)
    assert list(raised.value.parts) == ["flash"]
    assert excess(torch.tensor([torch.nan]), torch.ones(1), torch.ones(1)) == float("inf")


@pytest.mark.parametrize(
    "kernel", ["slice_forward", "slice_rows", "slice_cols", "flash_forward", "flash_dkdv", "flash_dq"]
)
def test_other_tiles_are_checked_and_timed(kernel):
    key, tile = (kernel, 4, 16), Tile(32, 16, 1, 1)
    _exactness_attention.check_tile(CPU, key, tile, "fp32", Config("fp32", 16, 1, 1, tokens=24, rows=17, cols=18))
    failed = {_exactness_attention.tile_name(key, Tile(64, 16, 1, 1)): "too far from float64"}
    tiles = [tile, Tile(64, 16, 1, 1)]
    rows = _passes.timed_tiles(key, tiles, TINY, "fp32", CPU, failed=failed, seconds=SECONDS)
    assert [row["in_table"] for row in rows] == [True, False, False]
    assert ["ms" in row for row in rows] == [True, True, False]


def test_other_tiles_belong_to_kernels_of_the_table():
    assert {(*key, 0) for key in _exactness_attention.CANDIDATES} <= _launch.TILES.keys()
    assert {c.width for c in _exactness_attention.CONFIGS} >= {width for _, _, width, _ in _launch.TILES}
    assert len({str(c) for c in _exactness_attention.CONFIGS}) == len(_exactness_attention.CONFIGS)


def test_no_failed_check_is_timed():
    failed = {"ours/triton": "dq: error 7.00 times what is allowed", "flash": "crashed"}
    rows, problems = measured(attention(TINY), "fp32", CPU, failed=failed, timer=QUICK)
    found = {row["contender"]: row for row in rows}
    assert not problems
    assert "7.00" in found["ours/triton"]["skipped"] and "both_ms" not in found["ours/triton"]
    assert "crashed" in found["flash_attention (own)"]["skipped"]
    assert "both_ms" in found["ours"] and "CUDA" in found["ours/torch_cudnn"]["skipped"]
    rows, _ = measured(attention(TINY), "fp32", CPU, failed={"": "crashed"}, seconds=0.0)
    assert all("skipped" in row for row in rows)


def test_what_is_inexact_at_the_timed_shape_fails():
    def wrong(q, k, v, *_):
        return q * k.repeat_interleave(2, 1) + v[:, :1], None

    def broken(*_):
        raise RuntimeError("no kernel\nat all")

    found = [
        Contender("a", wrong, frozenset({"flash"}), plain=True),
        Contender("b", broken, frozenset({"flash"})),
        Contender("c", broken),
    ]
    rows, problems = judged(found, attention(TINY).error_of(draw(TINY, torch.float32, CPU)))
    assert all("skipped" in row for row in rows.values())
    assert rows["c"]["skipped"] == "RuntimeError: no kernel"
    assert [line[:3] for line in problems] == ["a: ", "b: "]


def test_rehearsal_writes_results_and_a_report(tmp_path):
    file = ResultsFile.new(tmp_path, CPU)
    file.add("rates", rates(CPU, size=64, copied=2**16, seconds=SECONDS))
    file.add("planned", ["check bf16-d64-mha", "check bf16-d128-mha", "attention T4096", "attention paper"])
    file.add("done", {"check bf16-d64-mha": ["flash no mask, dq: error 3.00"], "check bf16-d128-mha": []})
    file.add("done", {"attention T4096": []})
    rows, problems = measured(attention(TINY), "fp16", CPU, timer=QUICK)
    assert not problems
    file.add("rows", rows)
    ceilings = file.data["rates"]
    file.add("slices", _passes.slice_passes(TINY, "fp32", CPU, ceilings, seconds=SECONDS))
    file.add("tiles", _passes.timed_tiles(("flash_dq", 4, 16), [], TINY, "fp32", CPU, seconds=SECONDS))
    data = json.loads(file.path.read_text())
    assert data["versions"]["torch"] == torch.__version__ and data["versions"]["cdistill"] == "checkout"
    assert {row["contender"] for row in data["rows"] if "both_ms" in row} >= {"ours", "ours/triton", "eager"}

    said = []
    report.report(tmp_path, said.append)
    assert "| ours/triton |" in said[0] and "1 of 2 passed, 1 failed" in said[0] and "B1 H2/1 R3 V9 T30 D16" in said[0]
    assert "- check bf16-d64-mha: flash no mask, dq: error 3.00" in said[0]
    assert said[0].partition("Not reached:\n\n")[2].startswith("- attention paper\n\n")
    assert file.path.with_suffix(".png").read_bytes()[1:4] == b"PNG"


def test_report_without_results_says_so(tmp_path):
    said = []
    report.report(tmp_path, said.append)
    assert said == [report.NOTHING]


def test_targets_are_judged_by_figures():
    def timed(both_ms, percent, **more):
        return {"both_ms": both_ms, "overhead_percent_over_best_plain": percent, **more}

    rows = {
        "ours": timed(1.08, 8.0, extra_mb=40.0),
        report.COMPILED_STACK: timed(1.14, 14.0),
        "flash_attention (own)": timed(1.5, 50.0),
        "flex (plain)": timed(1.6, 60.0),
    }
    (shape,) = (s for s in _contenders.SHAPES if s.name == "T4096")
    lines = report.targets({"T4096": rows}, {"T4096": shape})
    assert [line[4] for line in lines] == ["pass", "not measured", "MISS", "pass", "MISS", "not measured"]
    assert shape.slice_bytes * 3 / 1e6 == pytest.approx(35.4, abs=0.1)


def errors_of(size, divergence, dtype=torch.float32, **options):
    """By contender: its largest error over what is allowed, and the result that has it."""
    p = _distillation.draw(size, dtype, CPU)
    found, _ = _distillation.contenders(size, divergence, CPU, compiling=False)
    return {c.name: _exactness_distillation.errors(p, divergence, **options)(c) for c in found}


@pytest.mark.parametrize("divergence", _distillation.DIVERGENCES)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_contenders_of_distillation_compute_what_we_compute(divergence, trained):
    size = replace(TINY_HEADS, trained=trained)
    errors = errors_of(size, divergence)
    assert len(errors) == (4 if divergence == "jsd" else 3)
    assert all(ratio <= 1 for ratio, _ in errors.values()), errors
    p = _distillation.draw(size, torch.float32, CPU)
    assert len(p.leaves) == 1 + trained and (p.labels == -100).sum() == 9


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_liger_fused_computes_what_we_compute():
    p = _distillation.draw(TINY_HEADS, torch.float32, CPU)
    fused = _distillation.Contender(FUSED, _distillation.liger_fused(), alone=True)
    ratio, result = _exactness_distillation.errors(p, "jsd")(fused)
    assert ratio <= 1, result


def test_definition_by_rows_is_the_oracle():
    p = _distillation.draw(TINY_HEADS, torch.float32, CPU)
    whole = reference.linear_distillation(*p, divergence="jsd")
    wanted = (whole.ce + whole.kd) / (2 * whole.tokens)
    got = _exactness_distillation.by_rows(p, torch.float32, "jsd", alone=False, rows=5)
    grads = torch.autograd.grad(wanted, p.leaves)
    for x, y in zip(got.values(), (wanted.detach(), *grads), strict=True):
        torch.testing.assert_close(x, y)


def test_floor_and_memory_of_distillation():
    trained, frozen, half = (next(s for s in SIZES if s.name == name) for name in ("trained", "frozen", "half ignored"))
    M, V, Hs, Ht = 4096, 151936, 2048, 2560
    assert trained.flops == half.flops == 6 * M * V * Hs + 2 * M * V * Ht
    assert frozen.flops == 4 * M * V * Hs + 2 * M * V * Ht
    assert trained.promised_bytes == 2 * 4 * V * Hs and frozen.promised_bytes == 2**29
    assert str(frozen) == "M4096 H2048/2560 V151936, head frozen" and str(half).endswith(", 4096 ignored")


def test_who_is_left_out_of_distillation(monkeypatch):
    def left_out(size, divergence):
        return _distillation.contenders(size, divergence, CPU, compiling=False)[1]

    assert "JSD only" in left_out(TINY_HEADS, "forward_kl")[CHUNKED]
    assert "this length" in left_out(replace(TINY_HEADS, rivals=False), "jsd")["eager"]
    monkeypatch.setattr(_distillation, "free_memory", lambda device: 1e5)
    on_gpu = {c.name for c in _distillation.contenders(TINY_HEADS, "jsd", torch.device("cuda"))[0]}
    assert on_gpu == {OURS, f"{OURS}, no cross-entropy", CHUNKED, FUSED, _distillation.COMPILED}
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", None)
    reasons = left_out(TINY_HEADS, "jsd")
    assert "liger_kernel" in reasons[CHUNKED] and "liger_kernel" in reasons[FUSED] and "GB" in reasons["eager"]


CONFIGS = {config.kind: config for config in _exactness_distillation.CONFIGS if config.dtype == "fp16"}
SMALL_VOCAB = {"rows": 21, "widths": (24, 40), "vocab": (67, 71), "chunk_size": 8}


@pytest.mark.parametrize(
    "check",
    [
        partial(_exactness_distillation.check_config, replace(CONFIGS["plain"], **SMALL_VOCAB)),
        partial(_exactness_distillation.check_config, replace(CONFIGS["biased"], **SMALL_VOCAB, vocab_size=65)),
        partial(_exactness_distillation.check_config, replace(CONFIGS["top-k"], **SMALL_VOCAB, topk=5)),
        partial(_exactness_distillation.check_config, replace(CONFIGS["frozen"], **SMALL_VOCAB, dtype="fp32")),
        partial(_exactness_distillation.check_repeats, size=TINY_HEADS, dtype="fp16"),
        partial(_exactness_distillation.check_offsets, size=Size("", 32, 16, 24, 65), dtype="fp16"),
    ],
    ids=["plain", "biased", "top-k", "frozen", "repeats", "offsets"],
)
def test_checks_of_distillation_pass(check):
    check(CPU)


def test_a_wrong_divergence_is_reported_by_its_name(monkeypatch):
    def wrong(*tensors, loss_weights, chunk_size, impl, **options):
        result = reference.linear_distillation(*tensors, **options)
        return result._replace(kd=result.kd * (1.01 if options["divergence"] == "jsd" else 1))

    monkeypatch.setattr(_exactness_distillation, "linear_distillation", wrong)
    with pytest.raises(InexactError) as raised:
        _exactness_distillation.check_config(replace(CONFIGS["plain"], **SMALL_VOCAB), CPU)
    assert list(raised.value.parts) == ["jsd"]


def distilled(divergence, **options):
    return measured(vocabulary(TINY_HEADS, divergence, compiling=False), "fp32", CPU, timer=QUICK, **options)


def test_no_failed_divergence_is_timed(monkeypatch):
    rows, problems = distilled("jsd", failed={"jsd": "dhead: error 7.00 times what is allowed"})
    found = {row["contender"]: row for row in rows}
    assert not problems
    assert "7.00" in found[OURS]["skipped"] and found["eager"]["times_ours"] is None
    rows, _ = distilled("jsd", failed={"forward_kl": "crashed"}, seconds=0.0)
    assert all("skipped" in row for row in rows)

    def wrong(*problem):
        return _distillation.eager(*problem, divergence="jsd") * 1.01

    p = _distillation.draw(TINY_HEADS, torch.float32, CPU)
    ours = _distillation.Contender(OURS, wrong, frozenset({"jsd"}))
    rows, problems = judged([ours], _exactness_distillation.errors(p, "jsd"))
    assert "inexact" in rows[OURS]["skipped"] and problems[0].startswith(OURS)


def test_rehearsal_of_distillation_writes_results_and_a_report(tmp_path):
    file = ResultsFile.new(tmp_path, CPU)
    file.add("rates", {"matmul_tflops": 0.1, "copy_tb_per_s": 0.01})
    for divergence in _distillation.DIVERGENCES:
        rows, problems = distilled(divergence)
        assert not problems
        file.add("rows", rows)
    data = json.loads(file.path.read_text())
    own = next(row for row in data["rows"] if row["contender"] == OURS)
    assert own["times_ours"] == 1.0

    said = []
    report.report(tmp_path, said.append)
    assert f"| {UNCOMPILED} |" in said[0] and str(TINY_HEADS) in said[0]
    share = 100 * TINY_HEADS.flops / 1e8 / own["both_ms"]
    assert f"| {number(share)} |" in said[0]
    assert f"- {FUSED}: needs CUDA tensors" in said[0]


def test_targets_of_distillation_are_judged_by_figures():
    def timed(both_ms, peak_mb):
        return {OURS: {"both_ms": both_ms, "floor_ms": 20.0, "peak_mb": peak_mb}}

    shapes = {"trained, jsd": timed(23.0, 2600.0), "long, jsd": timed(90.0, 2650.0), "frozen, jsd": timed(24.0, 600.0)}
    found = {(line[0][:11], line[1]): line[4] for line in _report_distillation.targets(shapes)}
    assert found["forward and", "trained, jsd"] == found["peak memory", "trained, jsd"] == "pass"
    assert found["forward and", "frozen, jsd"] == found["peak memory", "frozen, jsd"] == "MISS"
    assert found["forward and", "trained, forward_kl"] == "not measured"
    last = _report_distillation.targets(shapes)[-1]
    assert last[1] == "long, jsd" and last[2] == "50" and last[4] == "pass"
