"""The tables of a model on a task; docs/circuits.md describes them."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from universality.circuits.attribution import WRITERS, components, node_attribution
from universality.circuits.effects import Effects, Row, through, to_logits, to_logits_by_chance, whole_runs
from universality.circuits.faithfulness import (
    Curve,
    agreement,
    area,
    completeness,
    draws,
    faithfulness,
    node_curve,
    patched_effects,
)
from universality.circuits.induction_graph import Criteria, Similarity, graph_of_dict, induction_graph, similarity
from universality.circuits.metrics import METRICS
from universality.circuits.mixing import MixingCuts
from universality.circuits.off_by_one import layer_shares, strongest, whole_profile
from universality.circuits.path_patching import Component
from universality.circuits.settings import Attributing, Measuring
from universality.circuits.statistics import interval, p_value, shares_drawn, significant
from universality.circuits.tasks.base import Task
from universality.models.language_model import LanguageModel
from universality.runtime import log
from universality.storage import read_json, replacing, write_json, write_table

_TOP = 5  # effects of which attribution should name the largest
FIRST = METRICS.index("logit_diff")
_TYPES = {"layer": pa.int32(), "head": pa.int32(), "offset": pa.int32(), "size": pa.int32(), "prompts": pa.int32()}
_FLAGS = ("passes", "matters", "above_null", "strongest")
_NAMES = ("model", "task", "corruption", "sender", "receiver", "input", "path", "component", "curve", "ways")
_ENDS = ("", "_low", "_high")
_METRICS = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
_AGAINST_NULL = ("share", "p_value", "matters", "null", "null_low", "null_high", "above_null")
_IDENTITY = ("corruption", "sender", "layer", "head", "receiver", "input", "path")


class Circuit:
    """A model on a task: whole runs, and whether it does the task at all."""

    def __init__(self, model: LanguageModel, name: str, task: Task, settings: Measuring):
        self.model, self.name, self.task, self.settings = model, name, task, settings
        self.drawn = draws(len(task.clean), settings.bootstrap_samples, settings.bootstrap_seed)
        self.shares = shares_drawn(self.drawn)
        self.whole = whole_runs(model, task, settings)
        self.accuracy = float(self.whole["clean"][:, METRICS.index("top1")].mean())
        self.passes = self.accuracy >= settings.min_accuracy
        """Does the model do the task? If not, no circuit is looked for."""
        if not self.passes:
            log.info("%s fails %s: top-1 %.3f is below %g", name, task.name, self.accuracy, settings.min_accuracy)

    @property
    def corruption(self) -> str:
        """The task's default one."""
        return next(iter(self.task.corrupted))

    def gap(self, corruption: str) -> float:
        """By how much the whole corruption changes the logit difference."""
        return float((self.whole[corruption] - self.whole["clean"])[:, FIRST].mean())

    def described(self, values: np.ndarray) -> dict[str, float]:
        """Means over prompts of metrics [S, metrics], each with low and high."""
        mean, low, high = interval(values, self.shares, self.settings.confidence)
        return {
            f"{metric}{end}": float(x[k])
            for k, metric in enumerate(METRICS)
            for end, x in (("", mean), ("_low", low), ("_high", high))
        }


def write_circuit(circuit: Circuit, settings: Attributing, is_induction: bool, out: Path) -> None:
    """A folder of all tables; those of how an answer gets to the end where the task is induction."""
    with replacing(out) as folder:
        folder.mkdir()
        write_paths(circuit, folder / "paths.parquet")
        write_attribution(circuit, settings, folder / "attribution.parquet", folder / "curves.parquet")
        if is_induction:
            write_routes(circuit, folder / "off_by_one.parquet", folder / "mixing.parquet")
            write_graph(circuit, folder / "graph.json")


def write_paths(circuit: Circuit, out: Path) -> None:
    """A row for each whole run, each sender's paths to the logits, and those through the strongest receiver."""
    task, settings = circuit.task, circuit.settings
    rows = [
        {"path": name, "corruption": None if name == "clean" else name, **circuit.described(values)}
        for name, values in circuit.whole.items()
    ]
    if circuit.passes:
        chance = to_logits_by_chance(circuit.model, task, settings)
        found = {name: to_logits(circuit.model, task, name, settings) for name in task.corrupted}
        receiver = strongest_receiver(found[circuit.corruption])
        for name, effects in found.items():
            rows += _path_rows(circuit, name, effects, chance)
            rows += _path_rows(circuit, name, through(circuit.model, task, name, receiver, settings), {})
    _write(circuit, rows, out, (*_IDENTITY, *_METRICS, *_AGAINST_NULL))


def _path_rows(circuit: Circuit, corruption: str, effects: Effects, chance: Effects) -> list[dict]:
    gap, rows = circuit.gap(corruption), []
    for row, values in effects.items():
        sender, receiver, by, path = row
        described = {
            "corruption": corruption,
            "sender": sender.name,
            "layer": sender.layer,
            "head": sender.head,
            "receiver": "logits" if receiver is None else receiver.name,
            "input": by,
            "path": path,
            **circuit.described(values),
            "share": float(values[:, FIRST].mean()) / gap if gap else np.nan,
            "p_value": p_value(values[:, FIRST]),
        }
        rows.append(described | _against_chance(circuit, values, chance.get(row)))
    _mark(rows, circuit.settings)
    return rows


def _against_chance(circuit: Circuit, values: np.ndarray, null: np.ndarray | None) -> dict:
    """The null's mean, and whether the effect is larger than it, on the same side of 0, with its whole interval."""
    if null is None:
        return {"null": np.nan, "null_low": np.nan, "null_high": np.nan, "above_null": None}
    settings, sign = circuit.settings, np.sign(values[:, FIRST].mean())
    mean, low, high = interval(null[:, FIRST], circuit.shares, settings.confidence)
    _, more, _ = interval(sign * (values - null)[:, FIRST], circuit.shares, settings.confidence)
    _, strong, _ = interval(sign * values[:, FIRST], circuit.shares, settings.confidence)
    return {"null": mean, "null_low": low, "null_high": high, "above_null": bool(min(more, strong) > 0)}


def _mark(rows: list[dict], settings: Measuring) -> None:
    """Which senders matter, among those whose paths are of one kind."""
    kinds: dict[tuple, list[dict]] = {}
    for row in rows:
        kinds.setdefault((row["receiver"], row["input"], row["path"]), []).append(row)
    for members in kinds.values():
        found = significant(np.array([row["p_value"] for row in members]), settings.false_discovery_rate)
        for row, is_found in zip(members, found, strict=True):
            row["matters"] = bool(is_found and abs(row["share"]) >= settings.min_share)


def strongest_receiver(effects: Effects) -> Component:
    """The head that moves the logit difference most on the direct path under the task's default corruption; for Mamba
    the convolution input of the layer whose state does; for RWKV the time mix that does."""

    def strength(row: Row) -> float:
        return abs(float(effects[row][:, FIRST].mean()))

    direct = [row for row in effects if row[3] == "direct"]
    within = [row for row in direct if row[0].site.startswith("attn") or row[0].site.endswith("state@-1")]
    mixes = [row for row in direct if row[0].site.startswith("rwkv")]
    sender = max(within or mixes, key=strength)[0]
    return Component(f"mamba.{sender.layer}.conv_in") if "@" in sender.site else sender


def write_routes(circuit: Circuit, off_by_one: Path, mixing: Path) -> None:
    """How what is told of B comes to the last position: a row for each layer and offset whose write is exchanged, and
    for each layer whose convolution, state or attention is cut. No rows for a model without such layers."""
    profiles, cuts = [], []
    if circuit.passes and {"attn.0.z", "mamba.0.y"} & circuit.model.sites.keys():
        profiles, cuts = _profile_rows(circuit), _cut_rows(circuit)
    shares = [f"{name}{end}" for name in ("share", "mean_offset") for end in ("", "_low", "_high")]
    identity = ("corruption", "sender", "layer", "offset", "strongest")
    _write(circuit, profiles, off_by_one, (*identity, *_METRICS, *shares))
    _write(circuit, cuts, mixing, ("layer", "ways", *_METRICS))


def _profile_rows(circuit: Circuit) -> list[dict]:
    """`share` is of the layer's summed effect, `mean_offset` its layer's; both are missing where that sum is nothing.
    `strongest`: is it the layer with the largest?"""
    size, confidence = circuit.settings.batch_size, circuit.settings.confidence
    profile = whole_profile(circuit.model, circuit.task, circuit.corruption, batch_size=size)
    layers = layer_shares(profile, circuit.drawn, confidence)
    first = strongest(layers)
    rows = []
    for sender, layer, effects in zip(profile.senders, layers, profile.effects, strict=True):
        for k, (offset, values) in enumerate(zip(profile.offsets, effects, strict=True)):
            place = {"sender": sender.name, "layer": sender.layer, "offset": offset, "strongest": layer is first}
            row = {"corruption": circuit.corruption, **place, **circuit.described(values)}
            if layer.shares is not None:
                row |= {f"share{end}": float(x[k]) for end, x in zip(_ENDS, layer.shares, strict=True)}
            if layer.mean_offset is not None:
                row |= {f"mean_offset{end}": float(x) for end, x in zip(_ENDS, layer.mean_offset, strict=True)}
            rows.append(row)
    return rows


def _cut_rows(circuit: Circuit) -> list[dict]:
    cuts = MixingCuts(circuit.model, circuit.task, circuit.settings.batch_size).cuts()
    return [
        {"layer": cut.layer, "ways": "+".join(cut.ways), **circuit.described(cut.values.double().cpu().numpy())}
        for cut in cuts
    ]


def write_graph(circuit: Circuit, out: Path) -> None:
    """The circuit as a graph; without nodes where none is found."""
    settings = circuit.settings
    criteria = Criteria(
        bootstrap_seed=settings.bootstrap_seed,
        min_share=settings.min_share,
        min_accuracy=settings.min_accuracy,
        alpha=settings.false_discovery_rate,
        bootstrap_samples=settings.bootstrap_samples,
        confidence=settings.confidence,
    )
    write_json(out, induction_graph(circuit.model, circuit.task, criteria, settings.batch_size).to_dict())


def write_similarity(graphs: list[Path], out: Path) -> None:
    """A row for each two models of a task: how alike their graphs are; missing where one has none."""
    read = {path.parent.name: graph_of_dict(read_json(path)) for path in graphs}
    rows = [(a, b, similarity(read[a], read[b])) for a, b in itertools.combinations(read, 2)]
    columns = {"model": [a for a, _, _ in rows], "other": [b for _, b, _ in rows]}
    table = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    for name in Similarity._fields:
        values = [None if found is None else getattr(found, name) for _, _, found in rows]
        table[name] = pa.array(values, pa.float64())
    write_table(out, pa.table(table))


def write_attribution(circuit: Circuit, settings: Attributing, scores: Path, curves: Path) -> None:
    """A row for each component, what gradients say its effect is; and how well circuits of the largest do the task."""
    rows, heights = [], []
    if circuit.passes:
        model, task, corruption, size = circuit.model, circuit.task, circuit.corruption, circuit.settings.batch_size
        found = node_attribution(model, task, corruption, steps=settings.steps, batch_size=size)
        for component, values in zip(found.components, found.total.double().numpy().T, strict=True):
            mean, low, high = interval(values, circuit.shares, circuit.settings.confidence)
            place = {"component": component.name, "layer": component.layer, "head": component.head}
            rows.append({"corruption": corruption, **place, "score": mean, "score_low": low, "score_high": high})
        writers = components(model, WRITERS, embed=False)
        totals = found.of(writers).total
        sizes = [n for n in settings.sizes if n <= len(writers)]
        curve = node_curve(model, task, corruption, totals.mean(0), sizes, batch_size=size)
        measured = patched_effects(model, task, corruption, writers, batch_size=size)
        heights = _curve_rows(circuit, curve) + _agreement_rows(circuit, totals, measured)
    _write(circuit, rows, scores, ("corruption", "component", "layer", "head", "score", "score_low", "score_high"))
    _write(circuit, heights, curves, ("curve", "size", "value", "low", "high"))


def _curve_rows(circuit: Circuit, curve: Curve) -> list[dict]:
    rows = []
    confidence = circuit.settings.confidence
    for name, estimate in (
        ("faithfulness", faithfulness(curve, circuit.drawn, confidence)),
        ("completeness", completeness(curve, circuit.drawn, confidence)),
    ):
        for size, value, low, high in zip(curve.sizes, estimate.value, estimate.low, estimate.high, strict=True):
            rows.append({"curve": name, "size": size, "value": value, "low": low, "high": high})
    areas = area(curve, circuit.drawn, confidence)
    for k, name in enumerate(("faithfulness, area", "completeness, area")):
        rows.append({"curve": name, "value": areas.value[k], "low": areas.low[k], "high": areas.high[k]})
    return rows


def _agreement_rows(circuit: Circuit, scores: torch.Tensor, measured: torch.Tensor) -> list[dict]:
    """Estimated against measured effects of what writes to the stream."""
    size = min(_TOP, scores.shape[1])
    found = agreement(scores, measured, size, circuit.drawn, circuit.settings.confidence)
    names = ("rank correlation with measured", scores.shape[1]), ("share of the largest", size)
    return [
        {"curve": name, "size": n, "value": found.value[k], "low": found.low[k], "high": found.high[k]}
        for k, (name, n) in enumerate(names)
    ]


def _write(circuit: Circuit, rows: list[dict], out: Path, columns: tuple[str, ...]) -> None:
    """Every row also says of which model and task it is, how many prompts there were, and whether the model does it."""
    log.info("%s, %s: %d rows, top-1 %.3f", circuit.name, circuit.task.name, len(rows), circuit.accuracy)
    common = {
        "model": circuit.name, "task": circuit.task.name, "passes": circuit.passes, "accuracy": circuit.accuracy,
        "prompts": len(circuit.task.clean),
    }  # fmt: skip
    table = {}
    for name in (*common, *columns):
        kind = _TYPES.get(name, pa.string() if name in _NAMES else pa.bool_() if name in _FLAGS else pa.float64())
        values = [common.get(name, row.get(name)) for row in rows]
        table[name] = pa.array(values, kind, from_pandas=True)
    write_table(out, pa.table(table))
