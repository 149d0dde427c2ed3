"""Mamba (Gu & Dao 2023, arXiv 2312.00752), its mixer run by our own forward over transformers' weights.

Inner sites of layer L, shapes after [B, L]; E is the inner width, N the state size, K the taps of the convolution:
    mamba.L.conv_in    [E]     input of the short convolution
    mamba.L.conv_taps  [K, E]  what each tap adds; tap K - 1 reads the position itself, tap 0 the one K - 1 before
    mamba.L.ssm_in     [E]     its output after SiLU: what the state-space model reads (u)
    mamba.L.delta      [E]     step size after softplus
    mamba.L.B, .C      [N]     input and output projections of the state
    mamba.L.skip       [E]     D * u, which goes past the state
    mamba.L.y          [E]     output of the state-space model with its skip, before the gate
    mamba.L.gate       [E]     silu(z)
    mamba.L.out        [D]     what the block adds to the residual stream
and mamba.L.state@P [B, E, N], mamba.L.writes@P (see recurrences.py). resid_mid is resid_post: there is no MLP.
"""

import torch
import torch.nn.functional as F
from transformers import MambaConfig

from universality.kernels.causal_conv import causal_conv_silu, causal_conv_silu_of, conv_taps
from universality.kernels.norms import rms_norm
from universality.kernels.selective_scan import gated_scan
from universality.models.families.base import Family
from universality.models.precision import project
from universality.models.recurrences import SelectiveRecurrence, scan_with_taps
from universality.models.settings import TrainedModel
from universality.models.taps import Shape


def _configure(model: TrainedModel, vocab_size: int, context: int, end_of_text: int) -> MambaConfig:
    return MambaConfig(
        vocab_size=vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layers,
        state_size=model.d_state,
        expand=2,
        conv_kernel=4,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        use_cache=False,
    )


def _forward(block, hidden, taps, layer, arguments):
    mixer, name = block.mixer, f"mamba.{layer}"
    xz = project(mixer.in_proj, normed(block.norm, hidden, mixer.in_proj.weight.dtype))
    fused = without_gradients(xz, *mixer.parameters()) and not inner_wanted(taps, name)
    gated = run_fused(mixer, xz)[0] if fused else _tapped(mixer, xz.float(), taps, name)
    written = taps(f"{name}.out", project(mixer.out_proj, gated).to(hidden.dtype))
    return taps(f"resid_mid.{layer}", hidden + written)


def normed(norm, x, dtype, group=0):
    """RMS norm of x over groups of its last axis (0: all of it), as transformers' norms of Mamba's family."""
    if without_gradients(x, norm.weight):
        return rms_norm(x, norm.weight, norm.variance_epsilon, dtype, group)
    grouped = x.unflatten(-1, (-1, group or x.shape[-1]))
    return norm.weight * F.rms_norm(grouped, grouped.shape[-1:], eps=norm.variance_epsilon).flatten(-2)


def without_gradients(*values):
    """May kernels be used that have no backward pass? They are the CPU's."""
    needed = torch.is_grad_enabled() and any(value.requires_grad for value in values)
    return not needed and values[0].device.type == "cpu"


def inner_wanted(taps, name) -> bool:
    """Is anything wanted from within the mixer?"""
    return taps.wanted_below(f"{name}.", except_for=f"{name}.out")


def run_fused(mixer, xz, conv_before=None, state=None, out=None, cu_seqlens=None):
    """(y * gate [B, L, E], last state [B, E, N]) from the input projection, with nothing in between named or kept.

    What came before may be given: the convolution's last inputs [B, K - 1, E] and the state [B, E, N]; and `out`, where
    the first goes. With `cu_seqlens` the positions of all sequences are in one row, [R, ...] in place of [B, L, ...].
    """
    u = causal_conv_silu_of(xz, 0, mixer.conv1d.weight[:, 0], conv_bias(mixer.conv1d), conv_before, cu_seqlens)
    step, B, C = _projections(mixer, u)
    step = F.linear(step, mixer.dt_proj.weight)
    return gated_scan(u, step, mixer.dt_proj.bias, -torch.exp(mixer.A_log), B, C, mixer.D, xz, state, out, cu_seqlens)


def _tapped(mixer, xz, taps, name):
    """The same through the taps, in float32."""
    conv_in, z = xz.chunk(2, dim=-1)
    u = conv_with_taps(taps(f"{name}.conv_in", conv_in), mixer.conv1d, taps, name)
    u = taps(f"{name}.ssm_in", u)
    step, B, C = _projections(mixer, u)
    delta = taps(f"{name}.delta", F.softplus(mixer.dt_proj(step)))
    B, C = taps(f"{name}.B", B), taps(f"{name}.C", C)
    y = scan_with_taps(SelectiveRecurrence(u, delta, -torch.exp(mixer.A_log), B, C, mixer.D), name, taps)
    y = taps(f"{name}.y", with_skip_tapped(y, mixer.D, u, taps, name))
    return y * taps(f"{name}.gate", F.silu(z))


def _projections(mixer, u):
    rank, n_state = mixer.time_step_rank, mixer.ssm_state_size
    return project(mixer.x_proj, u).float().split([rank, n_state, n_state], dim=-1)


def conv_with_taps(conv_in, conv1d, taps, name):
    """silu(conv(x)), through the site of its taps if that is wanted."""
    weight, bias = conv1d.weight[:, 0], conv_bias(conv1d)
    if taps.wanted(f"{name}.conv_taps"):
        return F.silu(taps(f"{name}.conv_taps", conv_taps(conv_in, weight)).sum(2) + bias)
    return causal_conv_silu(conv_in, weight, bias)


def with_skip_tapped(y, D, u, taps, name):
    """y, to which the scan has added the skip D * u, with the skip through its site if that is wanted."""
    if not taps.wanted(f"{name}.skip"):
        return y
    skip = D * u
    return y + (taps(f"{name}.skip", skip) - skip)


def conv_bias(conv1d):
    """Zeros where there is none."""
    return conv1d.bias if conv1d.bias is not None else conv1d.weight.new_zeros(conv1d.weight.shape[0])


def recurrence_of(block, layer: int, captured: dict[str, torch.Tensor]) -> SelectiveRecurrence:
    """The recurrence of a run that captured mamba.L.{ssm_in, delta, B, C}."""
    u, delta, B, C = (captured[f"mamba.{layer}.{site}"] for site in ("ssm_in", "delta", "B", "C"))
    return SelectiveRecurrence(u, delta, -torch.exp(block.mixer.A_log), B, C, block.mixer.D)


def _sites(config, layer):
    inner, n_state, name = config.intermediate_size, config.state_size, f"mamba.{layer}"
    sites: dict[str, Shape] = {
        f"{name}.{site}": ("B", "L", inner) for site in ("conv_in", "ssm_in", "delta", "skip", "y", "gate")
    }
    sites |= {f"{name}.{site}": ("B", "L", n_state) for site in ("B", "C")}
    sites[f"{name}.conv_taps"] = ("B", "L", config.conv_kernel, inner)
    sites[f"{name}.state@P"] = ("B", inner, n_state)
    sites[f"{name}.writes@P"] = ("B", "P", inner, n_state)
    return sites | {f"{name}.out": ("B", "L", config.hidden_size)}


MAMBA = Family(
    name="mamba",
    configure=_configure,
    stack="backbone",
    blocks="layers",
    embedding="embeddings",
    final_norm="norm_f",
    forward=_forward,
    sites=_sites,
    mixers=("mamba.out",),
    float32_products=("dt_proj",),  # small, and what it rounds would go into an exponent
    recurrence=recurrence_of,
)
