"""Sequence parallelism: the tokens of a sequence lie on several processes, which exchange them for heads inside attention.

Outside of attention a process has a part of the tokens and all heads, inside it all tokens and a part of the heads: the
exchange is DeepSpeed's Ulysses (Jacobs et al., 2023, arXiv:2309.14509). So the mean over heads of a slice is the mean over
processes of what each makes of its own heads: one all-reduce of (R, V). All processes then have the same slice and the same
loss, and each returns its share, one over their number, so that the sum over processes counts it once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cdistill.errors import InputError
from cdistill.ops import attention_alignment, attention_slice, slice_alignment
from cdistill.vat.recorders import Recorder, RowChanges, TeacherTargets
from cdistill.vat.regions import require_on_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Mean(torch.autograd.Function):
    """The mean over processes. Each of them goes on to the same loss and returns its share of it, so that the gradient of what
    a process gives is the gradient of the mean in that process's share: nothing is sent in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        mean = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mean, group=group)
        return mean.div_(dist.get_world_size(group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SequenceShards:
    """The processes among which the tokens of every sample of a batch are dealt: neighbours together, in the order of ranks.

    All of them are given the same batch. Sequences are filled up at their end to a multiple of the number of processes, which
    causality hides from all real tokens of batches that are padded on the right.

    Args:
        group: the process group.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self._attention: dict[tuple[int, ...], UlyssesAttention] = {}

    def tokens(self, length: int) -> range:
        """Positions of this process's tokens in sequences of a length; the last of them may lie behind the end."""
        share = -(-length // self.size)
        return range(self.rank * share, (self.rank + 1) * share)

    def part(self, x: Tensor) -> Tensor:
        """This process's tokens of x (B, T, ...), zero behind the end."""
        own = self.tokens(x.shape[1])
        found = x[:, own.start : own.stop]
        return F.pad(found, (0, 0) * (x.dim() - 2) + (0, len(own) - found.shape[1]))

    def deal(
        self, model: "PreTrainedModel", inputs: dict[str, Any], recorder: Recorder | None
    ) -> tuple[dict[str, Any], "ShardedPass"]:
        """What the language model of ``model`` takes of this process's tokens, and what travels with them.

        ``inputs`` has ``inputs_embeds`` (B, T, d), and ``position_ids`` (B, T) or (1, T) where these separate packed samples.
        Raises ValueError for position ids of another shape, and for a recorder of samples that lie elsewhere.
        """
        embeds = inputs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        own, given = self.tokens(length), inputs.get("position_ids")
        if given is None:
            given = torch.arange(length, device=embeds.device)[None]
        if given.ndim != 2 or tuple(given.shape) not in ((batch, length), (1, length)):
            raise InputError(f"position_ids must be {batch, length} with sequence_parallel, got {tuple(given.shape)}")
        behind = 1 + torch.arange(self.size * len(own) - length, device=given.device)
        positions = torch.cat((given, given[:, -1:] + behind), 1).expand(batch, -1)
        packing = Packing.of(positions, own) if "position_ids" in inputs else None
        positions = positions[:, own.start : own.stop].contiguous()
        inputs = {**inputs, "inputs_embeds": self.part(embeds), "position_ids": positions}
        if recorder is not None:
            _require_same_packing(recorder, packing)
        return inputs, ShardedPass(recorder, self.attention(model), packing)

    def places(self, places: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Of places (N,) in the B * T tokens of a batch those that are this process's, there and among its own tokens."""
        own, token = self.tokens(length), places % length
        mine = (token >= own.start) & (token < own.stop)
        places, token = places[mine], token[mine]
        return places, places // length * len(own) + token - own.start

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a tensor over the processes, whose gradient is that of this process's share of a common loss."""
        return _Mean.apply(x, self.group)  # type: ignore[no-any-return, no-untyped-call]

    def alignment(
        self,
        q: Tensor,
        k: Tensor,
        target: Tensor,
        rows: Tensor,
        cols: Tensor,
        *,
        loss: str,
        reduction: str,
        sink_filter: bool,
        heads: str,
        scale: float | None,
        **how: Any,
    ) -> Tensor:
        """This process's share of `attention_alignment`, from its heads of q (B,Hq/N,T,D) and k: (B,) fp32.

        ``target`` is the mean over all heads of the teacher, or for heads="each" the slices of those that are here.
        """
        options: dict[str, Any] = {"loss": loss, "reduction": reduction, "sink_filter": sink_filter, **how}
        if heads == "each":
            return attention_alignment(q, k, target, rows, cols, heads=heads, scale=scale, **options) / self.size
        a = self.mean(attention_slice(q, k, rows, cols, scale=scale, **how))
        return slice_alignment(a, target, rows, cols, **options) / self.size

    def attention(self, model: "PreTrainedModel") -> "UlyssesAttention":
        """The exchange around the attention of a model's layers, whose heads `check_heads` has seen."""
        sizes = _sizes(model)
        if sizes not in self._attention:
            self._attention[sizes] = UlyssesAttention(sizes, self.group)
        return self._attention[sizes]


class UlyssesAttention:
    """DeepSpeed's exchange around the attention of layers of one shape: (query heads, key heads, width of a head)."""

    def __init__(self, sizes: tuple[int, ...], group: Any) -> None:
        self._sizes, self._group, self.size = sizes, group, dist.get_world_size(group)
        self._of_batch: dict[int, Any] = {}

    def __call__(
        self, attend: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The output (B,T/N,Hq*D) for q (B,Hq,T/N,D), k and v, by an attention of all tokens and a part of the heads."""
        groups = getattr(module, "num_key_value_groups", None)
        inner = self._inner(query.shape[0])
        inner.attn = attend
        try:
            return inner(module, query, key, value, None, **kwargs)  # type: ignore[no-any-return]
        finally:  # it changes this where it repeats key heads, and the module attends without it, too
            if groups is not None:
                module.num_key_value_groups = groups

    def _inner(self, batch: int) -> Any:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        heads, key_heads, width = self._sizes
        if batch not in self._of_batch:
            self._of_batch[batch] = UlyssesSPAttentionHF(
                attn=None,
                batch_size=batch,
                attn_head_count=heads,
                attn_head_size=width,
                kv_head_count=key_heads,
                num_hidden_layers=1,  # read by a mode for debugging alone
                process_group=self._group,
                seq_length_is_variable=True,
            )
        return self._of_batch[batch]


def _sizes(model: "PreTrainedModel") -> tuple[int, int, int]:
    """Query heads, key heads and the width of a head in the layers of a model's language model."""
    config: Any = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, width


def check_heads(model: "PreTrainedModel", processes: int, side: str) -> None:
    """Raise ValueError unless the heads of a model can be spread over the processes of a sequence."""
    heads, key_heads, _ = _sizes(model)
    if heads % processes:
        raise InputError(f"sequence_parallel must divide the {side}'s {heads} heads, got {processes}")
    if key_heads % processes and processes % key_heads:
        raise InputError(
            f"sequence_parallel must divide the {side}'s {key_heads} key heads, or be a multiple of them, got {processes}"
        )


class Packing(NamedTuple):
    """Where the sequences of packed rows lie, of whole rows that were filled up to a multiple of the number of processes."""

    own: Tensor  # (B, T / processes) int64, which sequence of its row each of this process's tokens belongs to, from 0 on
    whole: Tensor  # (B, T) int64, of all tokens
    lengths: list[list[int]]  # of the sequences of each row

    @classmethod
    def of(cls, positions: Tensor, own: range) -> "Packing | None":
        """By position ids (B, T) that start anew, as transformers reads them; None where none does. Reads them."""
        starts = torch.diff(positions, prepend=positions[:, :1] - 1, dim=1) != 1
        if not starts.any():
            return None
        whole = starts.cumsum(1)
        mine = starts[:, own.start : own.stop].clone()
        mine[:, 0] = False
        return cls(mine.cumsum(1), whole, [torch.bincount(row).tolist() for row in whole])

    def attention(
        self, attend: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
    ) -> Tensor:
        """(B,T,Hq,D) causal attention by ``attend`` within each sequence: no mask of T * T values is made."""
        rows = []
        for row, lengths in enumerate(self.lengths):
            parts = zip(*(x[row : row + 1].split(lengths, 2) for x in (query, key, value)), strict=True)
            rows.append(torch.cat([attend(module, *part, None, **kwargs)[0] for part in parts], 1))
        return torch.cat(rows)


def _require_same_packing(recorder: Recorder, packing: Packing | None) -> None:
    """Raise ValueError unless a recorder knows the sequences of rows as position ids separate them."""
    sequence = getattr(recorder, "sequence", None)
    if packing is None:
        same = None if sequence is None else (sequence == 0).all()
    elif sequence is None or len(sequence) != len(packing.whole):
        same = torch.zeros((), dtype=torch.bool)
    else:
        same = (packing.whole[:, : sequence.shape[1]] == sequence.to(packing.whole.device)).all()
    if same is not None:
        require_on_device(same, "the recorder must be of samples that are packed as the model's position_ids say")


class ShardedPass:
    """What travels through the forward pass of a model whose tokens are sharded: the exchange and, if there is one, a recorder,
    which sees all tokens of a part of the heads. ``packing`` is of rows that hold several sequences."""

    def __init__(self, recorder: Recorder | None, exchange: UlyssesAttention, packing: Packing | None = None) -> None:
        self.recorder, self.exchange, self.packing = recorder, exchange, packing
        self.layers: frozenset[int] = frozenset() if recorder is None else recorder.layers
        self.key_mask = None if recorder is None else recorder.key_mask

    def record(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool
    ) -> Tensor | RowChanges | None:
        """As the recorder's."""
        assert self.recorder is not None
        return self.recorder.record(layer, q, k, v, scale=scale, causal=causal)


class ShardedTargets(TeacherTargets):
    """`TeacherTargets` of a teacher whose heads are spread over processes; all of them ask for the targets."""

    def __init__(self, *args: Any, shards: SequenceShards, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shards = shards
        self._common: list[Tensor] | None = None

    @property
    def targets(self) -> list[Tensor]:
        """As of `TeacherTargets`: means over all heads, or for heads="each" those of the heads that are here."""
        if self._heads == "each":
            return super().targets
        if self._common is None:
            self._common = [self._shards.mean(x) for x in super().targets]
        return self._common
