"""The off-by-one profile of Mamba: at which position after B is B written into the state that the last position reads?

For each layer and offset d, what position (B + d) writes into the state is exchanged for what it writes in the
corrupted run, decayed as in the clean run from that same position on. Only what the last position reads changes;
later layers recompute.
"""

from collections.abc import Iterator
from functools import partial

import torch

from universality.circuits.induction import InductionTask, measure
from universality.models.families.mamba import decay_after, write_at
from universality.models.language_model import LanguageModel

OFFSETS = (-1, 0, 1, 2, 3, 4)


def profile(model: LanguageModel, task: InductionTask, corruption: str) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(layer, offset, patched minus clean metrics [S, metrics]) for every layer and offset."""
    sites = [f"mamba.{layer}.{kind}" for layer in range(model.n_layers) for kind in ("ssm_in", "delta", "B")]
    clean = model.run(task.clean, capture=sites)
    corrupted = model.run(task.corrupted[corruption], capture=sites)
    clean_metrics = measure(clean.logits, task)
    for layer in range(model.n_layers):
        A = -torch.exp(model.family.blocks(model.hf)[layer].mixer.A_log)
        for offset in OFFSETS:
            position = task.position_B + offset
            before, after = (_write(run.captured, layer, position) for run in (clean, corrupted))
            left = decay_after(clean.captured[f"mamba.{layer}.delta"], A, position)
            edit = partial(torch.add, left * (after - before))
            patched = model.run(task.clean, edits={f"mamba.{layer}.last_state": edit})
            yield layer, offset, measure(patched.logits, task) - clean_metrics


def _write(captured: dict[str, torch.Tensor], layer: int, position: torch.Tensor) -> torch.Tensor:
    u, delta, B = (captured[f"mamba.{layer}.{kind}"] for kind in ("ssm_in", "delta", "B"))
    return write_at(u, delta, B, position)
