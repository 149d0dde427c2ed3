"""Attention and MLP of single blocks, run on residual streams at hand, for models whose blocks are these two.

A stream may be that of the last positions only: attention then takes the keys and values of those before as given.
All is transformers' own modules, as in a run of the whole model; only that the positions before are not run again.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from universality.models.families.base import Parts
from universality.models.language_model import LanguageModel

_TOKENS = 4096
"""Tokens that an MLP is run on at once; its inner values are to stay small."""


class Before(NamedTuple):
    """Keys and values of the positions before those that are run [B, P, H_kv, d_head].

    Attention modules take it for transformers' cache.
    """

    k: torch.Tensor
    v: torch.Tensor

    def update(self, k: torch.Tensor, v: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values [B, H_kv, P + L, d_head] from those of the positions that are run."""
        return torch.cat([self.k.transpose(1, 2), k], 2), torch.cat([self.v.transpose(1, 2), v], 2)


class BlockParts:
    def __init__(self, model: LanguageModel, parts: Parts):
        self.model, self._parts = model, parts

    def parallel(self, layer: int) -> bool:
        """Does the MLP read resid_pre rather than resid_mid?"""
        return self._parts.parallel(self.model.blocks[layer])

    def attend(
        self, layer: int, resid: torch.Tensor, before: Before, capture: Iterable[str] = ()
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """attn.L.out [B, L, D] of resid_pre [B, L, D], and what was captured: site -> value; k and v of all positions.

        `capture` are sites of this layer's attention.
        """
        start, length = before.k.shape[1], before.k.shape[1] + resid.shape[1]
        arguments = {"attention_mask": causal_mask(start, length, resid.device), self._parts.past: before}
        stack, taps = self.model.hf.get_submodule(self.model.family.stack), self.model._taps
        if hasattr(stack, "rotary_emb"):
            places = torch.arange(start, length, device=resid.device)[None]
            arguments["position_embeddings"] = stack.rotary_emb(resid, position_ids=places)
        taps.set(capture, {}, length)
        try:
            return self._parts.attend(self.model.blocks[layer], resid, arguments), taps.captured
        finally:
            taps.reset()

    def mlp(self, layer: int, pre: torch.Tensor, mid: torch.Tensor) -> torch.Tensor:
        """mlp.L.out [..., D] of resid_pre and resid_mid [..., D], whichever of them it reads."""
        x = pre if self.parallel(layer) else mid
        written = [self._parts.mlp(self.model.blocks[layer], part) for part in x.flatten(0, -2).split(_TOKENS)]
        return torch.cat(written).view(x.shape)

    def written(self, layer: int, z: torch.Tensor, first: int = 0) -> torch.Tensor:
        """What each of the heads first, first + 1, ... adds to attn.L.out [h, ..., D] for its z [..., h, d_head]."""
        n_heads, d_head = z.shape[-2:]
        W_O = self._parts.W_O(self.model.blocks[layer]).unflatten(0, (-1, d_head))[first : first + n_heads]
        return torch.stack([(z[..., h, :].to(W_O.dtype) @ W_O[h]).to(z.dtype) for h in range(n_heads)])

    def mix(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """z [B, L, h, d_head] of queries [B, L, h, d_head] of the last L positions and k, v [B, P + L, h, d_head]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = causal_mask(k.shape[2] - q.shape[2], k.shape[2], q.device)
        scale = self._parts.attention(self.model.blocks[layer]).scaling
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale).transpose(1, 2)


def causal_mask(start: int, stop: int, device: torch.device) -> torch.Tensor | None:
    """[1, 1, stop - start, stop], true where positions from `start` on may look; None if plain causality says it."""
    if start in (0, stop - 1):
        return None
    places = torch.arange(stop, device=device)
    return (places[None, :] <= places[start:, None])[None, None]
