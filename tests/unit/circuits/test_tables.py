import numpy as np
import pandas as pd
import pytest

from tests.conftest import LENGTH, tiny_model
from universality.circuits.attribution_tables import write_attribution
from universality.circuits.circuit import Circuit
from universality.circuits.columns import METRICS
from universality.circuits.effects import places_of
from universality.circuits.faithfulness import draws
from universality.circuits.graph_similarity import write_similarity
from universality.circuits.path_tables import write_paths
from universality.circuits.planted import planted_mamba, planted_transformer
from universality.circuits.route_tables import write_graph, write_routes
from universality.circuits.settings import Attributing, Measuring
from universality.circuits.statistics import interval, shares_drawn
from universality.circuits.tables import write_circuit
from universality.circuits.tasks.induction import make_task

MEASURING = Measuring(
    task_seed=1, samples=12, batch_size=5, min_accuracy=0.0, null_seed=2, bootstrap_seed=3, bootstrap_samples=50,
    confidence=0.9, false_discovery_rate=0.05, min_share=0.05,
)  # fmt: skip
ATTRIBUTING = Attributing(steps=2, sizes=[0, 1, 2, 4], edge_sizes=[0, 2, 8], edge_prompts=4)


def circuit(model, **changes) -> Circuit:
    task = make_task(MEASURING.samples, LENGTH, 40, end_of_text=0, seed=1)
    return Circuit(model, "m", task, MEASURING.model_copy(update=changes))


def paths(model, out, **changes) -> pd.DataFrame:
    write_paths(circuit(model, **changes), out / "paths.parquet")
    return pd.read_parquet(out / "paths.parquet")


@pytest.mark.parametrize("family", ["gpt_neox", "mamba", "rwkv", "falcon_h1"])
def test_every_family_has_a_row_a_path_and_intervals_around_it(tmp_path, family):
    table = paths(tiny_model(family), tmp_path)
    assert (table.path == "clean").sum() == 1
    measured = table[table.receiver.notna()]
    assert set(measured.corruption) == {"replace_B", "replace_A", "no_repeat", "random"}
    key = ["corruption", "sender", "receiver", "input", "path", "position"]
    assert not measured.duplicated(key).any()
    assert measured.receiver.nunique() <= 2  # the logits and, if it is not in the first layer, the strongest receiver
    for metric in METRICS:
        assert (table[f"{metric}_low"] <= table[metric] + 1e-9).all()
        assert (table[metric] <= table[f"{metric}_high"] + 1e-9).all()
    assert measured.p_value.between(0, 1).all()
    to_logits = measured[(measured.receiver == "logits") & measured.position.isna()]
    assert to_logits.null.notna().all()
    assert (table.accuracy == table.top1[0]).all()


@pytest.mark.parametrize("plant", [planted_transformer, planted_mamba])
def test_the_planted_component_alone_matters_and_is_above_the_null(tmp_path, plant):
    planted = plant(40, LENGTH) if plant is planted_transformer else plant(40, offset=1)
    table = paths(planted.model, tmp_path)
    assert table.accuracy[0] == 1
    direct = table[(table.corruption == "replace_B") & (table.receiver == "logits") & (table.path == "direct")]
    if plant is planted_transformer:
        assert set(table.receiver.dropna()) == {"logits", planted.inducer.name}
    found = direct[direct.matters.astype(bool)]
    assert set(found.layer) == {planted.inducer.layer}
    assert planted.inducer.name in set(found.sender)
    assert found.above_null.astype(bool).all()
    assert found.share.to_numpy() == pytest.approx(1, abs=0.02)
    idle = direct[~direct.matters.astype(bool)]
    assert (idle.share.abs() < 1e-3).all()


def test_batches_together_are_the_whole(tmp_path):
    tables = [paths(tiny_model("gpt_neox"), tmp_path, batch_size=size) for size in (5, 12)]
    np.testing.assert_allclose(tables[0].logit_diff, tables[1].logit_diff, atol=1e-4)
    np.testing.assert_allclose(tables[0].null, tables[1].null, atol=1e-4)


def test_a_model_that_fails_the_task_is_said_to_and_not_looked_into(tmp_path):
    model = tiny_model("mamba")
    table = paths(model, tmp_path, min_accuracy=0.5)
    assert not table.passes.any()
    assert list(table.path) == ["clean", "replace_B", "replace_A", "no_repeat", "random"]
    failing = circuit(model, min_accuracy=0.5)
    write_routes(failing, tmp_path)
    write_attribution(failing, ATTRIBUTING, tmp_path)
    for name in ("off_by_one", "mixing", "taps", "channels", "attribution", "edges", "curves"):
        assert pd.read_parquet(tmp_path / f"{name}.parquet").empty


def test_attribution_names_the_planted_component_and_its_circuit_is_faithful(tmp_path):
    planted = planted_transformer(40, LENGTH)
    write_attribution(circuit(planted.model), ATTRIBUTING, tmp_path)
    scores = pd.read_parquet(tmp_path / "attribution.parquet")
    heads = scores[scores["head"].notna() & scores.position.isna()]
    assert heads.loc[heads.score.abs().idxmax()].component == planted.inducer.name
    curves = pd.read_parquet(tmp_path / "curves.parquet")
    faithful = curves[curves.curve == "faithfulness"].set_index("size").value
    assert faithful[0] == pytest.approx(0, abs=0.01)
    assert faithful[4] == pytest.approx(1, abs=0.05)
    [correlation] = curves[curves.curve == "rank correlation with measured"].value
    assert -1 <= correlation <= 1


def test_the_planted_edge_is_the_largest_and_edges_have_curves(tmp_path):
    planted = planted_transformer(40, LENGTH)
    write_attribution(circuit(planted.model), ATTRIBUTING, tmp_path)
    edges = pd.read_parquet(tmp_path / "edges.parquet")
    assert (edges.prompts == ATTRIBUTING.edge_prompts).all()
    assert edges.score.abs().is_monotonic_decreasing
    assert (edges.writer[0], edges.reader[0]) == (planted.inducer.name, "logits")
    assert edges.score_low[0] <= edges.score[0] <= edges.score_high[0]
    curves = pd.read_parquet(tmp_path / "curves.parquet")
    faithful = curves[curves.curve == "edges, faithfulness"].set_index("size").value
    assert list(faithful.index) == ATTRIBUTING.edge_sizes
    assert faithful[0] == pytest.approx(0, abs=0.01)
    assert faithful[8] == pytest.approx(1, abs=0.05)


def test_paths_from_one_place_find_the_planted_position(tmp_path):
    planted = planted_transformer(40, LENGTH)
    table = paths(planted.model, tmp_path)
    placed = table[table.position.notna()]
    assert set(placed.position) == {"A", "B", "B+1", "last"}
    assert set(placed.path) == {"total"}
    [row] = placed[placed.matters.astype(bool)].to_dict("records")
    assert (row["sender"], row["position"]) == (planted.inducer.name, "last")
    assert row["share"] == pytest.approx(1, abs=0.02)


def test_places_are_named_once_and_are_in_every_prompt():
    task = make_task(6, LENGTH, 40, end_of_text=0, seed=1)
    b = task.positions["B"]
    assert [place.name for place in places_of(task)] == ["A", "B", "B+1", "last"]
    at_end = task._replace(positions={"A": b, "B": b * 0 + LENGTH - 2})
    assert [place.name for place in places_of(at_end)] == ["A", "B", "A+1", "last"]


@pytest.mark.parametrize("offset", [0, 1])
def test_the_planted_tap_and_channels_bring_the_answer(tmp_path, offset):
    """B is written by its own position's tap, or by the one that reads a position back; by more than one channel."""
    planted = planted_mamba(40, offset=offset)
    write_routes(circuit(planted.model), tmp_path)
    taps = pd.read_parquet(tmp_path / "taps.parquet")
    taps = taps[(taps.corruption == "replace_B") & taps.matters]
    assert set(taps.layer) == {planted.inducer.layer}
    assert set(taps.offset) == {offset}
    assert set(taps.reads) == {0}  # wherever it is written, what is read is B
    channels = pd.read_parquet(tmp_path / "channels.parquet")
    assert set(channels.layer) == {planted.inducer.layer}
    assert set(channels.offset) == {offset}
    assert channels.share.sum() == pytest.approx(1, abs=0.05)


def test_the_routes_of_planted_models_are_tabulated_and_their_graphs_compared(tmp_path):
    planted = {"mamba": planted_mamba(40, offset=1), "gpt2": planted_transformer(40, LENGTH)}
    graphs = []
    for name, one in planted.items():
        folder = tmp_path / name
        folder.mkdir()
        measured = circuit(one.model)
        write_routes(measured, folder)
        write_graph(measured, folder / "graph.json")
        graphs.append(folder / "graph.json")
        table = pd.read_parquet(folder / "off_by_one.parquet")
        first = table[table.strongest]
        assert set(first.layer) == {one.inducer.layer}
        share = first.set_index("offset").share
        assert share[one.offset or 0] == pytest.approx(1, abs=1e-3)
        cuts = pd.read_parquet(folder / "mixing.parquet")
        whole = cuts[cuts.layer.isna()].set_index("ways").top1
        assert whole[""] == 1
        assert whole.iloc[-1] < 0.3  # all ways cut
    write_similarity(graphs, tmp_path / "similarity.parquet")
    [row] = pd.read_parquet(tmp_path / "similarity.parquet").to_dict("records")
    assert (row["model"], row["other"]) == ("mamba", "gpt2")
    assert 0.8 < row["score"] <= 1
    assert (table.logit_diff_low <= table.logit_diff_high).all()


@pytest.mark.parametrize("is_induction", [True, False])
def test_a_folder_has_all_tables_of_the_task(tmp_path, is_induction):
    write_circuit(circuit(tiny_model("rwkv")), ATTRIBUTING, is_induction, tmp_path / "out")
    expected = {"paths.parquet", "attribution.parquet", "edges.parquet", "curves.parquet"}
    if is_induction:
        expected |= {"off_by_one.parquet", "taps.parquet", "channels.parquet", "mixing.parquet", "graph.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    if is_induction:  # RWKV has neither kind of layer that writes for later positions to read
        assert pd.read_parquet(tmp_path / "out" / "off_by_one.parquet").empty


def test_intervals_are_those_of_the_prompts_drawn():
    values, drawn = np.random.default_rng(0).standard_normal((12, 3)), draws(12, 50, seed=1)
    mean, low, high = interval(values, shares_drawn(drawn), 0.9)
    means = np.stack([values[prompts].mean(axis=0) for prompts in drawn])
    np.testing.assert_allclose(mean, values.mean(axis=0))
    np.testing.assert_allclose([low, high], np.quantile(means, [0.05, 0.95], axis=0))
