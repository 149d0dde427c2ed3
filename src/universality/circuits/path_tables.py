"""paths.parquet: whole runs, every sender's paths to the logits beside their null, and those through the strongest
receiver; then every sender that has positions, patched at one place at a time."""

from pathlib import Path

import numpy as np

from universality.circuits.circuit import FIRST, Circuit
from universality.circuits.columns import PATHS
from universality.circuits.component import Component
from universality.circuits.effects import Effects, Row, at_places, through, to_logits, to_logits_by_chance
from universality.circuits.statistics import interval


def write_paths(circuit: Circuit, out: Path) -> None:
    """A row for each whole run and path. No paths of a model that fails the task."""
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
        rows += _path_rows(
            circuit, circuit.corruption, at_places(circuit.model, task, circuit.corruption, settings), {}
        )
    circuit.write(rows, out, PATHS)


def _path_rows(circuit: Circuit, corruption: str, effects: Effects, chance: Effects) -> list[dict]:
    rows: list[dict] = []
    kinds: dict[tuple, list[dict]] = {}
    for row, values in effects.items():
        described = {
            "sender": row.sender.name,
            "layer": row.sender.layer,
            "head": row.sender.head,
            "receiver": "logits" if row.receiver is None else row.receiver.name,
            "input": row.input,
            "path": row.path,
            "position": row.position,
            **circuit.effect(corruption, values),
            **_against_chance(circuit, values, chance.get(row)),
        }
        rows.append(described)
        kinds.setdefault((row.receiver, row.input, row.path, row.position), []).append(described)
    for members in kinds.values():
        circuit.mark(members)
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


def strongest_receiver(effects: Effects) -> Component:
    """The head that moves the logit difference most on the direct path under the task's default corruption; for Mamba
    the convolution input of the layer whose state does; for RWKV the time mix that does."""

    def strength(row: Row) -> float:
        return abs(float(effects[row][:, FIRST].mean()))

    direct = [row for row in effects if row.path == "direct"]
    within = [row for row in direct if row.sender.site.startswith("attn") or row.sender.site.endswith("state@-1")]
    mixes = [row for row in direct if row.sender.site.startswith("rwkv")]
    sender = max(within or mixes, key=strength).sender
    return Component(f"mamba.{sender.layer}.conv_in") if "@" in sender.site else sender
