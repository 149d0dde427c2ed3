"""The off-by-one profile of Mamba: at which position after B is B written into the state that the last position reads?

For each layer and offset d, what position (B + d) writes into the state is exchanged for what it writes in the
corrupted run, decayed as in the clean run from that same position on. Only what the last position reads changes;
later layers recompute.
"""

from collections.abc import Iterator
from functools import partial

import torch

from universality.circuits.metrics import measure
from universality.circuits.tasks.base import Task
from universality.models.language_model import LanguageModel

OFFSETS = (-1, 0, 1, 2, 3, 4)


def profile(model: LanguageModel, task: Task, corruption: str) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(layer, offset, patched minus clean metrics [S, metrics]) for every layer and offset."""
    sites = [f"mamba.{layer}.{kind}" for layer in range(model.n_layers) for kind in ("ssm_in", "delta", "B", "C")]
    clean = model.run(task.clean, capture=sites)
    corrupted = model.run(task.corrupted[corruption], capture=sites)
    clean_metrics = measure(clean.logits[:, -1], task)
    for layer in range(model.n_layers):
        exchange = _exchange(model, layer, clean.captured, corrupted.captured)
        for offset in OFFSETS:
            edit = partial(torch.add, exchange[torch.arange(len(exchange)), task.positions["B"] + offset])
            patched = model.run(task.clean, edits={f"mamba.{layer}.state@-1": edit})
            yield layer, offset, measure(patched.logits[:, -1], task) - clean_metrics


def _exchange(model: LanguageModel, layer: int, clean: dict, corrupted: dict) -> torch.Tensor:
    """How the last state changes if a position writes what it writes in the corrupted run: [S, L, *state]."""
    assert model.family.recurrence is not None
    before, after = (model.family.recurrence(model.blocks[layer], layer, run) for run in (clean, corrupted))
    last = torch.full((before.u.shape[0],), before.length - 1)
    return before.decay(last) * (after.write() - before.write())
