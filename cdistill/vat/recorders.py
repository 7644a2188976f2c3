"""What travels through a forward pass as ``model(..., cdistill_vat=recorder)`` and gathers attention slices or losses.

A recorder serves one forward pass. It sees the queries and keys of the layers it names and calls the fused ops on them;
no attention matrix exists at any time.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cdistill.ops import attention_alignment, attention_slice
from cdistill.vat.matching import LayerMatch
from cdistill.vat.regions import Regions


@runtime_checkable
class Recorder(Protocol):
    """What the attention hook calls: `record` once for every layer in ``layers`` (0-based indices)."""

    layers: frozenset[int]
    key_mask: Tensor | None  # (B, T) bool; the hook checks that it is the padding the model saw

    def record(self, layer: int, q: Tensor, k: Tensor, *, scale: float | None, causal: bool) -> None:
        """Use q (B,Hq,T,D) and k (B,Hkv,T,D) of one layer, positions already encoded."""


def _key_mask(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.bool()


def _require_all(layers: Collection[int], recorded: Collection[int]) -> None:
    if missing := sorted(set(layers) - set(recorded)):
        raise ValueError(
            f"layers {missing} were not recorded: run a model that has them, prepared by cdistill.vat.install, "
            "as model(..., cdistill_vat=recorder)"
        )


class TeacherTargets:
    """Teacher side of the alignment: the mean slice of every student layer's window (paper section 4.1, equation 2).

    Each teacher layer's slice is computed once, without gradient, and added into the buffers of the windows it belongs
    to, so that memory grows with the number of student layers, not with the teacher's depth. A layer recorded twice
    counts once.

    ``matches`` come from `match_layers`; ``regions`` are the teacher's rows and columns; ``key_mask`` (B,T), non-zero =
    real key, is the padding mask given to the model (None = no padding); ``heads`` and ``impl`` as in
    `cdistill.ops.attention_slice`.
    """

    def __init__(
        self,
        matches: Sequence[LayerMatch],
        regions: Regions,
        *,
        key_mask: Tensor | None,
        heads: str = "mean",
        impl: str | None = None,
    ):
        self.matches = tuple(matches)
        self.layers = frozenset(t for match in self.matches for t in match.teachers)
        self.key_mask = _key_mask(key_mask)
        self._regions, self._heads, self._impl = regions, heads, impl
        self._recorded: set[int] = set()
        self._sums: dict[int, Tensor] = {}
        self._means: list[Tensor] | None = None

    @torch.inference_mode(False)  # the student's graph will hold the result
    @torch.no_grad()
    def record(self, layer: int, q: Tensor, k: Tensor, *, scale: float | None, causal: bool) -> None:
        """Add one teacher layer's slice to its windows."""
        if layer in self._recorded:
            return
        a = attention_slice(
            q,
            k,
            *self._regions,
            causal=causal,
            scale=scale,
            key_mask=self.key_mask,
            heads=self._heads,
            impl=self._impl,
        )
        unowned = True
        for i, match in enumerate(self.matches):
            if layer not in match.teachers:
                continue
            if i in self._sums:
                self._sums[i] += a
            else:  # the first window that starts here may keep the slice itself
                self._sums[i] = a if unowned else a.clone()
                unowned = False
        self._recorded.add(layer)

    @property
    def targets(self) -> list[Tensor]:
        """Window means in the order of ``matches``, each (B,R,V) fp32, or (B,Hq,R,V) for heads="each".

        Raises ValueError naming the layers that no forward pass has recorded.
        """
        if self._means is None:
            _require_all(self.layers, self._recorded)
            self._means = [self._sums[i].div_(len(match.teachers)) for i, match in enumerate(self.matches)]
        return self._means


class StudentAlignment:
    """Student side of the alignment: the loss of every matched student layer, made inside its forward pass.

    ``targets`` are `TeacherTargets.targets`; ``regions`` are the student's rows and columns, as many as the teacher's
    in every sample; ``key_mask`` as for `TeacherTargets`; ``loss``, ``reduction``, ``sink_filter``, ``heads`` and
    ``impl`` as in `cdistill.ops.attention_alignment`. ``layer_sum`` sums over layers (the authors' code) where the
    paper takes the mean.

    Safe under non-reentrant gradient checkpointing: the recomputation runs the same ops and the first recording stays.
    A recorder made while gradients are enabled refuses to record without them, which is what reentrant checkpointing
    does to it; make it inside ``torch.no_grad()`` to evaluate the loss only.
    """

    def __init__(
        self,
        matches: Sequence[LayerMatch],
        regions: Regions,
        targets: Sequence[Tensor],
        *,
        key_mask: Tensor | None,
        loss: str = "cosine",
        reduction: str = "row",
        sink_filter: bool = False,
        heads: str = "mean",
        layer_sum: bool = False,
        impl: str | None = None,
    ):
        if len(targets) != len(matches):
            raise ValueError(f"targets must hold one tensor for each of the {len(matches)} matches, got {len(targets)}")
        self.layers = frozenset(match.student for match in matches)
        self._targets = {match.student: target for match, target in zip(matches, targets, strict=True)}
        self.key_mask = _key_mask(key_mask)
        self._regions = regions
        self._loss, self._reduction, self._sink_filter = loss, reduction, sink_filter
        self._heads, self._layer_sum, self._impl = heads, layer_sum, impl
        self._needs_grad = torch.is_grad_enabled()
        self._losses: dict[int, Tensor] = {}

    def record(self, layer: int, q: Tensor, k: Tensor, *, scale: float | None, causal: bool) -> None:
        """Compute one student layer's alignment loss, (B,)."""
        if self._needs_grad and not torch.is_grad_enabled():
            raise ValueError(
                f"the alignment loss of layer {layer} would lose its gradient: the layer runs without gradients, as "
                "under reentrant gradient checkpointing; set gradient_checkpointing_kwargs={'use_reentrant': False} "
                "(to evaluate only, make the recorder inside torch.no_grad())"
            )
        losses = attention_alignment(
            q,
            k,
            self._targets[layer],
            *self._regions,
            loss=self._loss,
            reduction=self._reduction,
            sink_filter=self._sink_filter,
            causal=causal,
            scale=scale,
            key_mask=self.key_mask,
            heads=self._heads,
            impl=self._impl,
        )
        self._losses.setdefault(layer, losses)

    def losses(self) -> dict[int, Tensor]:
        """Per-sample loss (B,) fp32 of every matched student layer, with gradient; 0 for samples without visual tokens.

        Raises ValueError naming the layers that no forward pass has recorded.
        """
        _require_all(self.layers, self._losses)
        return {layer: self._losses[layer] for layer in sorted(self.layers)}

    def loss(self) -> Tensor:
        """L_vat: scalar fp32, mean over the samples and mean (``layer_sum``: sum) over the matched layers."""
        per_layer = torch.stack([losses.mean() for losses in self.losses().values()])
        return per_layer.sum() if self._layer_sum else per_layer.mean()

    def per_layer(self) -> dict[int, Tensor]:
        """Mean loss over the samples of every matched student layer, detached scalars, for logging."""
        return {layer: losses.detach().mean() for layer, losses in self.losses().items()}


class SliceRecorder:
    """Detached attention slices of chosen layers, for adaptive matching and for analysis.

    ``layers`` are 0-based indices; the other arguments as for `TeacherTargets`. The first recording of a layer stays.
    """

    def __init__(
        self,
        layers: Collection[int],
        regions: Regions,
        *,
        key_mask: Tensor | None,
        heads: str = "mean",
        impl: str | None = None,
    ):
        self.layers = frozenset(layers)
        self.key_mask = _key_mask(key_mask)
        self._regions, self._heads, self._impl = regions, heads, impl
        self._slices: dict[int, Tensor] = {}

    @torch.no_grad()
    def record(self, layer: int, q: Tensor, k: Tensor, *, scale: float | None, causal: bool) -> None:
        """Keep one layer's slice."""
        if layer not in self._slices:
            self._slices[layer] = attention_slice(
                q,
                k,
                *self._regions,
                causal=causal,
                scale=scale,
                key_mask=self.key_mask,
                heads=self._heads,
                impl=self._impl,
            )

    @property
    def slices(self) -> Mapping[int, Tensor]:
        """Slice of every chosen layer in increasing order, (B,R,V) fp32, or (B,Hq,R,V) for heads="each".

        Raises ValueError naming the layers that no forward pass has recorded.
        """
        _require_all(self.layers, self._slices)
        return {layer: self._slices[layer] for layer in sorted(self.layers)}
