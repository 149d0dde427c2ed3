"""GPT-2 (Radford et al. 2019): learned positions, attention then MLP.

Inner sites as GPT-NeoX's. `embed` is the token embedding; resid_pre.0 has the position's embedding added.
"""

from transformers import GPT2Config

from universality.models.attention import attach_attention, attention_sites, use_tapped_attention
from universality.models.families.base import Family, Parts
from universality.models.settings import TrainedModel


def _configure(model: TrainedModel, vocab_size: int, context: int, end_of_text: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        n_embd=model.d_model,
        n_layer=model.n_layers,
        n_head=model.n_heads,
        n_positions=context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )


def _attach(block, layer, taps):
    attach_attention(block.attn, layer, taps)
    block.mlp.act.register_forward_hook(lambda module, args, out: taps(f"mlp.{layer}.post", out))


def _forward(block, hidden, taps, layer, arguments):
    attention = {key: arguments.get(key) for key in ("attention_mask", "position_ids")}
    mid = taps(f"resid_mid.{layer}", hidden + taps(f"attn.{layer}.out", _attend(block, hidden, attention)))
    return mid + taps(f"mlp.{layer}.out", _mlp(block, mid))


def _attend(block, hidden, arguments):
    return block.attn(block.ln_1(hidden), **arguments)[0]


def _mlp(block, x):
    return block.mlp(block.ln_2(x))


def _sites(config, layer):
    d_mlp = config.n_inner if config.n_inner is not None else 4 * config.hidden_size
    mlp = {f"mlp.{layer}.post": ("B", "L", d_mlp), f"mlp.{layer}.out": ("B", "L", config.hidden_size)}
    return attention_sites(layer, config) | mlp


GPT2 = Family(
    name="gpt2",
    configure=_configure,
    stack="transformer",
    blocks="h",
    embedding="wte",
    final_norm="ln_f",
    forward=_forward,
    prepare=use_tapped_attention,
    attach=_attach,
    sites=_sites,
    mixers=("attn.z",),
    parts=Parts(
        attention=lambda block: block.attn, W_O=lambda block: block.attn.c_proj.weight, attend=_attend, mlp=_mlp
    ),
    max_positions=lambda config: config.n_positions,
)
