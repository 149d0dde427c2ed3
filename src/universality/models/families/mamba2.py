"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060), its mixer run by our own forward over transformers' weights.

Inner sites of layer L, shapes after [B, L]; H heads of width P, G groups, N the state size, E = H * P:
    mamba.L.conv_in    [E + 2GN]     input of the short convolution: what becomes u, B and C
    mamba.L.conv_taps  [K, E + 2GN]  what each of its taps adds
    mamba.L.ssm_in     [H, P]        what the state-space model reads (u)
    mamba.L.delta      [H]           step size after softplus
    mamba.L.B, .C      [G, N]        input and output projections of the state
    mamba.L.skip       [H, P]        D * u, which goes past the state
    mamba.L.y          [H, P]        output of the state-space model with its skip, before gate and norm
    mamba.L.gate       [E]           silu(z)
    mamba.L.out        [D]           what the mixer adds to the residual stream
and mamba.L.state@P [B, H, P, N], mamba.L.writes@P (see recurrences.py). resid_mid is resid_post: there is no MLP.
"""

import torch
import torch.nn.functional as F
from transformers import Mamba2Config

from universality.kernels.causal_conv import causal_conv_silu_of
from universality.kernels.head_scan import gated_head_scan
from universality.models.families.base import Family
from universality.models.families.mamba import (
    conv_bias,
    conv_with_taps,
    inner_wanted,
    normed,
    with_skip_tapped,
    without_gradients,
)
from universality.models.precision import project
from universality.models.recurrences import HeadRecurrence, scan_with_taps
from universality.models.settings import TrainedModel


def _configure(model: TrainedModel, vocab_size: int, context: int, end_of_text: int) -> Mamba2Config:
    return Mamba2Config(
        vocab_size=vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        state_size=model.d_state,
        expand=2,
        num_heads=model.n_heads,
        head_dim=2 * model.d_model // model.n_heads,
        n_groups=1,
        conv_kernel=4,
        chunk_size=64,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        use_cache=False,
    )


def _forward(block, hidden, taps, layer, arguments):
    mixer, name, dtype = block.mixer, f"mamba.{layer}", block.mixer.in_proj.weight.dtype
    y = run_mixer(mixer, project(mixer.in_proj, normed(block.norm, hidden, dtype)), taps, name)
    written = project(mixer.out_proj, normed(mixer.norm, y, dtype, mixer.norm.group_size)).to(hidden.dtype)
    return taps(f"resid_mid.{layer}", hidden + taps(f"{name}.out", written))


def run_mixer(mixer, projected, taps, name, gate=lambda y, gate: y * gate, fused=True):
    """From the input projection [B, L, 2E + 2GN + H] to y * gate, or what `gate` makes of the two: [B, L, E].

    `fused`: y * gate may be computed without naming anything in between, if nothing in between is wanted.
    """
    if fused and without_gradients(projected, *mixer.parameters()) and not inner_wanted(taps, name):
        return run_fused(mixer, projected)[0]
    y, silu_z = _tapped(mixer, projected, taps, name)
    return gate(y, silu_z)


def run_fused(mixer, projected, conv_before=None, state=None, out=None, cu_seqlens=None):
    """(y * gate [B, L, E], last state [B, H, P, N]) from the input projection, with nothing in between named or kept.

    What came before may be given: the convolution's last inputs [B, K - 1, E + 2GN] and the state [B, H, P, N]; and
    `out`, where the first goes. With `cu_seqlens` the positions of all sequences are in one row, [R, ...] in place of
    [B, L, ...].
    """
    weight, bias = mixer.conv1d.weight[:, 0], conv_bias(mixer.conv1d)
    mixed = causal_conv_silu_of(projected, mixer.intermediate_size, weight, bias, conv_before, cu_seqlens)
    A, n_state = -torch.exp(mixer.A_log.float()), mixer.ssm_state_size
    return gated_head_scan(
        mixed, projected, mixer.dt_bias, mixer.time_step_limit, A, mixer.D, n_state, state, out, cu_seqlens
    )


def _tapped(mixer, projected, taps, name):
    """The same through the taps: (y, silu(z)), both [B, L, E]."""
    inner, groups, n_state = mixer.intermediate_size, mixer.n_groups, mixer.ssm_state_size
    z, conv_in, step = projected.float().split([inner, mixer.conv_dim, mixer.num_heads], dim=-1)
    mixed = conv_with_taps(taps(f"{name}.conv_in", conv_in), mixer.conv1d, taps, name)
    u, B, C = mixed.split([inner, groups * n_state, groups * n_state], dim=-1)
    u = taps(f"{name}.ssm_in", u.unflatten(-1, (mixer.num_heads, mixer.head_dim)))
    B, C = (taps(f"{name}.{site}", x.unflatten(-1, (groups, n_state))) for site, x in (("B", B), ("C", C)))
    delta = F.softplus(step + mixer.dt_bias).clamp(*mixer.time_step_limit)
    delta = taps(f"{name}.delta", delta)
    y = scan_with_taps(HeadRecurrence(u, delta, -torch.exp(mixer.A_log.float()), B, C, mixer.D), name, taps)
    y = taps(f"{name}.y", with_skip_tapped(y, mixer.D[:, None], u, taps, name))
    return y.flatten(-2), taps(f"{name}.gate", F.silu(z))


def head_recurrence(mixer, layer: int, captured: dict[str, torch.Tensor]) -> HeadRecurrence:
    """The recurrence of a run that captured mamba.L.{ssm_in, delta, B, C}."""
    u, delta, B, C = (captured[f"mamba.{layer}.{site}"] for site in ("ssm_in", "delta", "B", "C"))
    return HeadRecurrence(u, delta, -torch.exp(mixer.A_log.float()), B, C, mixer.D)


def mixer_sites(name, d_model, heads, d_head, groups, n_state, kernel):
    """Sites of one mixer, named `name`."""
    inner = heads * d_head
    conv = inner + 2 * groups * n_state
    return {
        f"{name}.conv_in": ("B", "L", conv),
        f"{name}.conv_taps": ("B", "L", kernel, conv),
        f"{name}.ssm_in": ("B", "L", heads, d_head),
        f"{name}.delta": ("B", "L", heads),
        f"{name}.B": ("B", "L", groups, n_state),
        f"{name}.C": ("B", "L", groups, n_state),
        f"{name}.state@P": ("B", heads, d_head, n_state),
        f"{name}.writes@P": ("B", "P", heads, d_head, n_state),
        f"{name}.skip": ("B", "L", heads, d_head),
        f"{name}.y": ("B", "L", heads, d_head),
        f"{name}.gate": ("B", "L", inner),
        f"{name}.out": ("B", "L", d_model),
    }


def _sites(config, layer):
    c = config
    sizes = (c.hidden_size, c.num_heads, c.head_dim, c.n_groups, c.state_size, c.conv_kernel)
    return mixer_sites(f"mamba.{layer}", *sizes)


MAMBA2 = Family(
    name="mamba2",
    configure=_configure,
    stack="backbone",
    blocks="layers",
    embedding="embeddings",
    final_norm="norm_f",
    forward=_forward,
    sites=_sites,
    mixers=("mamba.out",),
    recurrence=lambda block, layer, captured: head_recurrence(block.mixer, layer, captured),
)
