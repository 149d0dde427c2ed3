"""The off-by-one profile: at which position after B is B written where the last position reads it?

For each layer and offset d, what position B + d writes for the last position is exchanged for what it writes in the
corrupted run; only what the last position reads changes, and later layers recompute.

    state space   its write into the state, decayed as in the clean run from that same position on (ssm_paths.py)
    attention     its key and value, in all heads, for the last query alone (attention_writes.py)

With e(l, d) the mean over prompts of patched minus clean logit_diff,

    share(l, d) = e(l, d) / sum_d' e(l, d')          mean offset(l) = sum_d d e(l, d) / sum_d e(l, d)

over the offsets that were measured. A model's own are those of the layer with the largest |sum_d e(l, d)|. A layer
whose sum cannot be told from 0 has neither.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from universality.circuits.attention_writes import AttentionWrites
from universality.circuits.columns import METRICS
from universality.circuits.component import Component
from universality.circuits.faithfulness import Estimate, interval
from universality.circuits.ssm_fast import ssm_patching
from universality.circuits.tasks.base import Task
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.runtime import log

OFFSETS = (-1, 0, 1, 2, 3, 4)
ROUNDING = 1e-4
"""Sums of effects on logit_diff of at most this size may be float32's rounding of logits."""


def kinds_of(model: LanguageModel) -> tuple[str, ...]:
    """Of senders: "mamba" (writes into a state), "attn" (keys and values). Raises StudyError for neither."""
    sites = {"mamba": "mamba.0.y", "attn": "attn.0.z"}
    found = tuple(kind for kind, site in sites.items() if site in model.sites)
    if not found:
        raise StudyError(f"{model.family.name}: the off-by-one profile needs state-space layers or attention")
    return found


def kept_offsets(task: Task, offsets: Sequence[int] = OFFSETS, place: str = "B") -> tuple[int, ...]:
    """Offsets at which every prompt has a position before its last. Says which are left out.

    Ask it of a whole task, before that is cut into batches. Raises StudyError if none is left, or without that place.
    """
    kept = _before_last(task, offsets, place)
    if not kept:
        raise StudyError(f"offsets {list(offsets)} from {place}: none is before the last position in every prompt")
    if len(kept) < len(offsets):
        log.info("%s: offsets %s from %s are kept of %s", task.name, list(kept), place, list(offsets))
    return kept


def profile(
    model: LanguageModel,
    task: Task,
    corruption: str,
    offsets: Sequence[int] = OFFSETS,
    *,
    place: str = "B",
    kinds: Collection[str] | None = None,
) -> Iterator[tuple[Component, int, torch.Tensor]]:
    """(sender, offset, patched minus clean metrics [S, metrics]) for every layer and offset: mamba.L.writes@-1, then
    attn.L.kv; `kinds` are those of the model unless some are named.

    Raises StudyError for a model without either, a kind, corruption or place that there is not, and for an offset that
    is outside a prompt or not before its last position: see `kept_offsets`.
    """
    allowed = kinds_of(model)
    for kind in kinds or ():
        if kind not in allowed:
            raise StudyError(f"kind {kind!r}: {model.family.name} has {', '.join(allowed)}")
    before_last = _before_last(task, offsets, place)
    for offset in offsets:
        if offset not in before_last:
            raise StudyError(f"offset {offset} from {place}: is not before the last position in every prompt")
    for kind in allowed if kinds is None else kinds:
        batch = AttentionWrites if kind == "attn" else ssm_patching
        for effect in batch(model, task, corruption, place).writes(offsets):
            assert effect.offset is not None
            yield effect.sender, effect.offset, effect.values


def _before_last(task: Task, offsets: Sequence[int], place: str) -> tuple[int, ...]:
    """Those at which every prompt has a position before its last."""
    if place not in task.positions:
        raise StudyError(f"place {place!r}: the task {task.name} has {', '.join(task.positions)}")
    first, last = int(task.positions[place].min()), int(task.positions[place].max())
    return tuple(offset for offset in offsets if first + offset >= 0 and last + offset < task.clean.shape[1] - 1)


class Profile(NamedTuple):
    """Effects [senders, offsets, S, metrics], in float64 on the CPU."""

    senders: tuple[Component, ...]
    offsets: tuple[int, ...]
    effects: np.ndarray

    def of_kind(self, kind: str) -> "Profile":
        """Of "mamba" or "attn" alone, where a hybrid has both."""
        rows = [n for n, sender in enumerate(self.senders) if sender.site.startswith(f"{kind}.")]
        return Profile(tuple(self.senders[n] for n in rows), self.offsets, self.effects[rows])


def whole_profile(
    model: LanguageModel,
    task: Task,
    corruption: str,
    offsets: Sequence[int] = OFFSETS,
    *,
    place: str = "B",
    batch_size: int = 16,
) -> Profile:
    """The profile of all prompts at the offsets that every one of them has. Raises StudyError as `profile`."""
    kept = kept_offsets(task, offsets, place)
    found: dict[tuple[Component, int], list[torch.Tensor]] = {}
    with torch.inference_mode():
        for batch in task.batches(batch_size):
            for sender, offset, values in profile(model, batch, corruption, kept, place=place):
                found.setdefault((sender, offset), []).append(values.double().cpu())
    senders = tuple(dict.fromkeys(sender for sender, _ in found))
    effects = np.stack([np.stack([torch.cat(found[sender, offset]).numpy() for offset in kept]) for sender in senders])
    return Profile(senders, kept, effects)


class LayerShares(NamedTuple):
    """What a layer's profile comes to, on logit_diff. Nothing but `total` if that cannot be told from 0."""

    sender: Component
    total: Estimate
    """The sum of its effects [], in logits."""
    shares: Estimate | None
    """Of each offset [offsets]; they sum to 1, and leave [0, 1] where effects are of both signs."""
    off_by_one: Estimate | None
    """The share at offset 1 []; None too if that offset was not measured."""
    mean_offset: Estimate | None
    """[], weighted by effect."""


def layer_shares(profile: Profile, drawn: np.ndarray, confidence: float) -> list[LayerShares]:
    """Of each sender; `drawn` [samples, S] are the prompts of each bootstrap sample (faithfulness.draws)."""
    drawn = np.concatenate([np.arange(profile.effects.shape[2])[None], drawn])
    return [
        _shares(sender, profile.offsets, effects[:, drawn].mean(-1), confidence)
        for sender, effects in zip(profile.senders, profile.effects[..., METRICS.index("logit_diff")], strict=True)
    ]


def strongest(layers: Iterable[LayerShares]) -> LayerShares:
    """The layer with the largest summed effect, whose off_by_one and mean_offset are the model's. Its interval does not
    account for its having been chosen."""
    return max(layers, key=lambda layer: abs(float(layer.total.value)))


def _shares(sender: Component, offsets: tuple[int, ...], effects: np.ndarray, confidence: float) -> LayerShares:
    """From mean effects [offsets, 1 + samples], of all prompts first."""
    totals = effects.sum(0)
    total = _one(interval(totals[:, None], confidence), 0)
    if abs(total.value) <= ROUNDING or total.low <= 0 <= total.high:
        return LayerShares(sender, total, None, None, None)
    shares = effects / np.where(totals == 0, np.nan, totals)
    found = interval(shares.T, confidence)
    mean_offset = _one(interval((np.array(offsets) @ shares)[:, None], confidence), 0)
    off_by_one = _one(found, offsets.index(1)) if 1 in offsets else None
    return LayerShares(sender, total, found, off_by_one, mean_offset)


def _one(estimate: Estimate, index: int) -> Estimate:
    return Estimate(*(part[index] for part in estimate))
