import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats

from universality.alignment.blocks import read_blocks, write_block
from universality.alignment.compare import write_comparison
from universality.alignment.planted import plant
from universality.alignment.settings import Comparison, Matching, Statistics
from universality.alignment.sides import in_memory
from universality.alignment.token_order import order_by_document
from universality.errors import StudyError

MATCHING = Matching(
    partners=4, token_shares=[0.25], order_seed=1, rotations=3, null_share=1.0, null_seed=2, max_groups=100
)
STATISTICS = Statistics(
    bootstrap_seed=1, bootstrap_samples=100, confidence=0.95, null_neighbours=50, false_discovery_rate=0.05,
    thresholds=[0.3, 0.7], unmatched_below=0.3, depth_features=50,
)  # fmt: skip
SIDES = {side: {"model": side, "variant": "topk", "seed": 0} for side in ("a", "b")}
COMPARISON = Comparison(setting="cross_architecture", **SIDES)
FILES = ("features", "partners", "layers", "tokens", "unmatched", "replicates")


def compared(folder, a, b, documents, blocks=None):
    """(tables, summary) of sides (layer -> codes), the work split into blocks of layers of each."""
    order = order_by_document(documents, MATCHING.token_shares, MATCHING.max_groups, MATCHING.order_seed)
    parts = []
    for k, (x, y) in enumerate(blocks or [(list(a), list(b))]):
        sides = in_memory("a", {n: a[n] for n in x}), in_memory("b", {n: b[n] for n in y})
        parts.append(folder / f"part_{k}.safetensors")
        write_block(*sides, order, MATCHING, parts[-1])
    sides = in_memory("a", a), in_memory("b", b)
    write_comparison(COMPARISON, *sides, parts, order, MATCHING, STATISTICS, folder / "out")
    tables = {name: pd.read_parquet(folder / "out" / f"{name}.parquet") for name in FILES}
    return tables, json.loads((folder / "out" / "summary.json").read_text())


def two_layers(seed=0):
    """Layers 3 and 7 of each side; what layer 3 of a shares, layer 7 of b has, and the other way round."""
    rng = np.random.default_rng(seed)
    one, two = (plant(rng, n_features=60, n_tokens=4000, n_documents=100, shared=0.5) for _ in range(2))
    return {3: one.a, 7: two.a}, {3: two.b, 7: one.b}, one


def test_planted_partners_are_found_both_ways(tmp_path):
    a, b, planted = two_layers()
    tables, summary = compared(tmp_path, a, b, planted.documents)
    features = tables["features"]
    own = features[(features.direction == "a_to_b") & (features.layer == 3)]
    shared = planted.partner >= 0
    for kind in ("best", "heldout", "one_to_one"):
        assert (own[f"{kind}_layer"][shared] == 7).all()
        assert (own[f"{kind}_feature"][shared] == planted.partner[shared]).all()
    assert own.matched[shared].all()
    assert own.mutual[shared].all()
    assert own.mppc[shared].min() > own.null_mppc[shared].max()
    first = tables["partners"].query("direction == 'a_to_b' and rank == 1 and layer == 3")
    assert first.r.to_numpy() == pytest.approx(own.mppc.to_numpy())
    statistics = summary["both"]["statistics"]
    assert statistics["heldout_mean"]["value"] < statistics["mean"]["value"]
    assert statistics["above_null"]["low"] > 0.2
    assert summary["a_to_b"]["depth_correlation"]["value"] < 0
    layers = tables["layers"].set_index(["direction", "layer", "other_layer"])
    assert layers.mean_mppc["a_to_b", 3, 7] > layers.mean_mppc["a_to_b", 3, 3] + 0.2
    assert layers.groupby(["direction", "layer"]).share_best.sum().to_numpy() == pytest.approx(1)
    whole = tables["tokens"].groupby("direction").last().loc["a_to_b"]
    assert whole.mean_mppc == pytest.approx(summary["a_to_b"]["mean"])


def test_every_mean_lies_in_its_interval_and_the_kinds_of_interval_agree(tmp_path):
    a, b, planted = two_layers()
    tables, summary = compared(tmp_path, a, b, planted.documents)
    for name in ("layers", "tokens"):
        assert (tables[name].low < tables[name].mean_mppc).all()
        assert (tables[name].mean_mppc < tables[name].high).all()
    one = summary["a_to_b"]
    whole = tables["tokens"].groupby("direction").last().loc["a_to_b"]
    assert whole.high - whole.low == pytest.approx(one["high"] - one["low"], rel=0.35)  # 100 resamples only
    shorter = tables["tokens"].groupby("direction").first().loc["a_to_b"]
    assert shorter.high - shorter.low > 1.3 * (whole.high - whole.low)  # a quarter of the tokens
    depth = one["depth_correlation"]
    assert depth["low"] <= depth["value"] <= depth["high"] <= depth["low"] + 0.4


def test_unmatched_features_are_those_whose_whole_interval_is_low(tmp_path):
    a, b, planted = two_layers()
    tables, _ = compared(tmp_path, a, b, planted.documents)
    features, unmatched = tables["features"], tables["unmatched"]
    expected = features[~features.dead & (features.mppc_high < STATISTICS.unmatched_below)]
    keys = ["direction", "layer", "feature"]
    assert set(map(tuple, unmatched[keys].to_numpy())) == set(map(tuple, expected[keys].to_numpy()))
    own = features[(features.direction == "a_to_b") & (features.layer == 3)]
    listed = unmatched[(unmatched.direction == "a_to_b") & (unmatched.layer == 3)].feature
    assert not set(own.feature[planted.partner >= 0]) & set(listed)
    assert len(listed) > 0.5 * (planted.partner < 0).sum()
    assert unmatched[unmatched.direction == "a_to_b"].mppc.is_monotonic_increasing


def test_any_split_into_jobs_gives_the_same_bytes(tmp_path):
    a, b, planted = two_layers()
    splits = {"one": None, "four": [([x], [y]) for x in a for y in b], "two": [([3, 7], [3]), ([3, 7], [7])]}
    for name, blocks in splits.items():
        (tmp_path / name).mkdir()
        compared(tmp_path / name, a, b, planted.documents, blocks)
    for file in [*(f"{name}.parquet" for name in FILES), "summary.json"]:
        assert len({(tmp_path / name / "out" / file).read_bytes() for name in splits}) == 1, file


def test_dead_features_are_marked_and_never_matched(tmp_path):
    a, b, planted = two_layers()
    dense = a[3].toarray()
    dense[:, 5] = 0
    tables, summary = compared(tmp_path, a | {3: scipy.sparse.csr_array(dense)}, b, planted.documents)
    features = tables["features"]
    [dead] = features[features.dead].itertuples()
    assert (dead.direction, dead.layer, dead.feature, dead.best_layer, dead.matched) == ("a_to_b", 3, 5, -1, False)
    partners = tables["partners"].query("direction == 'b_to_a' and partner_layer == 3")
    assert 5 not in set(partners.partner_feature)
    assert summary["a_to_b"]["dead"] == 1


def test_a_missing_part_is_named(tmp_path):
    a, b, planted = two_layers()
    with pytest.raises(StudyError, match=r"no part holds a\.7\.3\.r; remake the comparison's parts"):
        compared(tmp_path, a, b, planted.documents, [([3], [3, 7])])


def test_all_dead_is_an_error(tmp_path):
    a, _, planted = two_layers()
    silent = scipy.sparse.csr_array((4000, 3), dtype=np.float32)
    with pytest.raises(StudyError, match="every feature of a is dead|every feature of b is dead"):
        compared(tmp_path, a, {0: silent}, planted.documents)


def draws(tmp_path, n, shared, cross_talk):
    for seed in range(n):
        planted = plant(
            np.random.default_rng(seed), n_features=100, n_tokens=5000, n_documents=100, shared=shared,
            cross_talk=cross_talk,
        )  # fmt: skip
        tables, summary = compared(tmp_path, {0: planted.a}, {0: planted.b}, planted.documents)
        features = tables["features"]
        yield planted, features[features.direction == "a_to_b"].reset_index(), summary["both"]["statistics"]


@pytest.mark.slow
def test_the_planted_share_is_covered_and_its_pairs_are_recovered(tmp_path):
    """The share of mutual matches: an unshared feature that leaks a shared one is no one's best."""
    covered, recovered = 0, []
    for planted, features, statistics in draws(tmp_path, 100, shared=0.4, cross_talk=0.1):
        share = statistics["share_mutual"]
        covered += share["low"] <= 0.4 <= share["high"]
        shared = planted.partner >= 0
        recovered.append((features.one_to_one_feature[shared] == planted.partner[shared]).mean())
    assert covered >= 90
    assert np.mean(recovered) > 0.98


@pytest.mark.slow
def test_where_nothing_is_shared_few_features_pass(tmp_path):
    passed = [(f.p_value < 0.05).mean() for _, f, _ in draws(tmp_path, 60, shared=0.0, cross_talk=0.1)]
    error = np.std(passed) / np.sqrt(len(passed))
    assert np.mean(passed) <= 0.05 + 3 * error
    assert np.mean(passed) > 0.01


def test_parts_are_read_back_as_they_were_found(tmp_path):
    a, b, planted = two_layers()
    order = order_by_document(planted.documents, [], 50, 1)
    sides = in_memory("a", a), in_memory("b", b)
    write_block(*sides, order, MATCHING, tmp_path / "part.safetensors")
    found, frequency = read_blocks([tmp_path / "part.safetensors"], *sides)
    for side, codes in zip(frequency, (a, b), strict=True):
        assert set(side) == {3, 7}
        for number, shares in side.items():
            np.testing.assert_allclose(shares, (codes[number].toarray() != 0).mean(axis=0))
    assert set(found) == {(d, x, y) for d in "ab" for x in (3, 7) for y in (3, 7)}
    assert found["a", 3, 7].r.shape == (60, 4)
