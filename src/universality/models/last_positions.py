"""What every layer of a Mamba takes in at the last position, of two runs of the same sequences in less than two passes.

Up to the first token in which the clean and the corrupted prompt differ, both have the same values at every site. So
those positions are run once, and both runs go on from there with what their blocks hand over. Products with weights
take all positions at once, the last ones too; within the mixers, sequences that part at about the same position go
together.
"""

from copy import copy
from typing import NamedTuple

import torch

from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.single_step import STEPS, Carried, Inputs, SingleStep

_TOGETHER = 8
"""Sequences that part within so many positions go together: a kernel called for few costs more than running more."""


class LastPositions:
    """What every layer takes in at the last position of a run of S sequences, and what it makes of it there."""

    def __init__(self, steps: list[SingleStep]):
        """Empty; what follows has an entry for each layer that was added."""
        self.steps = steps
        self.hidden: list[torch.Tensor] = []
        """The residual stream before each block [S, D]."""
        self.before: list[torch.Tensor] = []
        """Each layer's state before the last position [S, *state]."""
        self.earlier: list[torch.Tensor] = []
        """Of each layer's convolution, its sum without the last position [S, C]."""
        self.inputs: list[Inputs] = []
        """Of each layer, with P = 1."""
        self.y: list[torch.Tensor] = []
        """[1, S, *y]."""
        self.final: torch.Tensor
        """The residual stream after the last block [S, D]."""

    def add(self, hidden: torch.Tensor, projected: torch.Tensor, carried: Carried) -> torch.Tensor:
        """The next layer: the stream before it [S, D], what the block takes from that [S, ...], and what is handed over
        to the position. Returns its y * gate [S, E]."""
        step = self.steps[len(self.hidden)]
        self.hidden.append(hidden)
        self.before.append(carried.state_t.mT)
        self.earlier.append(step.earlier(carried.conv))
        self.inputs.append(step.inputs(projected[None], self.earlier[-1]))
        self.y.append(step.output(self.inputs[-1], self.before[-1]))
        return self.y[-1][0].flatten(1) * self.inputs[-1].gate[0]

    def part(self, sequences: slice) -> "LastPositions":
        """Of some of the sequences."""
        part = copy(self)
        part.hidden, part.before, part.earlier = (
            [value[sequences] for value in values] for values in (self.hidden, self.before, self.earlier)
        )
        part.inputs = [Inputs(*(value[:, sequences] for value in inputs)) for inputs in self.inputs]
        part.y = [y[:, sequences] for y in self.y]
        part.final = self.final[sequences]
        return part

    def state(self, layer: int) -> torch.Tensor:
        """After the last position [1, S, *state]."""
        return self.steps[layer].after(self.inputs[layer], self.before[layer])

    def step(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Variants of the residual stream before a block -> after it, both [P, S, D]."""
        step = self.steps[layer]
        inputs = step.inputs(step.projected(hidden), self.earlier[layer])
        return step.finish(hidden, step.output(inputs, self.before[layer]), inputs.gate)


def last_positions(
    model: LanguageModel, clean: torch.Tensor, corrupted: torch.Tensor
) -> tuple[LastPositions, LastPositions]:
    """Of two runs, of tokens [S, L] each.

    Raises StudyError for a family without single steps or for sequences of one token.
    """
    if model.family.name not in STEPS:
        raise StudyError(f"{model.family.name}: has no single steps; those that have: {', '.join(STEPS)}")
    if clean.shape[1] < 2:
        raise StudyError("tokens: the last position has none before it; sequences need at least 2 tokens")
    steps = [STEPS[model.family.name](model, layer) for layer in range(model.n_layers)]
    both = _run(steps, model.hf.get_input_embeddings(), clean.to(model.device), corrupted.to(model.device))
    return both.part(slice(0, len(clean))), both.part(slice(len(clean), None))


class _Parting(NamedTuple):
    """Sequences whose two runs part at a position or soon after it."""

    sequences: torch.Tensor
    """[n]"""
    shared: slice
    """Of the packed positions, those of [n, at]."""
    own: slice
    """And those of [2n, L - at], the clean runs before the corrupted ones."""
    at: int

    def through(self, step: SingleStep, projected: torch.Tensor, gated: torch.Tensor) -> Carried:
        """What both runs' positions hand over, [2n, ...]; their y * gate is written to `gated` [positions, E]."""
        n, carried = len(self.sequences), None
        if self.at:
            values, out = (x[self.shared].unflatten(0, (n, self.at)) for x in (projected, gated))
            carried = step.run(values, out)
            carried = Carried(*(torch.cat([value, value]) for value in carried))
        if self.own.stop > self.own.start:
            values, out = (x[self.own].unflatten(0, (2 * n, -1)) for x in (projected, gated))
            carried = step.run(values, out, carried)
        assert carried is not None
        return carried


def _run(steps: list[SingleStep], embed, clean: torch.Tensor, corrupted: torch.Tensor) -> LastPositions:
    """Of both runs, 2S: the clean ones before the corrupted."""
    both, n_last = LastPositions(steps), 2 * len(clean)
    partings, tokens = _packed(clean[:, :-1], corrupted[:, :-1])
    order = torch.cat([parting.sequences for parting in partings]).argsort()
    tokens = torch.cat([tokens, clean[:, -1], corrupted[:, -1]])
    distinct, place = tokens.unique(return_inverse=True)
    hidden = embed(tokens)
    gated = hidden.new_empty(len(tokens), steps[0].mixer.intermediate_size, dtype=torch.float32)
    for step in steps:
        # What the first block takes in depends on the token alone.
        projected = step.projected(embed(distinct))[place] if step is steps[0] else step.projected(hidden)
        parts = [parting.through(step, projected, gated) for parting in partings]
        carried = Carried(*(_by_run(values, order) for values in zip(*parts, strict=True)))
        last = hidden[-n_last:].clone()  # a view would keep all positions of every layer in memory
        gated[-n_last:] = both.add(last, projected[-n_last:], carried)
        if step is steps[-1]:  # of the last layer only the last position is wanted
            hidden, gated = last, gated[-n_last:]
        hidden = hidden + step.written(gated).to(hidden.dtype)
    both.final = hidden
    return both


def _by_run(parts: tuple[torch.Tensor, ...], order: torch.Tensor) -> torch.Tensor:
    """[2n, ...] of each parting, clean runs before the corrupted ones -> [2S, ...] likewise."""
    both = [part.unflatten(0, (2, -1)) for part in parts]
    return torch.cat(both, 1)[:, order].flatten(0, 1)


def _packed(clean: torch.Tensor, corrupted: torch.Tensor) -> tuple[list[_Parting], torch.Tensor]:
    """Sequences by where their runs part, and the tokens to run, packed into one row."""
    length = clean.shape[1]
    differs = clean != corrupted
    parts_at = torch.where(differs.any(1), differs.int().argmax(1), length) // _TOGETHER * _TOGETHER
    partings, tokens, end = [], [], 0
    for at in parts_at.unique().tolist():
        sequences = (parts_at == at).nonzero()[:, 0]
        pieces = [clean[sequences, :at], clean[sequences, at:], corrupted[sequences, at:]]
        start, end = end, end + sum(piece.numel() for piece in pieces)
        tokens += [piece.flatten() for piece in pieces]
        middle = start + pieces[0].numel()
        partings.append(_Parting(sequences, slice(start, middle), slice(middle, end), at))
    return partings, torch.cat(tokens)
