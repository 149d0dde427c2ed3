"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745; Pythia): attention and MLP beside each other on the residual stream.

Inner sites of layer L: attn.L.{q, k, v, pattern, z} (see attention.py) and, shapes after [B, L],
    attn.L.out   [D]      what attention adds to the residual stream
    mlp.L.post   [d_mlp]  after the nonlinearity
    mlp.L.out    [D]      what the MLP adds
resid_mid is the stream with attention's part added. In a parallel block the MLP does not read it.
"""

from transformers import GPTNeoXConfig

from universality.models.attention import attach_attention, attention_sites, use_tapped_attention
from universality.models.families.base import Family, Parts
from universality.models.settings import TrainedModel


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


def _attach(block, layer, taps):
    attach_attention(block.attention, layer, taps)
    block.mlp.act.register_forward_hook(lambda module, args, out: taps(f"mlp.{layer}.post", out))


def _forward(block, hidden, taps, layer, arguments):
    mid = taps(f"resid_mid.{layer}", hidden + taps(f"attn.{layer}.out", _attend(block, hidden, arguments)))
    written = _mlp(block, hidden if block.use_parallel_residual else mid)
    return mid + taps(f"mlp.{layer}.out", written)


def _attend(block, hidden, arguments):
    return block.post_attention_dropout(block.attention(block.input_layernorm(hidden), **arguments)[0])


def _mlp(block, x):
    return block.post_mlp_dropout(block.mlp(block.post_attention_layernorm(x)))


def _sites(config, layer):
    mlp = {
        f"mlp.{layer}.post": ("B", "L", config.intermediate_size),
        f"mlp.{layer}.out": ("B", "L", config.hidden_size),
    }
    return attention_sites(layer, config) | mlp


GPT_NEOX = Family(
    name="gpt_neox",
    configure=_configure,
    stack="gpt_neox",
    blocks="layers",
    embedding="embed_in",
    final_norm="final_layer_norm",
    forward=_forward,
    prepare=use_tapped_attention,
    attach=_attach,
    sites=_sites,
    mixers=("attn.z",),
    parts=Parts(
        attention=lambda block: block.attention,
        W_O=lambda block: block.attention.dense.weight.T,
        attend=_attend,
        mlp=_mlp,
        parallel=lambda block: block.use_parallel_residual,
        past="layer_past",
    ),
)
