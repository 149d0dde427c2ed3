"""The off-by-one profile of Mamba: at which position after B is B written into the state that the last position reads?

For each layer and offset d, what position (B + d) writes into the state is exchanged for what it writes in the
corrupted run, decayed as in the clean run from that same position on. Only what the last position reads changes;
later layers recompute.
"""

from collections.abc import Iterator

import torch

from universality.circuits.ssm_fast import ssm_patching
from universality.circuits.tasks.base import Task
from universality.models.language_model import LanguageModel

OFFSETS = (-1, 0, 1, 2, 3, 4)


def profile(model: LanguageModel, task: Task, corruption: str) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(layer, offset, patched minus clean metrics [S, metrics]) for every layer and offset."""
    for effect in ssm_patching(model, task, corruption).writes(OFFSETS):
        assert effect.offset is not None
        yield effect.sender.layer, effect.offset, effect.values
