"""What planted models have in common.

The residual stream has a space for the position's own token, one for the token before it and one for what is to come
next. A token's code is one entry of a space. The mover writes the code of the token before into the second space; the
inducer looks for the place whose token before is the present token, and writes the token there into the third, which
alone the unembedding reads. Norms only scale, since at every position as many codes stand in the stream; their
weights undo it, so that a layer reads 1 for a code that is there.

All else is idle: weights as transformers draws them, but what they write to the stream is scaled by `noise`. At 0 it is
nothing at all; at 1 what a head, an MLP or a mixer writes would be about as large as a code.
"""

from typing import NamedTuple

import torch

from universality.circuits.component import Component
from universality.errors import StudyError
from universality.models.language_model import LanguageModel

N_LAYERS = 4
LOGIT = 10.0
"""Of a right answer; other tokens have 0."""


class Planted(NamedTuple):
    """A model and the truth about it."""

    model: LanguageModel
    mover: Component
    """What takes A to the position after it."""
    inducer: Component
    """What finds A there and answers with B."""
    offset: int | None
    """Positions after B at which B is written into the inducer's state; None for a head."""


def check(vocab_size: int, end_of_text: int, noise: float) -> None:
    """Raises StudyError for what no model can be planted with."""
    if not 0 <= end_of_text < vocab_size:
        raise StudyError(f"end_of_text: {end_of_text} is no token of a vocabulary of {vocab_size}")
    if not 0 <= noise < float("inf"):
        raise StudyError(f"noise: {noise} is not a finite number of at least 0")


def copy_codes(weight: torch.Tensor, to: int, source: int, count: int, by: float = 1.0) -> None:
    """Have a matrix [out, in] map `count` entries from `source` on to those from `to` on, times `by`."""
    steps = torch.arange(count)
    weight[to + steps, source + steps] = by
