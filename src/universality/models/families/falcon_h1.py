"""Falcon-H1 (Zuo et al. 2025, arXiv 2507.22448): a hybrid whose every block runs attention and Mamba-2 beside each
other on the same input, then an MLP.

Inner sites of layer L: those of attention (see attention.py), those of Mamba-2's mixer (see mamba2.py), mlp.L.post and
mlp.L.out. attn.L.out and mamba.L.out are what each adds to the residual stream, its multiplier applied.
"""

import torch
from transformers import FalconH1Config

from universality.models.attention import attach_attention, attention_sites, use_tapped_attention
from universality.models.families.base import Family
from universality.models.families.mamba import normed
from universality.models.families.mamba2 import head_recurrence, mixer_sites, run_mixer
from universality.models.precision import project
from universality.models.settings import TrainedModel


def _configure(model: TrainedModel, vocab_size: int, context: int, end_of_text: int) -> FalconH1Config:
    return FalconH1Config(
        vocab_size=vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads or model.n_heads,
        head_dim=model.d_model // model.n_heads,
        intermediate_size=2 * model.d_model,
        max_position_embeddings=context,
        mamba_d_ssm=2 * model.d_model,
        mamba_n_heads=model.n_heads,
        mamba_d_head=2 * model.d_model // model.n_heads,
        mamba_n_groups=1,
        mamba_d_state=model.d_state,
        mamba_d_conv=4,
        mamba_chunk_size=64,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=None,
        tie_word_embeddings=False,
        use_cache=False,
    )


def _attach(block, layer, taps):
    attach_attention(block.self_attn, layer, taps)
    block.feed_forward.down_proj.register_forward_pre_hook(lambda module, args: (taps(f"mlp.{layer}.post", args[0]),))


def _forward(block, hidden, taps, layer, arguments):
    arguments.pop("mamba_attention_mask", None)
    x = block.input_layernorm(hidden)
    mixed = _mamba(block.mamba, x, taps, f"mamba.{layer}") * block.ssm_out_multiplier
    mixed = taps(f"mamba.{layer}.out", mixed)
    attended = block.self_attn(hidden_states=x * block.attention_in_multiplier, **arguments)[0]
    attended = taps(f"attn.{layer}.out", attended * block.attn_out_multiplier)
    mid = taps(f"resid_mid.{layer}", hidden + (mixed + attended))
    return mid + taps(f"mlp.{layer}.out", block.feed_forward(block.pre_ff_layernorm(mid)))


def _mamba(mixer, x, taps, name):
    projected = project(mixer.in_proj, x * mixer.ssm_in_multiplier).float() * mixer.mup_vector
    if not mixer.mamba_rms_norm:
        gated = run_mixer(mixer, projected, taps, name)
    elif not mixer.norm.norm_before_gate:
        gated = _group_norm(mixer.norm, run_mixer(mixer, projected, taps, name))
    else:
        gated = run_mixer(mixer, projected, taps, name, lambda y, gate: _group_norm(mixer.norm, y) * gate, fused=False)
    return project(mixer.out_proj, gated).to(x.dtype)


def _group_norm(norm, y):
    return normed(norm, y, torch.float32, y.shape[-1] // norm.n_groups)


def _sites(config, layer):
    c = config
    sizes = (c.hidden_size, c.mamba_n_heads, c.mamba_d_head, c.mamba_n_groups, c.mamba_d_state, c.mamba_d_conv)
    mlp = {f"mlp.{layer}.post": ("B", "L", c.intermediate_size), f"mlp.{layer}.out": ("B", "L", c.hidden_size)}
    return attention_sites(layer, c) | mixer_sites(f"mamba.{layer}", *sizes) | mlp


FALCON_H1 = Family(
    name="falcon_h1",
    configure=_configure,
    stack="model",
    blocks="layers",
    embedding="embed_tokens",
    final_norm="final_layernorm",
    forward=_forward,
    prepare=use_tapped_attention,
    attach=_attach,
    sites=_sites,
    mixers=("attn.z", "mamba.out"),
    output=lambda hidden: (hidden,),
    logit_scale=lambda config: config.lm_head_multiplier,
    recurrence=lambda block, layer, captured: head_recurrence(block.mamba, layer, captured),
)
