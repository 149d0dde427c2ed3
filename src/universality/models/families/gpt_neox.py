"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745; Pythia): attention and MLP in parallel on one residual stream.

Inner sites of layer L, shapes after [B, L]:
    attn.L.qkv   [H, 3 * d_head]   projections of each head, before the rotation
    attn.L.z     [H, d_head]       each head's mixed values, before the output projection
    mlp.L.post   [d_mlp]           after the nonlinearity
"""

import torch
from torch import nn
from transformers import GPTNeoXConfig

from universality.models.families.base import Family
from universality.models.settings import TrainedModel
from universality.models.taps import Taps


def _configure(model: TrainedModel, vocab_size: int, context: int, end_of_text: int) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        intermediate_size=4 * model.d_model,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        tie_word_embeddings=False,
    )


def _attach(model: nn.Module, taps: Taps) -> None:
    n_heads = model.config.num_attention_heads
    for index, block in enumerate(model.gpt_neox.layers):
        _hook_heads(block, index, n_heads, taps)
        block.mlp.act.register_forward_hook(lambda module, args, out, site=f"mlp.{index}.post": taps(site, out))


def _hook_heads(block: nn.Module, index: int, n_heads: int, taps: Taps) -> None:
    def by_head(value: torch.Tensor, site: str) -> torch.Tensor:
        return taps(site, value.unflatten(-1, (n_heads, -1))).flatten(-2)

    block.attention.query_key_value.register_forward_hook(lambda module, args, out: by_head(out, f"attn.{index}.qkv"))
    block.attention.dense.register_forward_pre_hook(lambda module, args: (by_head(args[0], f"attn.{index}.z"),))


def _sites(config: GPTNeoXConfig) -> dict[str, tuple[int, ...]]:
    heads, d_head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    sites: dict[str, tuple[int, ...]] = {}
    for index in range(config.num_hidden_layers):
        sites[f"attn.{index}.qkv"] = (heads, 3 * d_head)
        sites[f"attn.{index}.z"] = (heads, d_head)
        sites[f"mlp.{index}.post"] = (config.intermediate_size,)
    return sites


GPT_NEOX = Family(
    name="gpt_neox",
    configure=_configure,
    blocks=lambda model: model.gpt_neox.layers,
    attach=_attach,
    sites=_sites,
    neuron_sites=lambda layer: (f"mlp.{layer}.post",),
)
