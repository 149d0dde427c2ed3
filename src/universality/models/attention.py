"""Attention with taps, as an attention implementation that transformers' own attention modules call.

The modules project and rotate; what they then hand to the attention function is tapped here, for every family alike.
Sites of layer L, H query heads, H_kv key and value heads:

    attn.L.q        [B, L, H, d_head]     queries, after the rotary embedding where there is one
    attn.L.k        [B, L, H_kv, d_head]  keys, likewise
    attn.L.v        [B, L, H_kv, d_head]  values
    attn.L.pattern  [B, H, L, L]          softmax of the scores: rows are queries
    attn.L.z        [B, L, H, d_head]     each head's mixed values, before the output projection
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from universality.models.taps import Shape, Taps

NAME = "universality"


def attach_attention(module: nn.Module, layer: int, taps: Taps) -> None:
    """Have a transformers attention module pass its values through the taps."""
    module.universality_taps = (taps, f"attn.{layer}")


def use_tapped_attention(hf: nn.Module) -> None:
    """Have all attention modules of a model call `tapped_attention`."""
    hf.config._attn_implementation = NAME


def attention_sites(layer: int, config: PretrainedConfig) -> dict[str, Shape]:
    """Sites of one attention layer of a transformers config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        f"attn.{layer}.q": ("B", "L", heads, d_head),
        f"attn.{layer}.k": ("B", "L", kv_heads, d_head),
        f"attn.{layer}.v": ("B", "L", kv_heads, d_head),
        f"attn.{layer}.pattern": ("B", heads, "L", "L"),
        f"attn.{layer}.z": ("B", "L", heads, d_head),
        f"attn.{layer}.out": ("B", "L", config.hidden_size),
    }


def tapped_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention interface: q [B, H, L, d], k and v [B, H_kv, L, d] -> (z [B, L, H, d], None)."""
    taps, name = module.universality_taps
    query, key, value = (
        taps(f"{name}.{site}", x.transpose(1, 2)).transpose(1, 2)
        for site, x in (("q", query), ("k", key), ("v", value))
    )
    if taps.wanted(f"{name}.pattern"):
        z = _eager(query, key, value, attention_mask, scaling, dropout, lambda x: taps(f"{name}.pattern", x))
    else:
        z, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return taps(f"{name}.z", z), None


def _eager(query, key, value, mask, scaling, dropout, tap_pattern) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    pattern = tap_pattern(scores.softmax(-1, dtype=torch.float32).to(query.dtype))
    return (F.dropout(pattern, dropout) @ value).transpose(1, 2)


AttentionInterface.register(NAME, tapped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
