"""What every layer of a Mamba takes in at the last position, of two runs of the same sequences in less than two passes.

Up to the first token in which the clean and the corrupted prompt differ, both have the same values at every site. So
those positions are run once, and both runs go on from there with what their blocks hand over. Products with weights
take all positions at once; within the mixers, sequences that part at about the same position go together.
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

    def __init__(self, steps: list[SingleStep], hidden: torch.Tensor, carried: list[Carried]):
        """From the residual stream before the first block [S, D] and what each layer hands over to the position."""
        self.steps = steps
        self.hidden: list[torch.Tensor] = []
        """The residual stream before each block [S, D]."""
        self.before = [state for _, state in carried]
        """Each layer's state before the last position [S, *state]."""
        self.earlier = [step.earlier(conv) for step, (conv, _) in zip(steps, carried, strict=True)]
        """Of each layer's convolution, its sum without the last position [S, C]."""
        self.inputs: list[Inputs] = []
        """Of each layer, with P = 1."""
        self.state: list[torch.Tensor] = []
        """After the last position [1, S, *state]."""
        self.y: list[torch.Tensor] = []
        """[1, S, *y]."""
        for layer, step in enumerate(steps):
            self.hidden.append(hidden)
            self.inputs.append(step.inputs(step.projected(hidden[None]), self.earlier[layer]))
            self.state.append(step.after(self.inputs[layer], self.before[layer]))
            self.y.append(step.read(self.inputs[layer], self.state[layer]))
            hidden = step.finish(hidden[None], self.y[layer], self.inputs[layer].gate)[0]
        self.final = hidden
        """The residual stream after the last block [S, D]."""

    def part(self, sequences: slice) -> "LastPositions":
        """Of some of the sequences."""
        part = copy(self)
        part.hidden, part.before, part.earlier = (
            [value[sequences] for value in values] for values in (self.hidden, self.before, self.earlier)
        )
        part.inputs = [Inputs(*(value[:, sequences] for value in inputs)) for inputs in self.inputs]
        part.state, part.y = ([value[:, sequences] for value in values] for values in (self.state, self.y))
        part.final = self.final[sequences]
        return part

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
    embed = model.hf.get_input_embeddings()
    clean, corrupted = clean.to(model.device), corrupted.to(model.device)
    carried = _carried(steps, embed, clean[:, :-1], corrupted[:, :-1])
    both = LastPositions(steps, embed(torch.cat([clean[:, -1], corrupted[:, -1]])), carried)
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

    def through(self, step: SingleStep, projected: torch.Tensor, gated: list[torch.Tensor]) -> Carried:
        """What both runs' positions hand over, [2n, ...]; y * gate [positions, E] of all these in the packed order."""
        n, carried = len(self.sequences), None
        if self.at:
            out, carried = step.run(projected[self.shared].unflatten(0, (n, self.at)), None)
            gated.append(out.flatten(0, 1))
            carried = Carried(*(torch.cat([value, value]) for value in carried))
        if self.own.stop > self.own.start:
            out, carried = step.run(projected[self.own].unflatten(0, (2 * n, -1)), carried)
            gated.append(out.flatten(0, 1))
        assert carried is not None
        return carried


def _carried(steps: list[SingleStep], embed, clean: torch.Tensor, corrupted: torch.Tensor) -> list[Carried]:
    """What each layer hands over after runs of tokens [S, L] each: [2S, ...], the clean runs before the corrupted."""
    partings, tokens = _packed(clean, corrupted)
    order = torch.cat([parting.sequences for parting in partings]).argsort()
    hidden, found = embed(tokens), []
    for step in steps:
        projected = step.projected(hidden)
        gated: list[torch.Tensor] = []
        parts = [parting.through(step, projected, gated) for parting in partings]
        found.append(Carried(*(_by_run(values, order) for values in zip(*parts, strict=True))))
        if step is not steps[-1]:  # of the last layer only the state is wanted
            hidden = hidden + step.written(torch.cat(gated)).to(hidden.dtype)
    return found


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
