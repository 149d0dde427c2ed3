"""Do the features that two models share carry what they do? SAE features are taken out of the running model in groups.

At resid_post.L the stream x loses what a group G of the layer's features writes,

    x' = x - s(x) sum_{i in G} (f_i(x) - target_i) W_dec[i]

with codes f(x), and s the scale by which a reconstruction is put back (1 unless the SAE normalises its inputs). The
target is 0 (zero ablation) or the feature's mean over the evaluation tokens (mean ablation), which takes away what it
tells but not its average. What the SAE does not reconstruct stays, so that an empty group changes nothing (Marks et al.
2024, arXiv 2403.19647, ablate features beside the error term likewise). Of several layers, each SAE encodes what the
ablations before have left. End-of-text tokens, on which SAEs are not trained, stay as they are.

The effect is the ablated value less the clean one: of cross entropy in nats a prediction made at a kept token, over
held-out text, resampled by documents; of each metric of a task, resampled by prompts. The well matched less the badly
matched is paired, of the same predictions, prompts and resamples.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch

from universality.ablation.groups import GROUPS, FeatureStatistics, group
from universality.ablation.settings import LOSS, FeatureAblationSettings
from universality.activations.sample import Sample
from universality.alignment.bootstrap import document_index, percentile_interval, resample_weights
from universality.circuits.columns import METRICS
from universality.circuits.metrics import measure
from universality.circuits.tasks.base import Task
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.models.taps import Edit
from universality.runtime import log, progress
from universality.saes.base import SAE
from universality.saes.crosscoder import Crosscoder
from universality.saes.splicing import predicting_documents
from universality.saes.transcoder import PredictsTarget

KINDS = ("zero", "mean")
DIFFERENCE = "well - badly"

Ablation = Callable[[torch.Tensor], dict[str, Edit]]
"""Where tokens are kept [B, L] -> edits of a run on them."""


def ablation_edits(
    saes: Mapping[int, SAE],
    groups: Mapping[int, np.ndarray],
    targets: Mapping[int, np.ndarray] | None,
    kept: torch.Tensor,
) -> dict[str, Edit]:
    """Edits that ablate each layer's group at the tokens that `kept` [B, L] is true for.

    `saes` by layer, of resid_post; `groups`: features [n]; `targets`: codes [F] to go to, None for zero. Raises
    StudyError for layers without SAE or target, dictionaries of other sites and features that they do not have.
    """
    edits: dict[str, Edit] = {}
    for layer, features in groups.items():
        _check(layer, features, saes, targets)
        if len(features):
            index = torch.tensor(features, dtype=torch.int64)
            target = torch.zeros(len(index)) if targets is None else torch.from_numpy(targets[layer]).float()[index]
            edits[f"resid_post.{layer}"] = partial(_ablated, saes[layer], index, target, kept)
    return edits


def _check(layer: int, features: np.ndarray, saes: Mapping[int, SAE], targets: Mapping[int, np.ndarray] | None) -> None:
    if layer not in saes:
        raise StudyError(f"groups: layer {layer} has no SAE; there are SAEs of layers {sorted(saes)}")
    sae = saes[layer]
    if isinstance(sae, PredictsTarget | Crosscoder):
        raise StudyError(f"saes: that of layer {layer} is a {sae.architecture}; what it writes is not what it reads")
    if len(features) and not 0 <= min(features) <= max(features) < sae.d_sae:
        raise StudyError(f"groups: layer {layer} names features beyond 0 .. {sae.d_sae - 1}")
    if len(np.unique(features)) != len(features):
        raise StudyError(f"groups: layer {layer} names a feature twice")
    if targets is not None and (layer not in targets or len(targets[layer]) != sae.d_sae):
        raise StudyError(f"targets: layer {layer} needs one of each of the {sae.d_sae} features")


def _ablated(
    sae: SAE, features: torch.Tensor, target: torch.Tensor, kept: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The stream [B, L, d]; float32 on the CPU, where the kernels of `encode_sparse` are."""
    if value.shape[-1] != sae.d_in:
        raise StudyError(f"saes: one of width {sae.d_in} does not fit a stream of width {value.shape[-1]}")
    places = kept.to(value.device)
    x = value[places].float().cpu()
    pattern, values = sae.encode_sparse(x)
    # Only the group's columns, dense: it is small beside all features.
    codes = scipy.sparse.csr_array((values.numpy(), pattern.features, pattern.starts), shape=pattern.shape)
    codes = torch.from_numpy(codes[:, features.numpy()].toarray())
    new = value.clone()
    new[places] = (x - sae.written(x, features, codes - target)).to(value)
    return new


@torch.inference_mode()
def measure_loss(model: LanguageModel, sample: Sample, ablation: Ablation, batch_size: int) -> np.ndarray:
    """Cross entropy in nats [T], float64, of every prediction of the next token that is made at a kept token."""
    found = []
    for start in range(0, len(sample.tokens), batch_size):
        batch = sample.part(slice(start, start + batch_size))
        kept = torch.from_numpy(batch.kept)
        losses = model.token_losses(torch.from_numpy(batch.tokens.astype(np.int64)), edits=ablation(kept))
        found.append(losses.cpu()[kept[:, :-1]].double().numpy())
    return np.concatenate(found)


@torch.inference_mode()
def measure_task(model: LanguageModel, task: Task, ablation: Ablation, end_of_text: int, batch_size: int) -> np.ndarray:
    """METRICS of each clean prompt [S, METRICS], float64."""
    found = []
    for batch in task.batches(batch_size):
        logits = model.run_to_last(batch.clean, edits=ablation(batch.clean != end_of_text)).logits
        found.append(measure(logits, batch).double().cpu())
    return torch.cat(found).numpy()


class _Measured(NamedTuple):
    """What an ablation is measured on: a function from it to values [T, M], their names (what, metric), and the unit,
    document or prompt, that each row belongs to."""

    run: Callable[[Ablation], np.ndarray]
    names: list[tuple[str, str]]
    units: np.ndarray

    def accuracy(self, clean: np.ndarray) -> float | None:
        """Mean top-1 of the clean values of a task."""
        metrics = [metric for _, metric in self.names]
        return float(clean[:, metrics.index("top1")].mean()) if "top1" in metrics else None


def ablation_columns(
    name: str,
    model: LanguageModel,
    saes: Mapping[int, SAE],
    statistics: Mapping[int, FeatureStatistics],
    members: pd.DataFrame,
    sample: Sample,
    tasks: list[Task],
    end_of_text: int,
    settings: FeatureAblationSettings,
    min_accuracy: float = 0.0,
) -> dict[str, list]:
    """Columns of a table, for the groups that `choose_groups` found: `model`, `group`, `size` (as asked for),
    `features` (ablated in all layers together), `kind`, `what` (loss, or a task's name), `metric`, mean `value` with
    `low` and `high`, and `n`, the documents or prompts that were resampled.

    Group and kind `none` is the clean value; of other groups the value is the effect; `well - badly` is that of the two
    effects' difference. `accuracy` is top-1 on a task's clean prompts: below `min_accuracy` the model fails the task,
    `passes` is false, and there is the clean value alone. Raises StudyError if two tasks have one name.
    """
    measured = [_on_text(model, sample, settings), *(_on_task(model, task, end_of_text, settings) for task in tasks)]
    names = [one.names[0][0] for one in measured]
    if len(set(names)) != len(names):
        raise StudyError(f"tasks: {', '.join(names[1:])} need different names, none of them {LOSS!r}")
    ablations = list(_ablations(saes, statistics, members, settings))
    columns: dict[str, list] = {}
    for one in measured:
        intervals = _Intervals(one.units, settings)
        clean = one.run(partial(ablation_edits, {}, {}, None))
        accuracy = one.accuracy(clean)
        passes = accuracy is None or accuracy >= min_accuracy
        append = partial(_append, columns, {"model": name, "accuracy": accuracy, "passes": passes}, one)
        append(("none", 0, 0, "none"), intervals.of(clean))
        if not passes:
            log.info("%s fails %s: top-1 %.3f is below %g", name, one.names[0][0], accuracy, min_accuracy)
            continue
        effects: dict[tuple, np.ndarray] = {}
        for key, ablation in progress(ablations, f"{name}, {one.names[0][0]}, ablations"):
            effects[key] = one.run(ablation) - clean
            append(key, intervals.of(effects[key]))
        for (group_name, *rest), well in effects.items():
            if group_name == "well":
                difference = well - effects["badly", *rest]
                append((DIFFERENCE, *rest), intervals.of(difference))
    return columns


def _on_text(model: LanguageModel, sample: Sample, settings: FeatureAblationSettings) -> _Measured:
    def run(ablation: Ablation) -> np.ndarray:
        return measure_loss(model, sample, ablation, settings.batch_size)[:, None]

    return _Measured(run, [(LOSS, "cross_entropy")], predicting_documents(sample))


def _on_task(model: LanguageModel, task: Task, end_of_text: int, settings: FeatureAblationSettings) -> _Measured:
    def run(ablation: Ablation) -> np.ndarray:
        return measure_task(model, task, ablation, end_of_text, settings.batch_size)

    return _Measured(run, [(task.name, metric) for metric in METRICS], np.arange(len(task.clean)))


def _ablations(
    saes: Mapping[int, SAE],
    statistics: Mapping[int, FeatureStatistics],
    members: pd.DataFrame,
    settings: FeatureAblationSettings,
) -> Iterator[tuple[tuple, Ablation]]:
    """((group, size, features, kind), ablation) of all."""
    means = {layer: of_layer.mean for layer, of_layer in statistics.items()}
    for size in settings.sizes:
        for name in GROUPS:
            chosen = group(members, name, size)
            count = sum(len(features) for features in chosen.values())
            for kind in KINDS:
                targets = None if kind == "zero" else means
                yield (name, size, count, kind), partial(ablation_edits, saes, chosen, targets)


class _Intervals:
    """Of means over rows, whose units are drawn with replacement: the same draws each time."""

    def __init__(self, units: np.ndarray, settings: FeatureAblationSettings):
        self._index = document_index(units)
        self._rows_of = self._index.sum(axis=1)
        self.n = len(self._rows_of)
        self._weights = resample_weights(self.n, settings.bootstrap_samples, settings.bootstrap_seed)
        self._confidence = settings.confidence

    def of(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """(mean, low, high) [M] of values [T, M]; the number of units."""
        resampled = (self._weights @ (self._index @ values)) / (self._weights @ self._rows_of)[:, None]
        low, high = percentile_interval(resampled, self._confidence)
        return values.mean(0), low, high, self.n


def _append(columns: dict[str, list], common: dict, one: _Measured, key: tuple, found: tuple) -> None:
    group_name, size, count, kind = key
    values, lows, highs, n = found
    for (what, metric), value, low, high in zip(one.names, values, lows, highs, strict=True):
        row = common | {"group": group_name, "size": float(size), "features": count, "kind": kind}
        row |= {"what": what, "metric": metric, "value": float(value), "low": float(low), "high": float(high), "n": n}
        for column, entry in row.items():
            columns.setdefault(column, []).append(entry)
