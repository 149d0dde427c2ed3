"""What every layer of a Mamba takes in at the last position, of two runs of the same sequences in less than two passes.

Up to the first token in which the clean and the corrupted prompt differ, both have the same values at every site. So
those positions are run once, and both runs go on from there with what their blocks hand over. Products with weights
take all positions of all sequences at once, the last ones too, and so do the mixers: first all that is shared, then all
the rest.
"""

from copy import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F

from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.single_step import STEPS, Carried, Inputs, SingleStep


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


class _Rows(NamedTuple):
    """All positions but the last of clean and corrupted sequences in one row: of each what both share, then what each
    has of its own, the clean ones before the corrupted."""

    tokens: torch.Tensor
    """[rows]"""
    shared: torch.Tensor
    """Where the shared part of each sequence begins, and where the last ends [S + 1]."""
    own: torch.Tensor
    """The same of what each has of its own, counted from the end of all that is shared [2S + 1]."""

    def through(self, step: SingleStep, projected: torch.Tensor, gated: torch.Tensor) -> Carried:
        """What both runs' positions hand over, [2S, ...]; their y * gate is written to `gated` [rows, E]."""
        end = int(self.shared[-1])
        carried = step.run(projected[:end], self.shared, gated[:end])
        twice = Carried(*(torch.cat([value, value]) for value in carried))
        return step.run(projected[end:], self.own, gated[end:], twice)


def _run(steps: list[SingleStep], embed, clean: torch.Tensor, corrupted: torch.Tensor) -> LastPositions:
    """Of both runs, 2S: the clean ones before the corrupted."""
    both, n_last = LastPositions(steps), 2 * len(clean)
    rows = _rows(clean[:, :-1], corrupted[:, :-1])
    tokens = torch.cat([rows.tokens, clean[:, -1], corrupted[:, -1]])
    distinct, place = tokens.unique(return_inverse=True)
    hidden = embed(tokens)
    gated = hidden.new_empty(len(tokens), steps[0].mixer.intermediate_size, dtype=torch.float32)
    for step in steps:
        # What the first block takes in depends on the token alone.
        projected = step.projected(embed(distinct))[place] if step is steps[0] else step.projected(hidden)
        carried = rows.through(step, projected[:-n_last], gated[:-n_last])
        last = hidden[-n_last:].clone()  # a view would keep all positions of every layer in memory
        gated[-n_last:] = both.add(last, projected[-n_last:], carried)
        if step is steps[-1]:  # of the last layer only the last position is wanted
            hidden, gated = last, gated[-n_last:]
        hidden = hidden + step.written(gated).to(hidden.dtype)
    both.final = hidden
    return both


def _rows(clean: torch.Tensor, corrupted: torch.Tensor) -> _Rows:
    """Of tokens [S, L]."""
    length = clean.shape[1]
    differs = clean != corrupted
    parts_at = torch.where(differs.any(1), differs.int().argmax(1), length)
    shared = torch.arange(length, device=clean.device) < parts_at[:, None]
    tokens = torch.cat([clean[shared], clean[~shared], corrupted[~shared]])
    ends = (F.pad(counts.cumsum(0), (1, 0)).cpu() for counts in (parts_at, (length - parts_at).repeat(2)))
    return _Rows(tokens, *ends)
