"""Tables across comparisons: paired differences of their statistics, and how means go with what SAEs keep."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from universality.alignment.bootstrap import centred_interval
from universality.storage import read_json, read_table, write_table

_DIRECTIONS = ("a_to_b", "b_to_a", "both")
_QUALITY = ["L0", "explained_variance"]


def write_tables(comparisons: list[Path], saes: Path, confidence: float, differences: Path, quality: Path) -> None:
    """`comparisons`: their folders; `saes`: metrics.parquet of the SAEs."""
    write_table(differences, _columns(differences_table(comparisons, confidence)))
    write_table(quality, _columns(quality_table(comparisons, saes)))


def differences_table(comparisons: list[Path], confidence: float) -> pd.DataFrame:
    """A row for each two comparisons that read the same tokens and each statistic: `one` less `other`, with the
    interval of the paired resamples."""
    summaries = {folder: read_json(folder / "summary.json") for folder in comparisons}
    replicates = {folder: read_table(folder / "replicates.parquet").to_pandas() for folder in comparisons}
    rows = []
    for one, other in itertools.combinations(comparisons, 2):
        a, b = summaries[one], summaries[other]
        if a["resamples"] != b["resamples"]:
            continue
        for direction in _DIRECTIONS:
            for statistic in sorted(a[direction]["statistics"].keys() & b[direction]["statistics"].keys()):
                column = f"{direction}.{statistic}"
                values = [s[direction]["statistics"][statistic]["value"] for s in (a, b)]
                if column not in replicates[one] or None in values:
                    continue
                paired = replicates[one][column].to_numpy() - replicates[other][column].to_numpy()
                difference = values[0] - values[1]
                low, high = centred_interval(difference, paired[:, None], confidence)
                rows.append((one.name, other.name, direction, statistic, difference, low[0], high[0]))
    return pd.DataFrame(rows, columns=["one", "other", "direction", "statistic", "difference", "low", "high"])


def quality_table(comparisons: list[Path], saes: Path) -> pd.DataFrame:
    """A row for each layer of each side that is seen through SAEs: its mean MPPC, plain and held out, beside L0 and
    explained variance of its SAE. `corpus` is the comparison's; the SAEs were measured on `evaluation`."""
    measured = read_table(saes).to_pandas()
    measured = measured[measured.kind == "sae"].set_index(["model", "variant", "seed", "layer"])[_QUALITY]
    rows = []
    for folder in comparisons:
        summary = read_json(folder / "summary.json")
        features = read_table(folder / "features.parquet", ["direction", "layer", "mppc", "heldout_mppc"]).to_pandas()
        for direction, side in zip(_DIRECTIONS, ("a", "b"), strict=False):
            own = summary[side]
            if own["variant"] is None:
                continue
            for layer, part in features[features.direction == direction].groupby("layer"):
                kept = measured.loc[(own["model"], own["variant"], own["seed"], layer)]
                rows.append(
                    {
                        "comparison": folder.name,
                        "setting": summary["setting"],
                        "corpus": summary["corpus"],
                        "direction": direction,
                        "model": own["model"],
                        "variant": own["variant"],
                        "layer": layer,
                        "mean_mppc": part.mppc.mean(),
                        "heldout_mean": part.heldout_mppc.mean(),
                        **{name: float(kept[name]) for name in _QUALITY},
                    }
                )
    return pd.DataFrame(rows)


def _columns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    return {str(name): table[name].to_numpy() for name in table}
