"""What travels through a forward pass as ``model(..., cdistill_vat=recorder)`` and gathers attention slices or losses.

A recorder serves one forward pass. It sees the queries and keys of the layers it names and calls the fused ops on them;
no attention matrix exists at any time. Of samples packed into rows each is a call of its own, on views: its queries see
its own keys only.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops import (
    attention_alignment,
    attention_relation,
    attention_slice,
    attention_slice_accumulate,
    attention_with_alignment,
)
from cdistill.vat.heads import alignment_with_trained_target, heads_of_layers, mean_of_groups
from cdistill.vat.matching import LayerMatch, by_layer
from cdistill.vat.regions import PackedRegions, Regions, require_same_counts
from cdistill.vat.resample import Resampling

AnyRegions: TypeAlias = Regions | PackedRegions


class RowChanges(NamedTuple):
    """What a recorder makes of a layer's attention in some rows: ``(output + added) * scale``."""

    rows: Tensor  # (B, R) among the queries that were shown, -1 = padding
    added: Tensor  # (B, Hq, R, D)
    scale: Tensor  # (B, Hq, R)

    def applied_to(self, out: Tensor) -> Tensor:
        """The layer's attention (B, T, Hq, D) with the changes, in its dtype; other rows bit for bit. One synchronisation."""
        sample, row = (self.rows >= 0).nonzero(as_tuple=True)
        place = sample, self.rows[sample, row].long()
        changed = (out[place] + self.added[sample, :, row]) * self.scale[sample, :, row, None]
        return out.index_put(place, changed.to(out.dtype))


@runtime_checkable
class Recorder(Protocol):
    """What the attention hook calls: `record` once for every layer in ``layers`` (0-based indices).

    A recorder of packed samples also has ``sequence`` (B, T), as `PackedRegions`; the hook checks the model's mask against it.
    """

    layers: frozenset[int]
    key_mask: Tensor | None  # (B, T) bool; the hook checks that it is the padding the model saw

    def record(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool
    ) -> Tensor | RowChanges | None:
        """Use q (B,Hq,T,D), k and v (B,Hkv,T,D) of one layer, positions already encoded.

        Returns the layer's attention (B,Hq,T,D) if it was made with that; else SDPA is to make it, and None if it stays.
        """


def _key_mask(key_mask: Tensor | None, regions: AnyRegions) -> Tensor | None:
    if key_mask is not None and isinstance(regions, PackedRegions):
        raise InputError("key_mask must be None for packed samples: transformers packs only without attention_mask")
    return None if key_mask is None else key_mask.bool()


def _sequence(regions: AnyRegions) -> Tensor | None:
    return regions.sequence if isinstance(regions, PackedRegions) else None


def _sequences(regions: PackedRegions, *tensors: Tensor) -> Iterator[tuple[tuple[Tensor, ...], slice | None]]:
    """What packed tensors (B,H,T,D) hold of each sequence, one after the other, and which sample of the regions that is.

    None for what is padding alone. The parts of a tensor are views with one gradient between them.
    """
    for row, of_row in enumerate(zip(*(x.split(1) for x in tensors), strict=True)):
        lengths: list[int] = []
        samples: list[slice | None] = []
        known = [(s.start, s.stop, slice(i, i + 1)) for i, s in enumerate(regions.samples) if s.row == row]
        end = tensors[0].shape[2]
        for start, stop, sample in (*known, (end, end, None)):
            for length, of in ((start - sum(lengths), None), (stop - start, sample)):
                if length:
                    lengths.append(length)
                    samples.append(of)
        yield from zip(zip(*(x.split(lengths, 2) for x in of_row), strict=True), samples, strict=True)


def _parts(regions: AnyRegions, q: Tensor, k: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Queries and keys of what shares one call of an op, as views, and which samples of the regions these are."""
    if not isinstance(regions, PackedRegions):
        yield q, k, slice(None)
        return
    for (part_q, part_k), sample in _sequences(regions, q, k):
        if sample is not None:
            yield part_q, part_k, sample


def require_all(layers: Collection[int], recorded: Collection[int]) -> None:
    """Raise ValueError naming the layers that no forward pass has recorded."""
    if missing := sorted(set(layers) - set(recorded)):
        raise InputError(
            f"layers {missing} were not recorded: run a model that has them, prepared by cdistill.vat.install, "
            "as model(..., cdistill_vat=recorder); if it was, its layers pass no keyword arguments on to their "
            "attention (as stablelm's and nemotron's) and cannot be aligned"
        )


class TeacherTargets:
    """Teacher side of the alignment: the mean slice of every student layer's window (paper section 4.1, equation 2).

    Each teacher layer's slice is computed once, without gradient, and added into the buffers of the windows it belongs
    to (by ``triton`` in one launch that never stores the slice itself), so that memory grows with the number of student
    layers, not with the teacher's depth; with matched heads there is a slice of every head of one layer beside them. A layer
    recorded twice counts once.

    ``matches`` come from `match_layers`; ``regions`` are the teacher's rows and columns; ``key_mask`` (B,T), non-zero =
    real key, is the padding mask given to the model (None = no padding, or packed samples); ``heads`` and ``impl`` as in
    `cdistill.ops.attention_slice`.
    """

    def __init__(
        self,
        matches: Sequence[LayerMatch],
        regions: AnyRegions,
        *,
        key_mask: Tensor | None,
        heads: str = "mean",
        impl: str | None = None,
    ):
        self.matches = tuple(matches)
        self.layers = frozenset(t for match in self.matches for t in match.teachers)
        self.key_mask, self.sequence = _key_mask(key_mask, regions), _sequence(regions)
        self.regions, self._heads, self._impl = regions, heads, impl
        self._recorded: set[int] = set()
        self._sums: Tensor | None = None  # (parts,windows,B,R,V), or (parts,windows,B,Hq,R,V); B 1 if packed
        self._means: list[Tensor] | None = None

    @torch.inference_mode(False)  # the student's graph will hold the result
    @torch.no_grad()
    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> None:
        """Add one teacher layer's slice to its windows."""
        if layer in self._recorded:
            return
        rows, cols = self.regions.rows, self.regions.cols
        parts = list(_parts(self.regions, q, k))
        if self._sums is None:
            together = len(rows) // max(1, len(parts))
            groups = self.matches[0].heads
            heads = (q.shape[1] if groups is None else len(groups[0]),) if self._heads == "each" else ()
            shape = (len(parts), len(self.matches), together, *heads, rows.shape[1], cols.shape[1])
            self._sums = torch.zeros(shape, dtype=torch.float32, device=q.device)
        windows = [i for i, match in enumerate(self.matches) if layer in match.teachers]
        how: dict[str, Any] = {"causal": causal, "scale": scale, "key_mask": self.key_mask}
        how |= {"heads": self._heads, "impl": self._impl}
        for sums, (part_q, part_k, samples) in zip(self._sums, parts, strict=True):
            where = part_q, part_k, rows[samples], cols[samples]
            if self.matches[0].heads is None:
                attention_slice_accumulate(*where, sums, windows, **how)
                continue
            slices = attention_slice(*where, **how)
            for i in windows:
                sums[i] += mean_of_groups(slices, self.matches[i].groups_of(layer))
        self._recorded.add(layer)

    @property
    def targets(self) -> list[Tensor]:
        """Window means in the order of ``matches``, each (B,R,V) fp32, or (B,Hq,R,V) for heads="each"; N for B if packed.

        Raises ValueError naming the layers that no forward pass has recorded.
        """
        if self._means is None:
            require_all(self.layers, self._recorded)
            sums = () if self._sums is None else [window.flatten(0, 1) for window in self._sums.unbind(1)]
            self._means = [x.div_(len(match.teachers)) for x, match in zip(sums, self.matches, strict=True)]
        return self._means


class TeacherLayers:
    """Teacher side of the alignment without targets: the queries and keys of the layers in the windows, as they come.

    The student's recorder makes slices of them and drops them again, so that memory grows with the tokens of a batch and
    the teacher's aligned layers, not with rows times visual tokens. A layer recorded twice counts once.

    ``matches``, ``regions`` and ``key_mask`` as for `TeacherTargets`.
    """

    def __init__(self, matches: Sequence[LayerMatch], regions: AnyRegions, *, key_mask: Tensor | None):
        self.matches = tuple(matches)
        self.layers = frozenset(t for match in self.matches for t in match.teachers)
        self.key_mask, self.sequence = _key_mask(key_mask, regions), _sequence(regions)
        self.regions = regions
        self._recorded: dict[int, tuple[Tensor, Tensor, float | None]] = {}

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> None:
        """Keep one layer's queries and keys."""
        self._recorded.setdefault(layer, (q.detach(), k.detach(), scale))

    def require_all(self) -> None:
        """Raise ValueError naming the layers that no forward pass has recorded."""
        require_all(self.layers, self._recorded)

    def windows(self, match: LayerMatch, *, masked: bool) -> Iterator[dict[str, Any]]:
        """What `attention_relation` is to compare with, by its arguments: for all samples, or of each packed one.

        Of matched heads those that a student head is compared with, in its place, as further layers if it has several.

        ``masked``: whether the student has a key mask, which the op would take for the teacher's if that has none.

        Raises ValueError for layers of a window that scale their scores differently.
        """
        layers = list(match.teachers)
        of = heads_of_layers(match, [self._recorded[layer] for layer in layers])
        scales = {scale for _, _, scale in of}
        if len(scales) > 1:
            raise InputError(
                f"layers {layers} scale their scores differently ({', '.join(map(str, scales))}), which vat.target "
                "recomputed cannot average; use vat.target stored"
            )
        for parts in zip(*(_parts(self.regions, q, k) for q, k, _ in of), strict=True):
            samples = parts[0][2]
            mask = self.key_mask
            if mask is None and masked:
                mask = torch.ones(parts[0][0].shape[::2], dtype=torch.bool, device=parts[0][0].device)
            yield {
                "teacher_q": [q for q, _, _ in parts],
                "teacher_k": [k for _, k, _ in parts],
                "teacher_rows": self.regions.rows[samples],
                "teacher_cols": self.regions.cols[samples],
                "teacher_key_mask": mask,
                "teacher_scale": of[0][2],
            }


class StudentAlignment:
    """Student side of the alignment: the loss of every matched student layer, made inside its forward pass.

    ``targets`` is the teacher's recorder after its forward pass, of either kind, or one tensor for each match, as
    `TeacherTargets.targets` gives them; ``regions`` are the student's rows and columns, as many as the teacher's in
    every sample unless ``resampling`` makes slices of the student's visual tokens of the teacher's; ``key_mask`` as for
    `TeacherTargets`; ``loss``, ``reduction``, ``sink_filter``, ``heads`` and ``impl`` as in `cdistill.ops.attention_alignment`.
    ``layer_sum`` sums over layers (the authors' code) where the paper takes the mean. ``engine`` "sdpa" leaves the layers'
    attention to SDPA, bit for bit; "auto", or an engine of `cdistill.ops.attention_with_alignment` by name, makes both in one
    forward and one backward pass, of packed samples one by one.

    Safe under non-reentrant gradient checkpointing: the recomputation runs the same ops and the first recording stays.
    A recorder made while gradients are enabled refuses to record without them, which is what reentrant checkpointing
    does to it; make it inside ``torch.no_grad()`` to evaluate the loss only.

    Raises ValueError for targets of other shapes than the regions ask for and, with the teacher's recorder, for a sample
    whose rows or visual tokens are not as many as the teacher's (on CUDA a device-side assertion: no sync).
    """

    def __init__(
        self,
        matches: Sequence[LayerMatch],
        regions: AnyRegions,
        targets: "TeacherTargets | TeacherLayers | Sequence[Tensor]",
        *,
        key_mask: Tensor | None,
        loss: str = "cosine",
        reduction: str = "row",
        sink_filter: bool = False,
        heads: str = "mean",
        layer_sum: bool = False,
        impl: str | None = None,
        engine: str = "sdpa",
        resampling: Resampling | None = None,
    ):
        if isinstance(targets, TeacherTargets | TeacherLayers) and targets.regions is not regions:
            require_same_counts(targets.regions, regions, columns=resampling is None)
        if isinstance(targets, TeacherLayers):
            targets.require_all()
            if engine != "sdpa":
                raise InputError(f"vat.target recomputed needs vat.engine sdpa, got {engine!r}")
            if resampling is not None:
                raise InputError("vat.target recomputed makes no slices to resample; use vat.target stored")
            self._targets: TeacherLayers | dict[int, Tensor] = targets
        else:
            found = targets.targets if isinstance(targets, TeacherTargets) else targets
            wanted = (len(regions.rows), regions.rows.shape[1], regions.cols.shape[1])
            made = None if resampling is None else resampling.places.shape[1]
            self._targets = by_layer(matches, found, wanted, resampled=made)
        self._resampling = resampling
        self.layers = frozenset(match.student for match in matches)
        self._matches = {match.student: match for match in matches}
        self.key_mask, self.sequence = _key_mask(key_mask, regions), _sequence(regions)
        self._regions = regions
        self._loss, self._reduction, self._sink_filter = loss, reduction, sink_filter
        self._heads, self._layer_sum, self._impl, self._engine = heads, layer_sum, impl, engine
        self._needs_grad = torch.is_grad_enabled()
        self._losses: dict[int, Tensor] = {}

    def record(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool
    ) -> Tensor | None:
        """Compute one student layer's alignment loss, (B,), and with an engine its attention."""
        self._require_gradient(layer)
        rows, cols = self._regions.rows, self._regions.cols
        options: dict[str, Any] = {
            "loss": self._loss,
            "reduction": self._reduction,
            "sink_filter": self._sink_filter,
            "causal": causal,
            "scale": scale,
            "key_mask": self.key_mask,
            "heads": self._heads,
            "impl": self._impl,
        }
        out, parts = None, _parts(self._regions, q, k)
        if isinstance(self._targets, TeacherLayers):
            windows = self._targets.windows(self._matches[layer], masked=self.key_mask is not None)
            found = [
                attention_relation(part_q, part_k, rows=rows[part], cols=cols[part], **window, **options)
                for (part_q, part_k, part), window in zip(parts, windows, strict=True)
            ]
        elif self._engine == "sdpa":
            target = self._target(self._targets[layer])
            compare = alignment_with_trained_target if target.requires_grad else attention_alignment
            found = [
                compare(part_q, part_k, target[part], rows[part], cols[part], **options)
                for part_q, part_k, part in parts
            ]
        else:
            # under autocast, rotary embeddings leave q and k in fp32
            target = self._target(self._targets[layer])
            out, found = self._with_attention(target, q.to(v.dtype), k.to(v.dtype), v, options)
        losses = torch.cat(found) if len(found) != 1 else found[0]
        self._losses.setdefault(layer, losses)
        return out

    def _require_gradient(self, layer: int) -> None:
        """Raise ValueError where a layer runs without the gradient that this was made for."""
        if self._needs_grad and not torch.is_grad_enabled():
            raise InputError(
                f"the alignment loss of layer {layer} would lose its gradient: the layer runs without gradients, as "
                "under reentrant gradient checkpointing; set gradient_checkpointing_kwargs={'use_reentrant': False} "
                "(to evaluate only, make the recorder inside torch.no_grad())"
            )

    def _target(self, target: Tensor) -> Tensor:
        """What the teacher gave, as a slice of the student's visual tokens: made when its layer is compared, not before."""
        with torch.no_grad():
            return target if self._resampling is None else self._resampling(target)

    def _with_attention(
        self, target: Tensor, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """The layer's attention (B,Hq,T,D), and the losses of what shares a call; what is padding alone is given zeros."""
        regions, engine = self._regions, None if self._engine == "auto" else self._engine
        if not isinstance(regions, PackedRegions):
            out, losses = attention_with_alignment(q, k, v, target, *regions, **options, engine=engine)
            return out, [losses]
        outs, found = [], []
        for (part_q, part_k, part_v), sample in _sequences(regions, q, k, v):
            if sample is None:
                outs.append(torch.zeros_like(part_q))
                continue
            where = target[sample], regions.rows[sample], regions.cols[sample]
            out, losses = attention_with_alignment(part_q, part_k, part_v, *where, **options, engine=engine)
            outs.append(out)
            found.append(losses)
        batch = torch.cat(outs, 2)[0].unflatten(1, (q.shape[0], q.shape[2]))  # rows side by side: (Hq,B,T,D)
        return batch.transpose(0, 1), found

    def losses(self) -> dict[int, Tensor]:
        """Loss (B,) fp32 of every sample and matched student layer, with gradient; 0 for samples without visual tokens.

        Packed samples count each by itself: (N,).

        Raises ValueError naming the layers that no forward pass has recorded.
        """
        require_all(self.layers, self._losses)
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
        regions: AnyRegions,
        *,
        key_mask: Tensor | None,
        heads: str = "mean",
        impl: str | None = None,
    ):
        self.layers = frozenset(layers)
        self.key_mask, self.sequence = _key_mask(key_mask, regions), _sequence(regions)
        self._regions, self._heads, self._impl = regions, heads, impl
        self._slices: dict[int, Tensor] = {}

    @torch.inference_mode(False)  # a graph may hold the result
    @torch.no_grad()
    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> None:
        """Keep one layer's slice."""
        if layer in self._slices:
            return
        parts = [
            attention_slice(
                part_q,
                part_k,
                self._regions.rows[part],
                self._regions.cols[part],
                causal=causal,
                scale=scale,
                key_mask=self.key_mask,
                heads=self._heads,
                impl=self._impl,
            )
            for part_q, part_k, part in _parts(self._regions, q, k)
        ]
        self._slices[layer] = torch.cat(parts) if len(parts) != 1 else parts[0]

    @property
    def slices(self) -> Mapping[int, Tensor]:
        """Slice of every chosen layer in increasing order, (B,R,V) fp32, or (B,Hq,R,V) for heads="each"; N for B if packed.

        Raises ValueError naming the layers that no forward pass has recorded.
        """
        require_all(self.layers, self._slices)
        return {layer: self._slices[layer] for layer in sorted(self.layers)}
