"""Llama-style models (Touvron et al. 2023, arXiv 2302.13971): rotary attention with grouped keys, gated MLP, RMSNorm.

Inner sites as GPT-NeoX's; mlp.L.post [d_mlp] is act(gate) * up, what the down projection reads.
"""

from transformers import LlamaConfig

from universality.models.attention import attach_attention, attention_sites, use_tapped_attention
from universality.models.families.base import Family, Parts
from universality.models.settings import TrainedModel


def _configure(model: TrainedModel, vocab_size: int, context: int, end_of_text: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads or model.n_heads,
        intermediate_size=4 * model.d_model,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=None,
        tie_word_embeddings=False,
    )


def _attach(block, layer, taps):
    attach_attention(block.self_attn, layer, taps)
    block.mlp.down_proj.register_forward_pre_hook(lambda module, args: (taps(f"mlp.{layer}.post", args[0]),))


def _forward(block, hidden, taps, layer, arguments):
    mid = taps(f"resid_mid.{layer}", hidden + taps(f"attn.{layer}.out", _attend(block, hidden, arguments)))
    return mid + taps(f"mlp.{layer}.out", _mlp(block, mid))


def _attend(block, hidden, arguments):
    return block.self_attn(block.input_layernorm(hidden), **arguments)[0]


def _mlp(block, x):
    return block.mlp(block.post_attention_layernorm(x))


def _sites(config, layer):
    mlp = {
        f"mlp.{layer}.post": ("B", "L", config.intermediate_size),
        f"mlp.{layer}.out": ("B", "L", config.hidden_size),
    }
    return attention_sites(layer, config) | mlp


LLAMA = Family(
    name="llama",
    configure=_configure,
    stack="model",
    blocks="layers",
    embedding="embed_tokens",
    final_norm="norm",
    forward=_forward,
    prepare=use_tapped_attention,
    attach=_attach,
    sites=_sites,
    mixers=("attn.z",),
    parts=Parts(
        attention=lambda block: block.self_attn,
        W_O=lambda block: block.self_attn.o_proj.weight.T,
        attend=_attend,
        mlp=_mlp,
    ),
)
