"""Mamba (Gu & Dao 2023, arXiv 2312.00752), its mixer run through the fused kernels.

Inner sites of layer L, shapes after [B, L]; E is the inner width, N the state size:
    mamba.L.conv_in      [E]       input of the short convolution
    mamba.L.ssm_in       [E]       its output after SiLU: what the state-space model reads (u)
    mamba.L.delta        [E]       step size after softplus
    mamba.L.B, .C        [N]       input and output projections of the state
    mamba.L.y            [E]       output of the state-space model with its skip D * u, before the gate
    mamba.L.gate         [E]       silu(z)
    mamba.L.out          [D]       what the block adds to the residual stream
and, without a position:
    mamba.L.last_state   [E, N]    the state that the last position reads; an edit changes y there
"""

import types

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MambaConfig

from universality.models.causal_conv import causal_conv_silu
from universality.models.families.base import Family
from universality.models.selective_scan import selective_scan
from universality.models.settings import TrainedModel
from universality.models.taps import Taps


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


def mixer_forward(mixer: nn.Module, hidden: torch.Tensor, taps: Taps, index: int) -> torch.Tensor:
    """transformers' MambaMixer.forward over a whole sequence [B, L, D] without a cache, with taps."""
    rank, n_state = mixer.time_step_rank, mixer.ssm_state_size
    name = f"mamba.{index}"
    conv_in, z = mixer.in_proj(hidden).chunk(2, dim=-1)
    conv_in = taps(f"{name}.conv_in", conv_in)
    bias = mixer.conv1d.bias if mixer.use_conv_bias else conv_in.new_zeros(conv_in.shape[-1])
    u = taps(f"{name}.ssm_in", causal_conv_silu(conv_in, mixer.conv1d.weight.squeeze(1), bias))
    step, B, C = mixer.x_proj(u).split([rank, n_state, n_state], dim=-1)
    delta = taps(f"{name}.delta", F.softplus(mixer.dt_proj(step)))
    B, C = taps(f"{name}.B", B), taps(f"{name}.C", C)
    y, last_state = selective_scan(u, delta, -torch.exp(mixer.A_log), B, C, mixer.D)
    if taps.wanted(f"{name}.last_state"):
        last_state = taps(f"{name}.last_state", last_state)
        y = torch.cat([y[:, :-1], read_state(last_state, C[:, -1], mixer.D, u[:, -1])[:, None]], dim=1)
    y = taps(f"{name}.y", y)
    return taps(f"{name}.out", mixer.out_proj(y * taps(f"{name}.gate", F.silu(z))))


def read_state(state: torch.Tensor, C: torch.Tensor, D: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """y [B, E] of one position from its state [B, E, N], C [B, N] and input u [B, E]."""
    return torch.einsum("ben,bn->be", state, C) + D * u


def write_at(u: torch.Tensor, delta: torch.Tensor, B: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """What one position of each sequence writes into the state, w_p = (delta_p * u_p) (x) B_p: [B, E, N].

    u, delta [B, L, E]; B [B, L, N]; `position` [B] is each sequence's p.
    """
    rows = torch.arange(len(u))
    return (delta[rows, position] * u[rows, position])[..., None] * B[rows, position][:, None, :]


def decay_after(delta: torch.Tensor, A: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """What is left of a write at `position` [B] in the last state, exp(A * sum_{t > p} delta_t): [B, E, N].

    So the last state is the sum over p of decay_after(p) * write_at(p).
    """
    later = torch.arange(delta.shape[1])[None, :] > position[:, None]
    return torch.exp((delta * later[..., None]).sum(1)[..., None] * A)


def _attach(model: nn.Module, taps: Taps) -> None:
    for index, block in enumerate(model.backbone.layers):

        def forward(self, hidden_states, cache_params=None, attention_mask=None, index=index, **kwargs):
            if cache_params is not None or attention_mask is not None:
                raise ValueError("whole unpadded sequences only: no cache, no attention mask")
            return mixer_forward(self, hidden_states, taps, index)

        block.mixer.forward = types.MethodType(forward, block.mixer)


def _sites(config: MambaConfig) -> dict[str, tuple[int, ...]]:
    inner, n_state = config.intermediate_size, config.state_size
    sites: dict[str, tuple[int, ...]] = {}
    for index in range(config.num_hidden_layers):
        sites |= {f"mamba.{index}.{site}": (inner,) for site in ("conv_in", "ssm_in", "delta", "y", "gate")}
        sites |= {f"mamba.{index}.{site}": (n_state,) for site in ("B", "C")}
        sites[f"mamba.{index}.out"] = (config.hidden_size,)
        sites[f"mamba.{index}.last_state"] = (inner, n_state)
    return sites


MAMBA = Family(
    name="mamba",
    configure=_configure,
    blocks=lambda model: model.backbone.layers,
    attach=_attach,
    sites=_sites,
    neuron_sites=lambda layer: (f"mamba.{layer}.ssm_in", f"mamba.{layer}.gate"),
)
