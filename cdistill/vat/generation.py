"""Slices of the tokens that a model writes: what `generate` shows a recorder, pass after pass, on keys kept in a cache."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdistill.errors import InputError
from cdistill.ops import attention_slice
from cdistill.vat.recorders import require_all
from cdistill.vat.regions import require_on_device


class GenerationRecorder:
    """Detached attention slices of generated tokens: row i is the query that predicted token i, the first the prompt's last.

    For ``model.generate(**batch, cdistill_vat=recorder)`` of an installed model, greedy or sampled, with a dynamic or a static
    cache, begun with an empty one; one recorder serves one call. Beams, returned sequences beyond one and assistants reorder or
    take back what was shown, and are refused.

    Args:
        layers: 0-based indices of the layers to keep.
        cols: visual tokens of the prompt (B,V), -1 = padding, as in `Regions`.
        prompt: tokens of the prompt, T of its ``input_ids`` (B,T).
        key_mask: the prompt's attention_mask (B,T), non-zero = real; None = no padding.
        heads, impl: as in `cdistill.ops.attention_slice`.
    """

    def __init__(
        self,
        layers: Collection[int],
        cols: Tensor,
        *,
        prompt: int,
        key_mask: Tensor | None,
        heads: str = "mean",
        impl: str | None = None,
    ):
        if key_mask is not None and key_mask.shape != (len(cols), prompt):
            raise InputError(f"key_mask must be (B, T) = {(len(cols), prompt)}, got {tuple(key_mask.shape)}")
        self.layers = frozenset(layers)
        self.key_mask = None if key_mask is None else key_mask.bool()  # of the tokens that a layer has just shown
        self._cols, self._prompt, self._mask = cols, prompt, self.key_mask
        self._heads, self._impl = heads, impl
        self._tokens = dict.fromkeys(self.layers, 0)
        self._slices: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

    def show(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Of a cache's keys (B,Hkv,T,D) those of the n tokens shown so far, these queries' with them: (B,Hkv,n,D).

        ``mask`` (B,1,queries,T) is the model's, if it has one; a static cache's hides what is empty.

        Raises ValueError where the keys are not those of the tokens that were shown.
        """
        n = self._tokens[layer] + query.shape[2]
        if len(query) != len(self._cols):
            raise InputError(
                f"the recorder has {len(self._cols)} prompts and the model {len(query)} sequences: generate without beams and "
                "with one returned sequence each"
            )
        if key.shape[2] < n or (key.shape[2] > n and mask is None):
            raise InputError(
                f"layer {layer} has {key.shape[2]} keys after {n} tokens: a recorder of generation serves one call that begins "
                "with an empty cache, of layers that keep all keys, without an assistant model"
            )
        if key.shape[2] > n and mask is not None:
            hidden = ~mask[..., n:].any() if mask.dtype == torch.bool else (mask[..., n:] < 0).all()
            require_on_device(
                hidden, f"layer {layer} sees keys beyond the {n} tokens that were shown: begin with an empty cache"
            )
        if self._mask is not None:
            self.key_mask = F.pad(self._mask, (0, max(0, n - self._prompt)), value=True)[:, :n]
        return key[:, :, :n]

    @torch.no_grad()
    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Any:
        """Keep one layer's slice of the queries that predict tokens; k is as `show` gives it."""
        n = self._tokens[layer] = k.shape[2]
        first = max(n - q.shape[2], self._prompt - 1)
        if first >= n:
            return
        rows = torch.arange(first, n, dtype=torch.int32, device=q.device).expand(len(q), -1)
        how: dict[str, Any] = {"key_mask": self.key_mask, "heads": self._heads, "impl": self._impl}
        self._slices[layer].append(attention_slice(q, k, rows, self._cols, causal=causal, scale=scale, **how))

    @property
    def slices(self) -> Mapping[int, Tensor]:
        """Slice of every chosen layer, (B,N,V) fp32 for N tokens, or (B,Hq,N,V) for heads="each".

        A sequence that ended earlier has rows of what was written after its end. Raises ValueError naming the layers that no
        forward pass has recorded.
        """
        require_all(self.layers, [layer for layer, found in self._slices.items() if found])
        return {layer: torch.cat(self._slices[layer], -2) for layer in sorted(self.layers)}
