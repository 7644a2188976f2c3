"""The protocol of an attention engine: who makes ``out`` and its log-sum-exp under an op, and the gradients of q, k and v.

`attention_forward` and `attention_backward` call an engine, and fold the gradient of the log-sum-exp into ``out`` for one
whose backward pass takes none.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cdistill.ops._dispatch import Backend
from cdistill.ops._problem import AttentionProblem, Gradients


class AttentionEngine(ABC):
    """An implementation of softmax attention. Write one and hand it to `cdistill.ops.register_attention_engine`.

    ``problem`` (`AttentionProblem`) has been checked: q (B,Hq,T,D), k and v (B,Hkv,T,D) of one dtype and device with unit
    stride on D, key_mask (B,T) bool or None, causal, scale > 0. Autograd and autocast are off inside the methods. An engine
    keeps no state between forward and backward, which may run again or not at all.
    """

    takes_dlse = True  # False: `backward` is never given a dlse, because it has been folded into ``out``
    deterministic = True  # at least where torch.use_deterministic_algorithms is on
    SPLITS_LSE = False  # whether `forward_split` gives the split lse of `Backend`, which `backward` then takes

    def missing(self) -> str | None:
        """What is not installed, and how to install it; None if nothing."""
        return None

    def refusal(self, problem: AttentionProblem) -> str | None:
        """Why this problem cannot be computed, None if it can; to be read after "engine='NAME' ".

        Looks at shapes, dtypes, devices and options, never at values: torch.compile asks with tensors that have none.
        """
        return None

    @abstractmethod
    def forward(self, problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        """out (B,Hq,T,D) in q's dtype, and lse (B,Hq,T) fp32, the natural log of the softmax denominators.

        A row that sees no key has out 0 and lse -inf.
        """

    def forward_split(self, problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor | None]:
        """`forward`, and with SPLITS_LSE the split lse (2,B,Hq,T), else None."""
        return *self.forward(problem), None

    @abstractmethod
    def backward(
        self, problem: AttentionProblem, out: Tensor, dout: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New gradients of q, k and v, in their shapes and dtypes, for ``out`` and ``problem.lse`` as `forward` made them.

        dout (B,Hq,T,D) has unit stride on D and is dense; dlse (B,Hq,T) fp32 is contiguous, and zero for rows not in
        ``problem.rows`` if that is not None. One of the two may be None: that result was not used. Without ``takes_dlse``
        dlse is always None and dout never.
        """


def attention_forward(engine: AttentionEngine, problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor | None]:
    """out (B,Hq,T,D); lse (B,Hq,T), contiguous; and the split one (2,B,Hq,T) or None."""
    out, lse, split = engine.forward_split(problem)
    return out, lse.contiguous(), split


def attention_backward(
    engine: AttentionEngine,
    problem: AttentionProblem,
    out: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    impl: Backend,
) -> Gradients:
    """New gradients of q, k and v with unit stride on D, for ``problem.lse`` as the engine's forward pass made it.

    ``problem.rows`` are those where dlse may differ from zero. ``impl`` does what the engine lacks.
    """
    q, k, v = problem.qkv
    if dout is None and dlse is None:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dout = None if dout is None else _dense(dout)
    dlse = None if dlse is None else dlse.contiguous()
    if dlse is None or engine.takes_dlse:
        dq, dk, dv = map(_dense, engine.backward(problem, out, dout, dlse))
        return dq, dk, dv
    return _folded_backward(engine, problem, out, dout, dlse, impl)


def _folded_backward(
    engine: AttentionEngine, problem: AttentionProblem, out: Tensor, dout: Tensor | None, dlse: Tensor, impl: Backend
) -> Gradients:
    """`attention_backward` of an engine that takes no dlse: it gets it folded into ``out``, which is put back afterwards."""
    q, k, v = problem.qkv
    if problem.rows is None:
        rows = torch.arange(problem.offset, k.shape[2], device=q.device).expand(q.shape[0], -1).contiguous()
        problem = problem._replace(rows=rows, cols=rows[:, :0])
    rows = problem.query_rows
    if dout is None:
        dq, dk = impl.row_lse_backward(problem, dlse)
        return dq.to(q.dtype), dk.to(k.dtype), torch.zeros_like(v)
    if dout.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
        dout = dout.clone()
    saved, rest = impl.fold_dlse(out, dout, dlse, rows)
    try:
        dq, dk, dv = map(_dense, engine.backward(problem, out, dout, None))
    finally:
        impl.unfold_dlse(out, saved, rows)
    impl.row_lse_backward(problem, rest, into=(dq, dk))
    return dq, dk, dv


def _dense(x: Tensor) -> Tensor:
    """x with unit stride on D and no repeated elements, as kernels want it."""
    return x.contiguous() if x.stride(-1) != 1 or 0 in x.stride() else x


def refusal_on_cuda(
    problem: AttentionProblem, *, width: int, capability: tuple[int, int], most: tuple[int, int] = (99, 0)
) -> str | None:
    """What the libraries' CUDA kernels have in common: 16-bit types, no key mask, a range of GPUs and head dims."""
    q = problem.q
    if q.device.type != "cuda":
        return f"needs CUDA tensors, q is on {q.device}"
    if q.dtype == torch.float32:
        return "needs float16 or bfloat16, q is float32"
    if problem.key_mask is not None:
        return "takes no key_mask"
    if q.shape[3] > width:
        return f"has head dims up to {width}, q has {q.shape[3]}"
    if not capability <= torch.cuda.get_device_capability(q.device) <= most:
        return f"does not support {torch.cuda.get_device_name(q.device)}"
    return None
