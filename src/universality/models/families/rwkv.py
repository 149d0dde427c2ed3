"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048) as transformers has it: WKV attention and a channel mix, both of which
look one token back.

Inner sites of layer L, shapes after [B, L]; A is the attention width:
    rwkv.L.r, .k, .v   [A]      receptance after its sigmoid, key, value
    rwkv.L.wkv         [A]      the decayed weighted mean of values, before the receptance
    rwkv.L.out         [D]      what time mixing adds to the residual stream
    mlp.L.post         [d_mlp]  squared ReLU of the channel mix's key
    mlp.L.out          [D]      what the channel mix adds

transformers halves the stream every `rescale_every` blocks when it evaluates, which only half precision needs; that is
turned off, so that the stream of all layers has one scale.
"""

import torch
from transformers import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention

from universality.models.families.base import Family
from universality.models.settings import TrainedModel


def _configure(model: TrainedModel, vocab_size: int, context: int, end_of_text: int) -> RwkvConfig:
    return RwkvConfig(
        vocab_size=vocab_size,
        context_length=context,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        rescale_every=0,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
    )


def _keep_scale(hf):
    if hf.rwkv.layers_are_rescaled:  # run before, so its weights are divided: multiply them back
        training = hf.rwkv.training
        hf.rwkv.train()._rescale_layers()
        hf.rwkv.train(training)
    hf.config.rescale_every = 0


def _forward(block, hidden, taps, layer, arguments):
    if layer == 0:
        hidden = block.pre_ln(hidden)
    mixed = _time_mix(block.attention, block.ln1(hidden), taps, layer)
    mid = taps(f"resid_mid.{layer}", hidden + taps(f"rwkv.{layer}.out", mixed))
    return mid + taps(f"mlp.{layer}.out", _channel_mix(block.feed_forward, block.ln2(mid), taps, layer))


def _time_mix(module, x, taps, layer):
    r, k, v, _ = module.extract_key_value(x)
    r, k, v = (taps(f"rwkv.{layer}.{site}", value) for site, value in (("r", r), ("k", k), ("v", v)))
    wkv, _ = rwkv_linear_attention(module.time_decay, module.time_first, k, v)
    return module.output(r * taps(f"rwkv.{layer}.wkv", wkv))


def _channel_mix(module, x, taps, layer):
    before = module.time_shift(x)
    to_key = x * module.time_mix_key + before * (1 - module.time_mix_key)
    to_receptance = x * module.time_mix_receptance + before * (1 - module.time_mix_receptance)
    post = taps(f"mlp.{layer}.post", torch.square(torch.relu(module.key(to_key))))
    return torch.sigmoid(module.receptance(to_receptance)) * module.value(post)


def _sites(config, layer):
    width = config.attention_hidden_size or config.hidden_size
    d_mlp = config.intermediate_size or 4 * config.hidden_size
    sites = {f"rwkv.{layer}.{site}": ("B", "L", width) for site in ("r", "k", "v", "wkv")}
    sites |= {f"{kind}.{layer}.out": ("B", "L", config.hidden_size) for kind in ("rwkv", "mlp")}
    return sites | {f"mlp.{layer}.post": ("B", "L", d_mlp)}


RWKV = Family(
    name="rwkv",
    configure=_configure,
    stack="rwkv",
    blocks="blocks",
    embedding="embeddings",
    final_norm="ln_out",
    forward=_forward,
    prepare=_keep_scale,
    sites=_sites,
    mixers=("rwkv.out", "mlp.out"),
    output=lambda hidden: (hidden, None, None),
)
