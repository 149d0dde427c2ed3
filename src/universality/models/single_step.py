"""The mixers of Mamba and Mamba-2 at one position, for P variants of S sequences at once.

What a position takes in from before it is the same for all variants of a sequence: the inputs of the convolution's
earlier taps and the state. So a change that reaches one position only costs one position of every later layer. Shapes
begin with [P, S]; without gradients.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from universality.errors import StudyError
from universality.kernels.selective_step import selective_step
from universality.models.families.mamba import conv_bias, normed
from universality.models.language_model import LanguageModel
from universality.models.precision import project
from universality.models.recurrences import Recurrence


class Inputs(NamedTuple):
    """What decides on one position's output, beside the state: shapes after [P, S] as of the sites after [B, L]."""

    u: torch.Tensor
    delta: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    gate: torch.Tensor


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
        """The convolution's sum without this position [S, C], from its inputs just before it [S, at most K - 1, C]."""
        taps = self.weight.shape[1] - 1
        return torch.einsum("skc,ck->sc", conv_before, self.weight[:, taps - conv_before.shape[1] : taps]) + self.bias

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
        return project(mixer.in_proj, normed(self.block.norm, hidden, mixer.in_proj.weight.dtype)).float()

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
    def finish(self, hidden: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The residual stream after the block, shaped as the one before it, `hidden` [..., D]."""


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
        step, B, C = project(self.mixer.x_proj, mixed).float().split([rank, n_state, n_state], dim=-1)
        return {"u": mixed, "delta": F.softplus(self.mixer.dt_proj(step)), "B": B, "C": C}

    def output(self, inputs, before):
        u, delta, B, C, _ = inputs
        return selective_step(u, delta, self.A, B, C, self.mixer.D, before)

    def finish(self, hidden, y, gate):
        return hidden + project(self.mixer.out_proj, y * gate).to(hidden.dtype)


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

    def finish(self, hidden, y, gate):
        mixer = self.mixer
        gated = normed(mixer.norm, y.flatten(-2) * gate, mixer.out_proj.weight.dtype, mixer.norm.group_size)
        return hidden + project(mixer.out_proj, gated).to(hidden.dtype)


STEPS: dict[str, type[SingleStep]] = {"mamba": SelectiveStep, "mamba2": HeadStep}
"""By family; of these, one position takes in nothing from before it but through the mixer."""


class LastPositions:
    """What every layer takes in at the last position of a run of `tokens` [S, L], and what it makes of it there."""

    def __init__(self, model: LanguageModel, tokens: torch.Tensor):
        """One pass. Raises StudyError for a family without single steps or for sequences of one token."""
        if model.family.name not in STEPS:
            raise StudyError(f"{model.family.name}: has no single steps; those that have: {', '.join(STEPS)}")
        if tokens.shape[1] < 2:
            raise StudyError("tokens: the last position has none before it; sequences need at least 2 tokens")
        self.steps = [STEPS[model.family.name](model, layer) for layer in range(model.n_layers)]
        # All positions but the last run through the kernels, which leave the state; the last one takes single steps.
        kept: dict[int, torch.Tensor] = {}
        edits = {
            f"resid_pre.{layer}": _keeping(kept, layer, step.weight.shape[1] - 1)
            for layer, step in enumerate(self.steps)
        }
        sites = [f"mamba.{layer}.state@-1" for layer in range(model.n_layers)]
        states = model.run(tokens[:, :-1], capture=sites, edits=edits, logits=False).captured
        self.hidden: list[torch.Tensor] = []
        """The residual stream before each block [S, D]."""
        self.before = [states[site] for site in sites]
        """Each layer's state before the last position [S, *state]."""
        self.earlier: list[torch.Tensor] = []
        """Of each layer's convolution, its sum without the last position [S, C]."""
        self.inputs: list[Inputs] = []
        """Of each layer, with P = 1."""
        self.state: list[torch.Tensor] = []
        """After the last position [1, S, *state]."""
        self.y: list[torch.Tensor] = []
        """[1, S, *y]."""
        hidden = model.hf.get_input_embeddings()(tokens[:, -1].to(model.device))
        for layer, step in enumerate(self.steps):
            projected = step.projected(torch.cat([kept[layer], hidden[:, None]], 1))
            self.hidden.append(hidden)
            self.earlier.append(step.earlier(step.conv_in(projected[:, :-1])))
            self.inputs.append(step.inputs(projected[None, :, -1], self.earlier[layer]))
            self.state.append(step.after(self.inputs[layer], self.before[layer]))
            self.y.append(step.read(self.inputs[layer], self.state[layer]))
            hidden = step.finish(hidden[None], self.y[layer], self.inputs[layer].gate)[0]
        self.final = hidden
        """The residual stream after the last block [S, D]."""

    def step(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Variants of the residual stream before a block -> after it, both [P, S, D]."""
        step = self.steps[layer]
        inputs = step.inputs(step.projected(hidden), self.earlier[layer])
        return step.finish(hidden, step.output(inputs, self.before[layer]), inputs.gate)


def _keeping(kept: dict[int, torch.Tensor], layer: int, last: int):
    """An edit that changes nothing and keeps a copy of the last few positions, so that the whole can be freed."""

    def edit(value: torch.Tensor) -> torch.Tensor:
        kept[layer] = value[:, max(0, value.shape[1] - last) :].clone()
        return value

    return edit
