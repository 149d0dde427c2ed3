"""Dashboards against counting by hand, token by token."""

import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import torch

from tests.conftest import LENGTH, tiny_model, write_store
from universality.activations.format import TokenRows
from universality.corpus.tokenizer import identity, load_tokenizer
from universality.errors import StudyError
from universality.saes.build import build_sae
from universality.saes.folder import save_sae
from universality.saes.neuronpedia import Described, _histogram, write_dashboards
from universality.saes.neuronpedia_settings import NeuronpediaSettings
from universality.saes.settings import TopKSettings
from universality.storage import write_json, write_table

D, F, V, T, PER_SEQUENCE, REACH = 4, 5, 12, 40, 10, 3
SETTINGS = {"model_id": "m", "sae_set": "s", "reach": REACH, "top": 3, "bins": 4, "per_bin": 2, "logits": 2}
SETTINGS |= {"bars": 6, "features_per_file": 3}


def random_sae(d: int, n_features: int):
    sae = build_sae(TopKSettings(k=2, k_aux=1, aux_coefficient=0.0), n_features, [d])
    sae.initialise(torch.zeros(d), torch.Generator().manual_seed(0))
    return sae.eval().requires_grad_(False)


def random_codes(n_tokens: int, n_features: int) -> scipy.sparse.csr_array:
    """Some tokens active for each feature, none for the last one."""
    rng = np.random.default_rng(0)
    dense = rng.exponential(size=(n_tokens, n_features)) * (rng.random((n_tokens, n_features)) < 0.4)
    dense[:, -1] = 0
    return scipy.sparse.csr_array(dense.astype(np.float32))


ROWS = TokenRows(
    np.random.default_rng(1).integers(0, V, T).astype(np.int32),
    np.zeros(T, np.int32),
    np.tile(np.arange(1, PER_SEQUENCE + 1), T // PER_SEQUENCE).astype(np.int32),
    np.arange(T, dtype=np.int32),
    np.arange(1, T + 1, dtype=np.int32),
)
STRINGS = [f"t{token}" for token in range(V)]
SAE, CODES = random_sae(D, F), random_codes(T, F)
W_U = torch.randn(V + 2, D, generator=torch.Generator().manual_seed(2))  # two rows pad the vocabulary
DESCRIBED = Described("resid_post.3", ROWS, STRINGS, W_U)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("dashboards") / "out"
    write_dashboards(SAE, CODES, DESCRIBED, NeuronpediaSettings(**SETTINGS), out)
    files = [json.loads((out / f"batch-{number}.json").read_text()) for number in (0, 1)]
    assert len(list(out.iterdir())) == 2
    for file in files:
        assert (file["model_id"], file["layer"], file["sae_set"]) == ("m", 3, "s")
    return [feature for file in files for feature in file["features"]]


def test_every_feature_is_there_once_with_its_keys(features):
    assert [feature["feature_index"] for feature in features] == list(range(F))
    histograms = {f"{kind}_hist_data_bar_{what}" for kind in ("freq", "logits") for what in ("heights", "values")}
    tokens = {f"{sign}_{what}" for sign in ("neg", "pos") for what in ("str", "values")}
    for feature in features:
        assert feature.keys() == {"feature_index", "frac_nonzero", "activations"} | histograms | tokens
        for context in feature["activations"]:
            places = {"bin_min", "bin_max", "bin_contains", "qualifying_token_index"}
            assert context.keys() == {"tokens", "values"} | places


def test_density_and_histograms(features):
    codes, effects = CODES.toarray(), (SAE.W_dec @ W_U[:V].T).numpy()
    for index, feature in enumerate(features):
        active = codes[codes[:, index] > 0, index]
        assert feature["frac_nonzero"] == len(active) / T
        for name, values in (("freq", active), ("logits", effects[index])):
            heights, centres = (feature[f"{name}_hist_data_bar_{what}"] for what in ("heights", "values"))
            if not len(values):
                assert heights == centres == []
                continue
            width = (values.max() - values.min()) / 6
            expected = values.min() + width * (np.arange(6) + 0.5)
            np.testing.assert_allclose(centres, expected, rtol=1e-3, atol=1e-3)
            counted = np.bincount(np.minimum((values - values.min()) / width, 5).astype(int), minlength=6)
            assert heights == counted.tolist()


def test_the_logits_it_moves(features):
    for feature, effect in zip(features, (SAE.W_dec @ W_U[:V].T).numpy(), strict=True):
        order = np.argsort(effect)
        assert feature["neg_str"] == [STRINGS[token] for token in order[:2]]
        assert feature["pos_str"] == [STRINGS[token] for token in order[::-1][:2]]
        np.testing.assert_allclose(feature["neg_values"], effect[order[:2]], rtol=1e-3)
        np.testing.assert_allclose(feature["pos_values"], effect[order[::-1][:2]], rtol=1e-3)


def window(row: int, codes: np.ndarray) -> dict:
    sequence = row // PER_SEQUENCE
    inside = [r for r in range(row - REACH, row + REACH + 1) if r // PER_SEQUENCE == sequence and 0 <= r < T]
    return {
        "tokens": [STRINGS[ROWS.tokens[r]] for r in inside],
        "values": [codes[r] for r in inside],
        "qualifying_token_index": inside.index(row),
    }


def test_contexts_of_the_largest_activations_then_of_each_interval(features):
    for feature, codes in zip(features, CODES.toarray().T, strict=True):
        if not codes.any():
            assert feature["activations"] == []
            continue
        expected, largest = [], float(codes.max())
        for row in np.argsort(-codes)[:3]:
            expected.append((-1, largest, -1, row))
        for low in (3, 2, 1, 0):
            lower, upper = largest * low / 4, largest * (low + 1) / 4
            inside = [row for row in np.argsort(-codes) if lower <= codes[row] <= upper and codes[row] > 0]
            share = float(((codes >= lower) & (codes <= upper)).mean())
            ends = [inside[0], inside[-1]] if len(inside) > 1 else inside
            expected += [(lower, upper, share, row) for row in ends]
        assert len(feature["activations"]) == len(expected)
        for context, (lower, upper, share, row) in zip(feature["activations"], expected, strict=True):
            due = window(int(row), codes)
            assert context["tokens"] == due["tokens"]
            assert context["qualifying_token_index"] == due["qualifying_token_index"]
            np.testing.assert_allclose(context["values"], due["values"], rtol=1e-3)
            found = context["bin_min"], context["bin_max"], context["bin_contains"]
            np.testing.assert_allclose(found, (lower, upper, share), rtol=1e-6)


WRONG = [
    ({"codes": random_codes(T, F + 1)}, "--features: has codes of 6 features, but the dictionary has 5"),
    ({"codes": random_codes(T - 1, F)}, "--features: has codes of 39 tokens, but --activations have 40 rows"),
    ({"by": DESCRIBED._replace(unembedding=W_U[:, :3])}, "--model: its residual stream has width 3, but"),
    ({"by": DESCRIBED._replace(strings=STRINGS[:5])}, "--tokenizer: has 5 tokens, but --activations has token 11"),
    ({"by": DESCRIBED._replace(site="embed")}, "--activations: the site 'embed' is in no layer"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_what_does_not_fit_is_named(changed, message, tmp_path):
    given = {"codes": CODES, "by": DESCRIBED} | changed
    with pytest.raises(StudyError, match=message):
        write_dashboards(SAE, given["codes"], given["by"], NeuronpediaSettings(**SETTINGS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_histograms_of_values_that_hardly_differ():
    for values in ([1.0, 1.0000001], [100.0, 100.0001], [3.0, 3.0000002, 3.000001], [2.0, 2.0]):
        heights, centres = _histogram(np.array(values, dtype=np.float32), 50)
        assert sum(heights) == len(values)
        assert len(centres) == 50


def test_the_command(corpus, tmp_path):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    tiny_model("gpt_neox", len(tokenizer)).hf.save_pretrained(tmp_path / "model")
    save_sae(random_sae(16, F), tmp_path / "sae", {})
    described = {"model": "model", "site": "resid_post.1", "split": "evaluation", "tokenizer": identity(tokenizer)}
    shards = write_store(tmp_path / "store", torch.randn(LENGTH, 16), [10, LENGTH - 10], **described)
    codes = random_codes(LENGTH, F).tocoo()
    table = {"token": codes.coords[0], "feature": codes.coords[1], "value": codes.data}
    write_table(tmp_path / "codes" / "codes.parquet", table)
    write_json(tmp_path / "codes" / "summary.json", {"n_tokens": LENGTH, "d_sae": F})
    command = [sys.executable, "-m", "universality.cli", "saes", "export", tmp_path / "sae", "--to", "neuronpedia"]
    command += ["--features", tmp_path / "codes", "--tokenizer", corpus / "tokenizer", "--model", tmp_path / "model"]
    command += [word for shard in shards for word in ("--activations", shard)]
    command += ["--settings", '{"model_id": "neox", "sae_set": "topk"}', "--out", tmp_path / "out"]
    subprocess.run(command, check=True)
    file = json.loads((tmp_path / "out" / "batch-0.json").read_text())
    assert (file["model_id"], file["layer"], file["sae_set"]) == ("neox", 1, "topk")
    assert len(file["features"]) == F
    context = file["features"][0]["activations"][0]
    assert context["values"][context["qualifying_token_index"]] == max(context["values"]) > 0
