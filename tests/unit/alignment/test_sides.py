import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from tests.conftest import write_store
from tests.unit.alignment.reference import correlations, top
from tests.unit.alignment.test_compare import COMPARISON, MATCHING, STATISTICS
from universality.activations.format import TokenRows
from universality.activations.store import ActivationStore
from universality.activations.writer import ShardWriter
from universality.alignment.blocks import write_block
from universality.alignment.compare import write_comparison
from universality.alignment.dense import DenseLayer, match_dense, read_dense_layers
from universality.alignment.mppc import Drawn
from universality.alignment.pairs import group_sums
from universality.alignment.settings import Comparison
from universality.alignment.sides import in_memory, pairs_of_layers, read_sides, read_text
from universality.alignment.tables import quality_table
from universality.alignment.token_order import order_by_document, rotations
from universality.errors import StudyError
from universality.storage import replacing, write_json, write_table

N_TOKENS = 9000  # more than two blocks


def values(seed, width):
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(99).standard_normal((N_TOKENS, 1))
    x = (1000 + common + rng.standard_normal((N_TOKENS, width))).astype(np.float32)
    x[:, 1] = 3.25  # never varies
    x[rng.random(N_TOKENS) < 0.4, 2] = 0
    return x


@pytest.fixture(scope="module")
def neurons(tmp_path_factory):
    """Two layers' neurons, a's of two inner sites, in stores of several shards; what they hold, in token order."""
    folder = tmp_path_factory.mktemp("neurons")
    order = order_by_document(np.arange(N_TOKENS) // 10, [0.25], 60, seed=1)
    found = []
    for name, widths in (("a", (3, 4)), ("b", (6,))):
        arrays = [values(seed, width) for seed, width in enumerate(widths, len(found))]
        shards = []
        for site, array in zip(("mamba.0.ssm_in", "mamba.0.gate"), arrays, strict=False):
            described = {"model": name, "site": site, "split": "evaluation"}
            shards += write_store(folder / name / site, torch.from_numpy(array), [5000, 4000], **described)
        [stores] = read_dense_layers(name, [0], shards).values()
        found.append((DenseLayer(stores, order), np.concatenate(arrays, axis=1)[order.rows].astype(np.float64)))
    return order, found


def test_moments_of_stored_neurons_equal_numpys(neurons):
    order, sides = neurons
    for layer, x in sides:
        np.testing.assert_allclose(layer.frequency, (x != 0).mean(axis=0))
        for k, (low, high) in enumerate(order.segments()):
            part = x[low:high]
            varies = np.ptp(part, axis=0) > 0
            np.testing.assert_allclose(layer.moments.mean[k], part.mean(axis=0) - x.mean(axis=0), atol=1e-9)
            np.testing.assert_allclose(layer.moments.sd[k][varies], part.std(axis=0)[varies], rtol=1e-9)
            assert np.isnan(layer.moments.sd[k][~varies]).all()
            assert not varies[1]


def test_partners_of_stored_neurons_are_those_of_numpys_correlations(neurons):
    order, ((a, x), (b, y)) = neurons
    drawn = Drawn(np.array([0, 2]), np.array([3]), rotations(order, 2, seed=4))
    found = match_dense(a, b, order, 3, drawn)
    for one, r in zip(found, (correlations(x, y), correlations(x, y).T), strict=True):
        np.testing.assert_allclose(one.r, top(r, 3)[0], atol=1e-9)
        assert (one.partner[1] == -1).all()
    for k, rotation in enumerate(drawn.rotations):
        r = correlations(x[:, drawn.a], np.roll(y, -rotation, axis=0))
        np.testing.assert_allclose(found[0].null_r[k], top(r, 1)[0][:, 0], atol=1e-9)


@pytest.fixture
def stream(tmp_path):
    """Residual streams of two models that share two of six directions; stores, arrays in token order, the order."""
    rng = np.random.default_rng(7)
    common = rng.standard_normal((N_TOKENS, 2)) * [5, 3]
    order = order_by_document(np.arange(N_TOKENS) // 10, [], 60, seed=1)
    found = {}
    for name in "ab":
        turned = np.linalg.qr(rng.standard_normal((6, 6)))[0]
        x = np.concatenate([common, 0.3 * rng.standard_normal((N_TOKENS, 4))], axis=1) @ turned + 7
        described = {"model": name, "split": "evaluation"}
        found[name] = (write_store(tmp_path / name, torch.from_numpy(x).float(), [5000, 4000], **described), x)
    return found, order


@pytest.mark.parametrize("basis", ["residual", "pca"])
def test_axes_of_the_stream_are_compared_with_both_signs(basis, stream):
    stores, order = stream
    comparison = Comparison(setting=basis, a={"model": "a", "basis": basis}, b={"model": "b", "basis": basis})
    paths = tuple(paths for paths, _ in stores.values())
    text = read_text(*paths, MATCHING)
    sides = read_sides(comparison, ([0], [0]), paths, text._replace(order=order))
    layers = [side.load(0, order) for side in sides]
    values = []
    for _, x in stores.values():
        x = x[order.rows].astype(np.float32).astype(np.float64)
        if basis == "pca":
            _, vectors = np.linalg.eigh(np.cov(x.T))
            x = x @ vectors[:, ::-1]
        values.append(x)
    r = np.corrcoef(values[0].T, values[1].T)[:6, 6:]
    found = match_dense(*layers, order, 1, Drawn(np.arange(1), np.arange(1), rotations(order, 1, seed=4)))
    for one, expected in zip(found, (np.abs(r).max(axis=1), np.abs(r).max(axis=0)), strict=True):
        np.testing.assert_allclose(one.r[:, 0], np.tile(expected, 2), atol=1e-6)
    if basis == "pca":  # the two common directions are found whatever the streams' own axes are
        assert (found[0].r[:2, 0] > 0.95).all()
        assert (found[0].r[2:6, 0] < 0.2).all()


def test_features_are_compared_with_a_basis_and_only_they_have_a_quality(stream, tmp_path):
    """Features that are the shared directions, where these are large, against principal components of the stream."""
    stores, _ = stream
    paths, _ = stores["b"]
    rng = np.random.default_rng(7)
    common = rng.standard_normal((N_TOKENS, 2)) * [5, 3]  # what the stream was made of
    codes = write_codes(tmp_path / "codes", np.maximum(common - 2, 0).astype(np.float32))
    sides = {"a": {"model": "a", "variant": "topk", "seed": 0}, "b": {"model": "b", "basis": "pca"}}
    comparison = Comparison(setting="any", **sides)
    text = read_text(paths, paths, MATCHING)
    both = read_sides(comparison, ([0], [0]), ([codes], paths), text)
    write_block(*both, text.order, MATCHING, tmp_path / "part.safetensors")
    out = tmp_path / "mixed"
    write_comparison(comparison, *both, [tmp_path / "part.safetensors"], text.order, MATCHING, STATISTICS, out)
    features = pd.read_parquet(out / "features.parquet").query("direction == 'a_to_b'")
    assert set(features.best_feature % 6) == {0, 1}
    assert (features.mppc > 0.6).all()
    assert (features.heldout_mppc > 0.6).all()
    measured = {"kind": ["sae"], "model": ["a"], "variant": ["topk"], "seed": [0], "layer": [0]}
    write_table(tmp_path / "saes.parquet", measured | {"L0": [2.0], "explained_variance": [0.9]})
    [row] = quality_table([out], tmp_path / "saes.parquet").to_dict("records")
    assert (row["model"], row["direction"], row["L0"]) == ("a", "a_to_b", 2.0)
    assert row["mean_mppc"] == pytest.approx(features.mppc.mean())


def test_where_shards_meet_makes_no_difference(tmp_path):
    array = torch.from_numpy(values(5, 4))
    order = order_by_document(np.arange(N_TOKENS) // 10, [], 60, seed=1)
    found = []
    for name, sizes in {"one": [N_TOKENS], "many": [1, 4095, 1, 4000, 903]}.items():
        layer = DenseLayer([ActivationStore(write_store(tmp_path / name, array, sizes))], order)
        found.append(match_dense(layer, layer, order, 2, Drawn(*[np.arange(1)] * 2, rotations(order, 1, 2)))[0])
    for one, other in zip(*found, strict=True):
        assert one.tobytes() == other.tobytes()


def test_layers_without_shards_and_sites_of_other_tokens_are_named(tmp_path):
    described = {"model": "a", "split": "evaluation"}
    shards = write_store(tmp_path / "x", torch.randn(40, 3), [40], site="mamba.0.ssm_in", **described)
    with pytest.raises(StudyError, match=r"no shard of a holds values of layer 1; given are mamba\.0\.ssm_in"):
        read_dense_layers("a", [0, 1], shards)
    shards += write_store(tmp_path / "y", torch.randn(30, 3), [30], site="mamba.0.gate", **described)
    with pytest.raises(StudyError, match=r"a: the shards of mamba\.0\.gate hold other tokens than those of mamba\.0"):
        read_dense_layers("a", [0], shards)


def write_codes(folder, codes):
    """A folder of the features stage with codes [T, F]."""
    entries = scipy.sparse.coo_array(codes)
    columns = {"token": entries.row, "feature": entries.col}
    table = {name: column.astype(np.int32) for name, column in columns.items()} | {"value": entries.data}
    with replacing(folder) as made:
        made.mkdir()
        write_table(made / "codes.parquet", table)
        write_json(made / "summary.json", {"n_tokens": codes.shape[0], "d_sae": codes.shape[1]})
    return folder


def compared(folder, rows, codes):
    """The features table of a comparison of sides of one layer each, as the commands make it."""
    text = read_text(*rows, MATCHING)
    sides = read_sides(COMPARISON, ([0], [0]), ([codes[0]], [codes[1]]), text)
    folder.mkdir()
    write_block(*sides, text.order, MATCHING, folder / "part.safetensors")
    write_comparison(
        COMPARISON, *sides, [folder / "part.safetensors"], text.order, MATCHING, STATISTICS, folder / "out"
    )
    return (folder / "out" / "features.parquet").read_bytes()


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Codes of two sides, and stores of the tokens of each tokenizer: "t", and "u" that has the same tokens."""
    folder = tmp_path_factory.mktemp("sides")
    rng = np.random.default_rng(0)
    a, b = (rng.exponential(1, (1000, 12)) * (rng.random((1000, 12)) < 0.1) for _ in range(2))
    b[:, :6] = a[:, 5::-1] * (0.5 + rng.random((1000, 6)))
    codes = [write_codes(folder / name, x.astype(np.float32)) for name, x in (("a", a), ("b", b))]
    stores = {t: write_store(folder / t, torch.zeros(1000, 2), [600, 400], tokenizer=t) for t in ("t", "u")}
    return codes, stores


def test_equal_tokens_of_two_tokenizers_are_compared_as_those_of_one(sides, tmp_path):
    """The path over spans of text gives the bytes of the path over tokens."""
    codes, stores = sides
    tokens = compared(tmp_path / "tokens", (stores["t"], stores["t"]), codes)
    spans = compared(tmp_path / "spans", (stores["t"], stores["u"]), codes)
    assert spans == tokens


def test_other_tokens_are_compared_over_the_spans_that_both_share(sides, tmp_path):
    """Side b's tokenizer has one token where a's has two: both sides' codes are pooled over a's pairs."""
    codes, stores = sides
    rows = ActivationStore(stores["t"]).rows()
    halves = {
        "documents": rows.documents[::2],
        "starts": rows.starts[::2],
        "ends": rows.ends[1::2],
        "positions": rows.positions[::2] // 2,
        "tokens": rows.tokens[::2],
    }
    coarse = write_coarse(tmp_path / "v", {name: np.ascontiguousarray(x) for name, x in halves.items()})
    pooled_a, pooled_b = (np.maximum(x[::2], x[1::2]) for x in map(read_dense, codes))
    folder = write_codes(tmp_path / "pooled_b", pooled_b)
    compared(tmp_path / "spans", (stores["t"], coarse), [codes[0], folder])
    table = pd.read_parquet(tmp_path / "spans" / "out" / "features.parquet")
    own = table[table.direction == "a_to_b"]
    np.testing.assert_allclose(own.mppc, top(correlations(pooled_a, pooled_b), 1)[0][:, 0], atol=1e-6)


def read_dense(folder):
    table = pd.read_parquet(folder / "codes.parquet")
    dense = np.zeros((1000, 12), np.float32)
    dense[table.token, table.feature] = table.value
    return dense


def write_coarse(folder, rows):
    """One shard with these rows, of tokenizer "v"."""
    described = {"model": "m", "site": "resid_post.0", "split": "train", "sample_seed": 0, "tokenizer": "v"}
    described |= {"products": "float32", "product_error": 0.0, "device": "cpu"}
    described |= {"first_row": 0, "first_sequence": 0, "sequences": 1}
    folder.mkdir()
    writer = ShardWriter(folder / "shard_0", described, TokenRows(**rows), (2,), "fp32")
    writer.write(torch.zeros(len(rows["tokens"]), 2))
    writer.finish()
    return [folder / "shard_0"]


def test_codes_of_other_tokens_are_refused(sides, tmp_path):
    codes, stores = sides
    short = write_codes(tmp_path / "short", np.ones((999, 12), np.float32))
    with pytest.raises(StudyError, match="short: codes of 999 tokens, but 1000 tokens were cached; remake"):
        compared(tmp_path / "out", (stores["t"], stores["t"]), [codes[0], short])


def test_stores_of_other_tokens_are_refused(sides, tmp_path):
    _, stores = sides
    other = write_store(tmp_path / "other", torch.zeros(1000, 2), [500, 500])
    with pytest.raises(StudyError, match="different tokens; make both from the same sample"):
        read_text(stores["t"], other, MATCHING)


def test_neurons_of_two_tokenizers_are_refused(sides):
    _, stores = sides
    side = {"model": "m", "basis": "neurons"}
    neurons = Comparison(setting="neurons", a=side, b=side)
    text = read_text(stores["t"], stores["u"], MATCHING)
    with pytest.raises(StudyError, match="m: neurons are compared token by token; both models must have one tokenizer"):
        read_sides(neurons, ([0], [0]), (stores["t"], stores["u"]), text)


def test_every_pair_of_layers_comes_once_and_has_the_sums_of_whole_layers():
    """Of more layers than are held at a time; without their order by token."""
    rng = np.random.default_rng(5)
    order = order_by_document(np.arange(600) // 10, [], 60, seed=1)
    codes = {n: scipy.sparse.random_array((600, 8), density=0.2, rng=rng, format="csr") for n in range(9)}
    a, b = (in_memory(name, {n: codes[n] for n in numbers}) for name, numbers in (("a", range(7)), ("b", (7, 8))))
    features, partners = np.arange(8), np.arange(8)[::-1].copy()
    seen = []
    for x, of_a, y, of_b in pairs_of_layers(a, b, order, "resampling"):
        seen.append((x, y))
        assert len(of_a.token_values) == len(of_b.token_values) == 0
        whole = group_sums(a.load(x, order), b.load(y, order), features, partners, order, 30)
        np.testing.assert_array_equal(group_sums(of_a, of_b, features, partners, order, 30), whole)
        assert whole[4].any()
    assert sorted(seen) == [(x, y) for x in range(7) for y in (7, 8)]
