"""What the report says of dictionaries."""

import re

import numpy as np
import pandas as pd
import pytest

from universality.report import figures
from universality.report.results import QUALITY, Comparison, Inputs, _crosscoder_metrics, metrics, read_results
from universality.saes.metrics import FREQUENCY_BINS, SCHEMA, gather
from universality.storage import write_json, write_table


def row(model: str, variant: str, layer: int, L0: float, **changes) -> dict:
    values: dict = dict.fromkeys(SCHEMA.names, 0.5) | {"shared": None, "exclusive": None, "live": 8}
    values |= {"model": model, "site": f"resid_post.{layer}", "variant": variant, "seed": 0, "layer": layer}
    values |= {"kind": "sae", "d_sae": 10, "tokens": 9, "predictions": 9, "L0": L0, "L0_low": L0 - 1, "L0_high": L0 + 1}
    values |= {"frequency_bins": FREQUENCY_BINS.tolist(), "frequency_counts": list(range(len(FREQUENCY_BINS)))}
    return values | changes


@pytest.fixture
def results(tmp_path):
    rows = [
        row("neox", "topk", 0, 4.0),
        row("neox", "topk", 1, 6.0, kl=0.1),
        row("neox", "mlp", 0, 3.0, kind="transcoder"),
    ]
    counted = {"kind": "crosscoder", "shared": 2, "exclusive": 4}
    rows += [row("neox", "pair", 0, 9.0, **counted), row("mamba", "pair", 1, 9.0, **counted | {"exclusive": 1})]
    write_json(tmp_path / "evaluation.json", {"rows": rows})
    gather([tmp_path / "evaluation.json"], tmp_path / "metrics.parquet")
    share = np.linspace(0, 1, 10)
    shares = {"share neox:resid_post.0": share, "share mamba:resid_post.1": 1 - share}
    features = {"feature": np.arange(10), "frequency": np.full(10, 0.1), "dead": share > 0.8, **shares}
    write_table(tmp_path / "pair.features.parquet", features)
    pair = [tmp_path / "pair.features.parquet"]
    return read_results(Inputs([], tmp_path / "metrics.parquet", pair, [], [], [], [], [], None, [], [], []))


def test_metrics_are_means_over_layers_and_crosscoders_stand_apart(results):
    measured = metrics(results)
    assert set(measured["saes"]) == {"neox/topk/seed_0", "neox/mlp/seed_0"}
    assert measured["saes"]["neox/topk/seed_0"] == dict.fromkeys(QUALITY, 0.5) | {"L0": 5.0, "kl": 0.3}
    pair = measured["crosscoders"]["pair"]
    assert list(pair) == ["mamba:resid_post.1", "neox:resid_post.0"]
    shares = {"shared": 0.25, "exclusive": 0.5, "matched": {}}
    assert pair["neox:resid_post.0"] == dict.fromkeys(QUALITY, 0.5) | {"L0": 9.0} | shares
    assert pair["mamba:resid_post.1"]["exclusive"] == 0.125


def test_what_is_undefined_is_none(results):
    results.sae_quality.loc[results.sae_quality.variant == "topk", "loss_recovered"] = np.nan
    assert metrics(results)["saes"]["neox/topk/seed_0"]["loss_recovered"] is None


def test_beside_a_crosscoder_stands_what_mppc_says_of_its_layers(results):
    table = pd.DataFrame(
        {
            "model": ["neox"] * 5 + ["mamba"] * 2,
            "layer": [0, 0, 0, 0, 1, 0, 1],
            "mppc": [0.9, 0.7, 0.2, 0.9, 0.9, 0.9, 0.69],
            "dead": [False, False, False, True, False, False, False],
        }
    )
    settings = {"cross": "cross_architecture", "null": "model_seed"}
    comparisons = {name: Comparison(table, {"setting": setting}, table) for name, setting in settings.items()}
    comparisons["others"] = Comparison(table.replace("mamba", "rwkv"), {"setting": "cross_architecture"}, table)
    pair = _crosscoder_metrics(results._replace(comparisons=comparisons))["pair"]
    assert pair["neox:resid_post.0"]["matched"] == {"cross": pytest.approx(2 / 3)}
    assert pair["mamba:resid_post.1"]["matched"] == {"cross": 0.0}


@pytest.mark.parametrize("figure", [figures.sae_quality, figures.firing_frequency, figures.norm_shares])
def test_figures_are_the_same_for_the_same_results(results, figure):
    drawn = figure(results)
    assert drawn == figure(results)
    assert drawn.startswith("<svg")


def test_figures_name_what_they_show(results):
    assert set(re.findall(r">(neox \w+|mamba \w+)<", figures.sae_quality(results))) == {
        "neox topk", "neox mlp", "neox pair", "mamba pair",
    }  # fmt: skip
    assert {"topk", "mlp", "pair"} <= set(re.findall(r">(\w+)<", figures.firing_frequency(results)))
    shares = figures.norm_shares(results)
    assert "neox:resid_post.0" in shares
    assert "mamba:resid_post.1" not in shares


def test_a_study_without_crosscoders_has_no_figure_of_them(results):
    alone = results._replace(crosscoders={}, sae_quality=results.sae_quality[results.sae_quality.kind == "sae"])
    assert metrics(alone)["crosscoders"] == {}
    assert isinstance(alone.sae_quality, pd.DataFrame)
    assert figures.sae_quality(alone).startswith("<svg")
