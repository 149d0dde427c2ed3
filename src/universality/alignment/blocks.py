"""Parts of a comparison, a block of layers of each side: what any two of their layers find in each other."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from universality.alignment.dense import match
from universality.alignment.mppc import Drawn
from universality.alignment.settings import Matching
from universality.alignment.sides import ModelSide, null_features
from universality.alignment.token_order import TokenOrder, rotations
from universality.alignment.top import Found
from universality.errors import StudyError
from universality.runtime import progress
from universality.storage import read_tensors, write_tensors


def write_block(a: ModelSide, b: ModelSide, order: TokenOrder, settings: Matching, out: Path) -> None:
    """Write `{direction}.{layer of a}.{layer of b}.{field of Found}` for each pair of layers, and for each layer of the
    side the share of tokens where its features are not zero, `{side}.{layer}.frequency`."""
    rotated = rotations(order, settings.rotations, settings.null_seed)
    layers_a = {number: a.load(number, order) for number in a.numbers}
    arrays: dict[str, np.ndarray] = {f"a.{number}.frequency": layer.frequency for number, layer in layers_a.items()}
    for number_b in progress(b.numbers, f"{a.model} and {b.model}, layers of {b.model}"):
        layer_b = b.load(number_b, order)
        arrays[f"b.{number_b}.frequency"] = layer_b.frequency
        for number_a, layer_a in layers_a.items():
            drawn = Drawn(
                null_features(settings, 0, number_a, layer_a.n_features),
                null_features(settings, 1, number_b, layer_b.n_features),
                rotated,
            )
            found = match(layer_a, layer_b, order, settings.partners, drawn)
            for direction, one in zip(("a", "b"), found, strict=True):
                prefix = f"{direction}.{number_a}.{number_b}"
                arrays |= {f"{prefix}.{name}": np.ascontiguousarray(x) for name, x in one._asdict().items()}
        del layer_b  # before the next is read
    write_tensors(out, arrays)


class Parts(NamedTuple):
    """`found`: (direction, layer of a, layer of b) -> partners; `frequency` of side a, of side b: layer -> [F]."""

    found: dict[tuple[str, int, int], Found]
    frequency: tuple[dict[int, np.ndarray], dict[int, np.ndarray]]


def read_blocks(paths: list[Path], a: ModelSide, b: ModelSide) -> Parts:
    """Raises StudyError if a pair of layers is missing."""
    arrays: dict[str, np.ndarray] = {}
    for path in paths:
        arrays |= read_tensors(path)

    def get(name: str) -> np.ndarray:
        if name not in arrays:
            raise StudyError(f"{paths[0].parent}: no part holds {name}; remake the comparison's parts")
        return arrays[name]

    found = {
        (direction, x, y): Found(**{field: get(f"{direction}.{x}.{y}.{field}") for field in Found._fields})
        for direction in ("a", "b")
        for x in a.numbers
        for y in b.numbers
    }
    of_a, of_b = ({n: get(f"{name}.{n}.frequency") for n in side.numbers} for name, side in (("a", a), ("b", b)))
    return Parts(found, (of_a, of_b))
