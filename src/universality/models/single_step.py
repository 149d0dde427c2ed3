"""The mixers of Mamba and Mamba-2 a few positions at a time: all that they take in from before is handed over.

That is the convolution's last inputs and the state, the same for all variants of a sequence. So a change that reaches
one position only costs one position of every later layer: shapes begin with [P, S], P variants of S sequences. Without
gradients.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from universality.kernels.selective_step import selective_step
from universality.models.families import mamba, mamba2
from universality.models.families.mamba import conv_bias, normed
from universality.models.language_model import LanguageModel
from universality.models.packed_weights import project_packed
from universality.models.recurrences import Recurrence


class Inputs(NamedTuple):
    """What decides on one position's output, beside the state: shapes after [P, S] as of the sites after [B, L]."""

    u: torch.Tensor
    delta: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    gate: torch.Tensor


class Carried(NamedTuple):
    """What a block hands over from the positions before, contiguous."""

    conv: torch.Tensor
    """The convolution's last inputs [S, K - 1, C]."""
    state_t: torch.Tensor
    """The state [S, *state], its last two axes exchanged: as the kernels lay it out."""


class SingleStep(ABC):
    """One block."""

    def __init__(self, model: LanguageModel, layer: int):
        self.layer = layer
        self.block = model.blocks[layer]
        self.mixer: nn.Module = self.block.mixer  # type: ignore[assignment]
        self.weight, self.bias = self.mixer.conv1d.weight[:, 0], conv_bias(self.mixer.conv1d)  # [C, K], [C]
        self.A = -torch.exp(self.mixer.A_log.float())
        self._family = model.family

    def recurrence(self, u, delta, B, C) -> Recurrence:
        """Of values shaped as their sites, [B, L, ...]."""
        values = {"ssm_in": u, "delta": delta, "B": B, "C": C}
        sites = {f"mamba.{self.layer}.{kind}": value for kind, value in values.items()}
        assert self._family.recurrence is not None
        return self._family.recurrence(self.block, self.layer, sites)

    def earlier(self, conv_before: torch.Tensor) -> torch.Tensor:
        """The convolution's sum without this position [S, C], from its inputs just before it [S, K - 1, C]."""
        return (conv_before * self.weight[:, :-1].T).sum(1) + self.bias

    def run(
        self, projected: torch.Tensor, cu_seqlens: torch.Tensor, gated: torch.Tensor, carried: Carried | None = None
    ) -> Carried:
        """The next positions of S sequences, of each as many as it likes, from what the block takes in there: one
        sequence after the other in rows [R, ...], which begin at `cu_seqlens` [S + 1], the last of it R.

        Their y * gate goes into `gated` [R, E]. What they hand over. Nothing carried: the first positions.
        """
        n_sequences, taps = len(cu_seqlens) - 1, self.weight.shape[1] - 1
        conv_in = self.conv_in(projected)
        before = conv_in.new_zeros(n_sequences, taps, conv_in.shape[1]) if carried is None else carried.conv
        run = self._run_fused if projected.device.type == "cpu" else self._run_plainly
        state = run(projected, cu_seqlens, before, None if carried is None else carried.state_t.mT, gated)
        return Carried(_last(conv_in, cu_seqlens, before), state.mT.contiguous())

    def _run_plainly(self, projected, cu_seqlens, before, state: torch.Tensor | None, gated) -> torch.Tensor:
        """Position by position the inputs of `inputs`, and a scan of them, sequences made up to the longest with steps
        of 0, which leave the state as it is. Returns the last state."""
        lengths = cu_seqlens.diff().to(projected.device)
        position = torch.arange(max(1, int(lengths.max())), device=projected.device)
        real = position < lengths[:, None]  # [S, T]
        padded = projected.new_zeros(*real.shape, projected.shape[1])
        padded[real] = projected
        conv_in = torch.cat([before, self.conv_in(padded)], 1)
        windows = conv_in.unfold(1, self.weight.shape[1], 1)[..., :-1]  # [S, T, C, K - 1]
        earlier = torch.einsum("stck,ck->stc", windows, self.weight[:, :-1]) + self.bias
        u, delta, B, C, gate = self.inputs(padded, earlier)
        y, state = self.recurrence(u, delta * real[..., None], B, C).scan(0, len(position), state)
        gated.copy_((y.flatten(2) * gate)[real])
        return state

    @abstractmethod
    def _run_fused(self, projected, cu_seqlens, before, state: torch.Tensor | None, gated) -> torch.Tensor:
        """The same by the kernels, on the CPU."""

    def after(self, inputs: Inputs, before: torch.Tensor) -> torch.Tensor:
        """The state after this position [P, S, *state], from that before it [S, *state]."""
        one = self._flat(inputs)
        shrunk, written = (x[:, 0].unflatten(0, inputs.u.shape[:2]) for x in (one.shrink(one.delta), one.write()))
        return shrunk * before + written

    def read(self, inputs: Inputs, state: torch.Tensor) -> torch.Tensor:
        """y [P, S, *y] where the state after this position is `state` [P, S, *state]; one variant of either may be left
        to stand for all."""
        variants = max(len(inputs.u), len(state))
        inputs = Inputs(*(x.expand(variants, *x.shape[1:]) for x in inputs))
        state = state.expand(variants, *state.shape[1:])
        return self._flat(inputs).read(state.flatten(0, 1), 0).unflatten(0, state.shape[:2])

    def skip(self, u: torch.Tensor) -> torch.Tensor:
        """D * u, shaped as u."""
        D = self.mixer.D
        return D.reshape(*D.shape, *[1] * (u.ndim - 2 - D.ndim)) * u

    def _flat(self, inputs: Inputs) -> Recurrence:
        """Variants and sequences together as the sequences of one position."""
        return self.recurrence(*(x.flatten(0, 1)[:, None] for x in inputs[:4]))

    def projected(self, hidden: torch.Tensor) -> torch.Tensor:
        """All that the block takes from the residual stream before it [..., D]."""
        mixer = self.mixer
        return project_packed(mixer.in_proj, normed(self.block.norm, hidden, mixer.in_proj.weight.dtype)).float()

    @abstractmethod
    def conv_in(self, projected: torch.Tensor) -> torch.Tensor:
        """The part of it that goes through the convolution [..., C]."""

    @abstractmethod
    def inputs(self, projected: torch.Tensor, earlier: torch.Tensor) -> Inputs:
        """From what the block takes in at the position [P, S, ...] and `earlier` [S, C]."""

    @abstractmethod
    def selected(self, mixed: torch.Tensor) -> dict[str, torch.Tensor]:
        """What follows from the convolution's output after SiLU [..., C] alone: u, B, C; for Mamba delta too."""

    @abstractmethod
    def output(self, inputs: Inputs, before: torch.Tensor) -> torch.Tensor:
        """y [P, S, *y] from the state before this position [S, *state]: read(after), without P states in memory."""

    @abstractmethod
    def written(self, gated: torch.Tensor) -> torch.Tensor:
        """What the block adds to the residual stream [..., D], from y * gate [..., E]."""

    def finish(self, hidden: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The residual stream after the block, shaped as the one before it, `hidden` [..., D]; y [..., *y]."""
        return hidden + self.written(y.flatten(gate.ndim - 1) * gate).to(hidden.dtype)


class SelectiveStep(SingleStep):
    """Mamba."""

    def conv_in(self, projected):
        return projected.chunk(2, dim=-1)[0]

    def inputs(self, projected, earlier):
        conv_in, z = projected.chunk(2, dim=-1)
        selected = self.selected(F.silu(torch.addcmul(earlier, conv_in, self.weight[:, -1])))
        return Inputs(**selected, gate=F.silu(z))

    def selected(self, mixed):
        rank, n_state = self.mixer.time_step_rank, self.mixer.ssm_state_size
        step, B, C = project_packed(self.mixer.x_proj, mixed).float().split([rank, n_state, n_state], dim=-1)
        return {"u": mixed, "delta": F.softplus(self.mixer.dt_proj(step)), "B": B, "C": C}

    def output(self, inputs, before):
        u, delta, B, C, _ = inputs
        return selective_step(u, delta, self.A, B, C, self.mixer.D, before)

    def written(self, gated):
        return project_packed(self.mixer.out_proj, gated)

    def _run_fused(self, projected, cu_seqlens, before, state, gated):
        return mamba.run_fused(self.mixer, projected, before, state, gated, cu_seqlens)[1]


class HeadStep(SingleStep):
    """Mamba-2."""

    def conv_in(self, projected):
        return projected[..., self.mixer.intermediate_size :][..., : self.mixer.conv_dim]

    def inputs(self, projected, earlier):
        mixer = self.mixer
        z, conv_in, step = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
        selected = self.selected(F.silu(torch.addcmul(earlier, conv_in, self.weight[:, -1])))
        delta = F.softplus(step + mixer.dt_bias).clamp(*mixer.time_step_limit)
        return Inputs(**selected, delta=delta, gate=F.silu(z))

    def selected(self, mixed):
        mixer = self.mixer
        groups, n_state = mixer.n_groups, mixer.ssm_state_size
        u, B, C = mixed.split([mixer.intermediate_size, groups * n_state, groups * n_state], dim=-1)
        B, C = (x.unflatten(-1, (groups, n_state)) for x in (B, C))
        return {"u": u.unflatten(-1, (mixer.num_heads, mixer.head_dim)), "B": B, "C": C}

    def output(self, inputs, before):
        u, delta, B, C, _ = inputs
        per_group = u.shape[2] // C.shape[2]
        kept = torch.exp(delta * self.A)[..., None]
        from_before = torch.einsum("shdn,pshn->pshd", before, C.repeat_interleave(per_group, 2))
        overlap = (B * C).sum(-1).repeat_interleave(per_group, 2)
        return kept * from_before + (delta * overlap)[..., None] * u + self.skip(u)

    def written(self, gated):
        mixer = self.mixer
        return project_packed(
            mixer.out_proj, normed(mixer.norm, gated, mixer.out_proj.weight.dtype, mixer.norm.group_size)
        )

    def _run_fused(self, projected, cu_seqlens, before, state, gated):
        return mamba2.run_fused(self.mixer, projected, before, state, gated, cu_seqlens)[1]


def _last(rows: torch.Tensor, cu_seqlens: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The last K of each sequence [S, K, C], of rows [R, C] and, where they are fewer, of those `before` [S, K, C]."""
    n_sequences, count = before.shape[:2]
    at = cu_seqlens[1:, None] + torch.arange(-count, 0)  # [S, K]
    own = at - cu_seqlens[:-1, None]  # below 0: before the sequence's rows, -1 the last of them
    found = before[torch.arange(n_sequences)[:, None], own.clamp(max=-1) + count]
    found[own >= 0] = rows[at[own >= 0]]
    return found


STEPS: dict[str, type[SingleStep]] = {"mamba": SelectiveStep, "mamba2": HeadStep}
"""By family; of these, one position takes in nothing from before it but through the mixer."""
