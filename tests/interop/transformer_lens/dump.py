"""Write what transformer-lens' bridge sees in models: python dump.py FOLDER...

A folder has model/, a checkpoint in transformers' format (config.json, safetensors weights; no tokenizer), and
tokens.safetensors with `tokens` [B, L]. Written to it is sites.safetensors: `logits` and one tensor for each site,
in the shape and under the name that the project gives it. It imports nothing of the project, and runs in the
environment of requirements.lock.

A site is a hook of the bridge where it has one with that meaning. The others (q and k of GPT-NeoX after the rotation,
y of Mamba, and delta, B, C of both) are put together from its hooks by its own formulas, and `agree` holds the
result against a further hook.

The mixers of Mamba are run with `eager_scan`, transformer-lens' own recurrence: transformers' mixer calls neither
`conv1d` nor `dt_proj` as a module, so that without it the hooks there never fire and no state can be had.
Falcon-H1's mixers are left out: `eager_scan` lacks that model's multipliers.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoModelForCausalLM

# Hooks of block L that are sites as they are; a family has some of these.
HOOKS = {
    "hook_resid_pre": "resid_pre.L",
    "hook_resid_mid": "resid_mid.L",
    "hook_resid_post": "resid_post.L",
    "mlp.hook_post": "mlp.L.post",  # what the last projection of the MLP reads: gated, where it has a gate
    "channel_mix.hook_post": "mlp.L.post",
}


def agree(what: str, made: torch.Tensor, hooked: torch.Tensor) -> None:
    """Stop unless a value made from hooks is the one that the bridge went on with."""
    torch.testing.assert_close(made, hooked, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


def attention(bridge, cache, layer: int) -> dict[str, torch.Tensor]:
    """q [B, L, H, d] and k [B, L, H_kv, d] as they meet: after the rotation, where there is one."""
    name = f"blocks.{layer}.attn"
    q, k, v = (cache[f"{name}.hook_{part}"] for part in "qkv")
    if f"{name}.hook_rot_q" in cache:
        q, k = cache[f"{name}.hook_rot_q"], cache[f"{name}.hook_rot_k"]
    elif f"{name}.hook_cos" in cache:  # a fused projection: the hooks after the rotation exist but never fire
        rotate = bridge.blocks[layer].attn._apply_rotary_pos_emb
        cos, sin = cache[f"{name}.hook_cos"], cache[f"{name}.hook_sin"]
        q, k = (x.transpose(1, 2) for x in rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin))
    shared = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, shared) * q.shape[-1] ** -0.5
    agree(f"{name} q, k", scores.tril(), cache[f"{name}.hook_attn_scores"].tril())
    sites = {"q": q, "k": k, "v": v, "pattern": cache[f"{name}.hook_pattern"], "z": cache[f"{name}.hook_z"]}
    return {f"attn.{layer}.{site}": value for site, value in sites.items()}


def mamba(bridge, cache, layer: int) -> dict[str, torch.Tensor]:
    """y is C h + D u, the gate not yet applied; gate is silu(z)."""
    name, mixer = f"blocks.{layer}.mixer", bridge.blocks[layer].mixer
    terms = mixer._s6_terms(cache, layer)
    u = cache[f"{name}.x_proj.hook_in"]
    gate = F.silu(cache[f"{name}.in_proj.hook_out"].chunk(2, dim=-1)[1])
    reach = mixer.compute_effective_attention(cache, layer, include_dt_scaling=True)
    y = torch.einsum("beij,bje->bie", reach, u) + mixer.D * u
    agree(f"{name} y, gate", y * gate, cache[f"{name}.out_proj.hook_in"])
    state = cache[f"{name}.hook_ssm_state"]
    agree(f"{name} state", mixer.compute_ssm_state(cache, layer), state)
    return {
        f"mamba.{layer}.conv_in": cache[f"{name}.conv1d.hook_in"].transpose(1, 2),
        f"mamba.{layer}.ssm_in": u,
        f"mamba.{layer}.delta": terms.dt.transpose(1, 2),
        f"mamba.{layer}.B": terms.B,
        f"mamba.{layer}.C": terms.C,
        f"mamba.{layer}.state": state.transpose(1, 2),
        f"mamba.{layer}.y": y,
        f"mamba.{layer}.gate": gate,
    }


def mamba2(bridge, cache, layer: int) -> dict[str, torch.Tensor]:
    """y is C h + D u, neither gated nor normalised yet; gate is silu(z). B and C stand once for each group of heads."""
    name, mixer = f"blocks.{layer}.mixer", bridge.blocks[layer].mixer
    terms = mixer._ssd_terms(cache, layer)
    y = cache[f"{name}.inner_norm.hook_in"].unflatten(-1, (mixer.num_heads, mixer.head_dim))
    state = cache[f"{name}.hook_ssm_state"]
    agree(f"{name} state", mixer.compute_ssm_state(cache, layer).transpose(1, 2), state)
    agree(f"{name} C, y", torch.einsum("blhpn,blhn->blhp", state, terms.C) + mixer.D[:, None] * terms.x, y)
    heads_per_group = mixer.num_heads // mixer.n_groups
    return {
        f"mamba.{layer}.conv_in": cache[f"{name}.conv1d.hook_in"].transpose(1, 2),
        f"mamba.{layer}.ssm_in": terms.x,
        f"mamba.{layer}.delta": terms.dt,
        f"mamba.{layer}.B": terms.B[:, :, ::heads_per_group],
        f"mamba.{layer}.C": terms.C[:, :, ::heads_per_group],
        f"mamba.{layer}.state": state,
        f"mamba.{layer}.y": y,
        f"mamba.{layer}.gate": F.silu(cache[f"{name}.inner_norm.hook_gate"]),
    }


MIXERS = {"mamba": mamba, "mamba2": mamba2}


def dump(checkpoint: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and every site of the model that the bridge knows."""
    hf = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    hf.config.use_cache = False  # with a cache, `eager_scan` is passed over
    family = hf.config.model_type
    bridge = build_bridge_from_module(hf, hf.config.architectures[0], hf_config=hf.config)
    if family in MIXERS:
        for block in bridge.blocks:
            block.mixer.eager_scan = True
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens)
        values = {"logits": logits, "embed": cache["hook_embed"]}
        for layer in range(len(bridge.blocks)):
            for hook, site in HOOKS.items():
                if f"blocks.{layer}.{hook}" in cache:
                    values[site.replace("L", str(layer))] = cache[f"blocks.{layer}.{hook}"]
            if f"blocks.{layer}.attn.hook_q" in cache:
                values |= attention(bridge, cache, layer)
            if family in MIXERS:
                values |= MIXERS[family](bridge, cache, layer)
    return values


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        values = dump(folder / "model", load_file(folder / "tokens.safetensors")["tokens"])
        found = {site: value.detach().clone().contiguous() for site, value in values.items()}
        save_file(found, folder / "sites.safetensors")


if __name__ == "__main__":
    main()
