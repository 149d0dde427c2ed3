"""The stage's tables on small real models, dictionaries and text, against plain forms."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats
import torch
from typer.testing import CliRunner

from tests.conftest import tiny_model
from tests.unit.analysis.endpoint import Server
from universality.alignment.bootstrap import resample_weights
from universality.alignment.sides import in_memory
from universality.alignment.token_order import order_by_document
from universality.analysis.contexts import find_contexts
from universality.analysis.features import write_features
from universality.analysis.held_out import HeldOut, read_held_out
from universality.analysis.idiosyncratic import (
    Folders,
    documents_of,
    measure_effect,
    most_idiosyncratic,
    write_idiosyncratic,
)
from universality.analysis.logits import logit_effects
from universality.analysis.settings import AgainstSettings, FeaturesJob, Held, IdiosyncraticJob, IdiosyncraticSettings
from universality.analysis.similarity import MEASURES, resampled_mppc, write_similarity
from universality.cli import application
from universality.corpus.tokenizer import load_tokenizer
from universality.errors import StudyError
from universality.models.language_model import LanguageModel
from universality.saes.build import build_sae
from universality.saes.folder import write_sae
from universality.saes.settings import TopKSettings
from universality.storage import read_table, write_json, write_table

D_SAE, SEQUENCES = 24, 20
HELD = {
    "corpus": "evaluation",
    "sequences": SEQUENCES,
    "run": {"sample_seed": 3, "products": "float32", "device": "cpu"},
}
CONTEXTS = {"top": 5, "quantiles": 2, "random": 3, "seed": 1}
TRUNCATION = {"features": 6, "contexts": 2, "seed": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("mamba", vocab_size=304)


@pytest.fixture(scope="module")
def sae():
    generator = torch.Generator().manual_seed(0)
    made = build_sae(TopKSettings(k=3, k_aux=8, aux_coefficient=0.03125), D_SAE, [16]).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def folders(corpus, model, sae, tmp_path_factory):
    """The SAE's codes of resid_post.1 on the sample, and the folder of its features."""
    base = tmp_path_factory.mktemp("analysed")
    from universality.activations.sample import read_sample

    sample = read_sample(corpus / "tokens", "evaluation", SEQUENCES, 3)
    tokens = torch.from_numpy(sample.tokens.astype(np.int64))
    stream = model.run(tokens, capture=["resid_post.1"]).captured["resid_post.1"][torch.from_numpy(sample.kept)]
    pattern, values = sae.encode_sparse(stream)
    columns = {"token": np.repeat(np.arange(len(stream), dtype=np.int32), np.diff(pattern.starts))}
    columns |= {"feature": pattern.features.astype(np.int32), "value": values.numpy()}
    (base / "codes").mkdir()
    write_table(base / "codes" / "codes.parquet", columns)
    write_json(base / "codes" / "summary.json", {"n_tokens": len(stream), "d_sae": D_SAE})
    job = FeaturesJob(layer=1, held=HELD, contexts=CONTEXTS, truncation=TRUNCATION)
    held = read_held_out(base / "codes", corpus / "tokens", job.held)
    write_features(job, held, sae, model, base / "features")
    return base


@pytest.fixture(scope="module")
def held(folders, corpus) -> HeldOut:
    return read_held_out(folders / "codes", corpus / "tokens", Held(**HELD))


def test_directions_add_to_the_logits_what_is_told(family):
    model = tiny_model(family)
    rng = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 16, generator=rng)
    # What a norm takes off of a direction is along the stream and, with centring, along ones.
    span = torch.linalg.qr(torch.stack([x, torch.ones(16)], 1)).Q
    direction = other - span @ (span.T @ other)
    moved = model.unembed((x + 1e-3 * direction)[None]) - model.unembed(x[None])
    told = model.promoting() @ direction
    assert torch.cosine_similarity(moved[0], told, dim=0) > 0.999
    found = logit_effects(torch.stack([direction, x]), model.promoting(), 5)
    assert found.tokens[0].tolist() == told.argsort(descending=True)[:5].tolist()
    for row, one in enumerate((direction, x)):
        kurtosis = scipy.stats.kurtosis((model.promoting() @ one).double().numpy())
        assert found.peakedness[row] == pytest.approx(kurtosis, abs=1e-3)


def test_text_around_a_row_is_of_its_sequence_and_document(held, corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    sample = held.sample
    for row in (0, 5, 40, len(held.rows.tokens) - 1):
        [sequence], at = held.sequences(np.array([row])), held.rows.positions[row]
        line = sample.tokens[sequence]
        ends = np.flatnonzero(line == held.end_of_text)
        first = max([end + 1 for end in ends if end < at], default=0)
        last = min([end for end in ends if end > at], default=len(line))
        assert held.text_before(row).tolist() == line[first : at + 1].tolist()
        marked = held.marked(row, tokenizer)
        assert marked.token == tokenizer.decode([int(line[at])])
        assert marked.before == tokenizer.decode(line[max(first, at - 16) : at].tolist())
        assert marked.after == tokenizer.decode(line[at + 1 : min(last, at + 5)].tolist())


def test_codes_of_other_tokens_are_refused(folders, corpus):
    with pytest.raises(StudyError, match=r"codes of \d+ tokens, but .* in 10 sequences of evaluation"):
        read_held_out(folders / "codes", corpus / "tokens", Held(**HELD | {"sequences": 10}))


def test_tables_of_features_hold_what_the_codes_say(folders, held, sae, model):
    measures = read_table(folders / "features" / "measures.parquet").to_pandas()
    contexts = read_table(folders / "features" / "contexts.parquet").to_pandas()
    dense = held.codes.toarray()
    assert measures.frequency.tolist() == pytest.approx((dense != 0).mean(0))
    assert measures.dead.tolist() == (dense != 0).sum(0).__eq__(0).tolist()
    np.testing.assert_array_equal(contexts.value, dense[contexts.row, contexts.feature])
    # In the whole of a sequence other documents come before a text: a feature may be silent on the text alone.
    assert 1 <= measures.context_needed.notna().sum() <= min(6, (~measures.dead).sum())
    assert measures.complexity[~measures.dead].between(0, 1).all()
    found = find_contexts(held.codes, held.rows, 5, 2, 3, 1)
    assert contexts.row.tolist() == found.row.tolist()
    needed = measures[measures.context_needed.notna()].iloc[0]
    assert 1 <= needed.context_needed <= 16


def test_documents_are_counted_once(held):
    before = held.codes.toarray()
    expected = [len(set(held.rows.documents[before[:, f] != 0])) for f in range(D_SAE)]
    assert documents_of(held).tolist() == expected
    np.testing.assert_array_equal(held.codes.toarray(), before)


def idiosyncratic(**changes) -> IdiosyncraticSettings:
    values = {"listed": 3, "min_documents": 5, "contexts": 3, "batch_size": 4, "bootstrap_seed": 0}
    return IdiosyncraticSettings(**values | {"bootstrap_samples": 50, "confidence": 0.9} | changes)


def test_complex_unmatched_features_of_enough_documents_are_listed():
    table = pd.DataFrame(
        {
            "feature": range(6),
            "complexity": [0.9, 0.8, 0.1, 0.95, np.nan, 0.5],
            "mppc": [0.1, 0.2, 0.9, 0.05, 0.0, 0.5],
            "documents": [9, 9, 9, 2, 9, 9],
        }
    )
    assert most_idiosyncratic(table, idiosyncratic()).feature.tolist() == [0, 1, 5]


def test_the_effect_is_that_of_running_without_the_feature(held, sae, model, folders):
    contexts = read_table(folders / "features" / "contexts.parquet").to_pandas()
    feature = int(contexts.feature.iloc[0])
    rows = contexts[(contexts.feature == feature) & (contexts.kind == "top")].row.to_numpy()
    one = pd.Series({"layer": 1, "feature": feature})
    found = measure_effect(model, sae, one, held, rows, idiosyncratic())
    changes = []
    for sequence in np.unique(held.sequences(rows)):
        tokens = torch.from_numpy(held.sample.tokens[sequence][None].astype(np.int64))
        kept = torch.from_numpy(held.sample.kept[sequence])
        stream = model.run(tokens, capture=["resid_post.1"]).captured["resid_post.1"]
        code = torch.where(kept, sae.encode(stream[0])[:, feature], torch.zeros(()))
        without = stream - code[:, None] * sae.W_dec[feature]
        losses = [model.token_losses(tokens, edits=edits)[0] for edits in ({}, {"resid_post.1": partial(put, without)})]
        changes.append((losses[1] - losses[0])[(code[:-1] != 0) & kept[:-1]])
    changes = torch.cat(changes)
    assert found["predictions"] == len(changes)
    assert found["effect"] == pytest.approx(float(changes.mean()), abs=1e-5)
    assert found["low"] <= found["effect"] <= found["high"]


def test_features_of_one_side_are_listed_over_layers_or_there_are_none(folders, model, sae, corpus, tmp_path):
    model.hf.save_pretrained(tmp_path / "model")
    load_tokenizer(corpus / "tokenizer").save_pretrained(tmp_path / "model")
    write_sae(tmp_path / "sae", sae, {})
    unmatched = pd.DataFrame({"direction": "b_to_a", "layer": [0, 1, 1], "feature": [3, 5, 7], "mppc": [0.1, 0.2, 0.3]})
    unmatched = unmatched.assign(heldout_mppc=0.1, p_value=0.5, best_layer=0, best_feature=0)
    (tmp_path / "comparison").mkdir()
    unmatched.to_parquet(tmp_path / "comparison" / "unmatched.parquet")
    by_layer = [dict.fromkeys((0, 1), path) for path in (tmp_path / "sae", folders / "codes", folders / "features")]
    places = (tmp_path / "comparison", tmp_path / "model", corpus / "tokens", corpus / "tokenizer")
    measures = read_table(folders / "features" / "measures.parquet").to_pandas()
    for side, expected in (
        ("b", sorted(set(unmatched.feature[~measures.dead[unmatched.feature].to_numpy()]))),
        ("a", []),
    ):
        changes = {"side": side, "layers": [0, 1], "held": HELD, "idiosyncratic": idiosyncratic(min_documents=1)}
        out = tmp_path / side
        write_idiosyncratic(IdiosyncraticJob(**changes), Folders(*by_layer), *places, out)
        listed = read_table(out / "features.parquet").to_pandas()
        assert sorted(listed.feature) == expected
        assert listed["rank"].tolist() == list(range(len(expected)))
        assert (listed.predictions > 0).all()
        contexts = read_table(out / "contexts.parquet").to_pandas()
        assert set(contexts["rank"]) == set(listed["rank"])
        assert {"before", "token", "after", "value"} <= set(contexts.columns)


def put(value: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    return value


AGAINST = AgainstSettings(
    features=100, feature_seed=0, bootstrap_seed=1, bootstrap_samples=40, confidence=0.95
)  # fmt: skip


def compared(tmp_path, n_features=60, n_tokens=600):
    """Two sides whose feature i is the same but for noise that grows with i, as complexity does; all else is chance."""
    rng = np.random.default_rng(0)
    fires = rng.random((n_tokens, n_features)) < 0.3
    values = rng.exponential(1, fires.shape) * fires
    noisy = values + fires * rng.exponential(1, fires.shape) * np.linspace(0.1, 4, n_features)
    sides = tuple(
        in_memory(name, {0: scipy.sparse.csr_array(x.astype(np.float32))}) for name, x in (("a", values), ("b", noisy))
    )
    order = order_by_document(np.arange(n_tokens) // 10, [], 64, 0)
    r = [np.corrcoef(values[:, i], noisy[:, i])[0, 1] for i in range(n_features)]
    common = {"layer": 0, "feature": range(n_features), "mppc": r, "heldout_mppc": r, "p_value": 0.01, "best_layer": 0}
    common |= {"best_feature": range(n_features), "dead": False}
    rows = [pd.DataFrame(common | {"direction": d}) for d in ("a_to_b", "b_to_a")]
    (tmp_path / "comparison").mkdir()
    pd.concat(rows).to_parquet(tmp_path / "comparison" / "features.parquet")
    measures = {name: rng.random(n_features) for name in MEASURES} | {"complexity": np.linspace(0, 1, n_features)}
    measures |= {"feature": np.arange(n_features, dtype=np.int32), "frequency": fires.mean(0)}
    (tmp_path / "measures").mkdir()
    pd.DataFrame(measures).to_parquet(tmp_path / "measures" / "measures.parquet")
    return sides, order, rows, noisy, values


def test_what_moves_with_similarity_is_told_from_what_does_not(tmp_path):
    sides, order, *_ = compared(tmp_path)
    folders = {0: tmp_path / "measures"}
    out = tmp_path / "out"
    write_similarity(sides, order, tmp_path / "comparison", (folders, folders), ({}, {}), AGAINST, out)
    table = read_table(out / "correlations.parquet").to_pandas().set_index(["direction", "measure", "kind"])
    for direction in ("a_to_b", "b_to_a"):
        for kind in ("spearman", "partial"):
            row = table.loc[direction, "complexity", kind]
            assert row.value < -0.9
            assert max(row.high, row.high_documents) < -0.7
            assert row.low_documents <= row.value <= row.high_documents
    others = table.drop("complexity", level="measure")
    assert ((others.low <= 0) & (others.high >= 0)).mean() > 0.8
    bins = read_table(out / "bins.parquet").to_pandas()
    means = bins[(bins.measure == "complexity") & (bins.direction == "a_to_b")].mean_mppc
    assert (np.diff(means) < 0).all()
    assert bins.groupby(["direction", "measure"]).n.sum().eq(60).all()
    assert len(read_table(out / "agreement.parquet")) == 0


def test_resampled_mppc_is_the_correlation_on_drawn_documents(tmp_path):
    sides, order, tables, noisy, values = compared(tmp_path)
    found = resampled_mppc(sides, order, tables, AGAINST)
    weights = resample_weights(len(order.groups) - 1, 40, 1)
    for resample in (0, 7):
        drawn = np.concatenate(
            [
                np.tile(order.rows[start:stop], int(times))
                for start, stop, times in zip(order.groups[:-1], order.groups[1:], weights[resample], strict=True)
                if times
            ]
        )
        for feature in (0, 31):
            expected = np.corrcoef(values[drawn, feature], noisy[drawn, feature])[0, 1]
            assert found[0][resample, feature] == pytest.approx(expected, abs=1e-6)
            assert found[1][resample, feature] == pytest.approx(expected, abs=1e-6)


def test_partners_are_sought_in_the_layers_that_they_are_of():
    """Layers of side a, more than are held at a time, against two of b, whose numbers are not their places."""
    rng = np.random.default_rng(0)
    values = {number: rng.random((200, 6)) * (rng.random((200, 6)) < 0.5) for number in (1, 2, 3, 4, 5, 6, 7)}
    sides = tuple(
        in_memory(name, {n: scipy.sparse.csr_array(values[n].astype(np.float32)) for n in numbers})
        for name, numbers in (("a", (1, 2, 3, 4, 6)), ("b", (5, 7)))
    )
    order = order_by_document(np.arange(200) // 10, [], 64, 0)
    rows = {"layer": [1, 2, 6], "feature": [0, 1, 2], "best_layer": [7, 5, 5], "best_feature": [1, 2, 3]}
    back = {"layer": [5, 7], "feature": [4, 0], "best_layer": [6, 1], "best_feature": [5, 0]}
    found = resampled_mppc(sides, order, [pd.DataFrame(rows), pd.DataFrame(back)], AGAINST)
    for table, r in zip((rows, back), found, strict=True):
        for k in range(len(table["layer"])):
            x = values[table["layer"][k]][:, table["feature"][k]]
            y = values[table["best_layer"][k]][:, table["best_feature"][k]]
            assert np.isfinite(r[:, k]).all()
            assert r[:, k].mean() == pytest.approx(np.corrcoef(x, y)[0, 1], abs=0.05)


def test_layers_judged_by_different_models_are_refused(tmp_path):
    sides, order, *_ = compared(tmp_path)
    folders = {}
    for number, name in enumerate(("one", "two")):
        folders[number] = tmp_path / name
        folders[number].mkdir()
        write_table(folders[number] / "judged.parquet", {"feature": np.arange(2), "judge": [name, name]})
    measures = {0: tmp_path / "measures"}
    with pytest.raises(StudyError, match=r"judged by different models, remake one: .*one: one; .*two: two"):
        write_similarity(
            sides, order, tmp_path / "comparison", (measures, measures), (folders, {}), AGAINST, tmp_path / "out"
        )


def test_a_judge_is_set_beside_the_measures(tmp_path):
    sides, order, *_ = compared(tmp_path)
    (tmp_path / "judged").mkdir()
    complexity = np.repeat([1.0, 2, 3, 4, 5], 12)
    columns = {
        "judge": ["m"] * 60,
        "feature": np.arange(60, dtype=np.int32),
        "complexity": complexity,
        "monosemanticity": complexity % 2 + 1,
    }
    columns |= {"detection": np.full(60, np.nan), "fuzzing": np.linspace(0.5, 1, 60)}
    write_table(tmp_path / "judged" / "judged.parquet", columns)
    measures, judged = {0: tmp_path / "measures"}, {0: tmp_path / "judged"}
    out = tmp_path / "out"
    write_similarity(sides, order, tmp_path / "comparison", (measures, measures), (judged, {}), AGAINST, out)
    agreement = read_table(out / "agreement.parquet").to_pandas()
    assert set(agreement.direction) == {"a_to_b"}
    row = agreement[(agreement.measure == "complexity") & (agreement.score == "judge_complexity")].iloc[0]
    assert row.value == pytest.approx(scipy.stats.spearmanr(complexity, np.arange(60)).statistic)
    bins = read_table(out / "bins.parquet").to_pandas()
    assert bins[bins.measure == "judge_complexity"]["from"].tolist() == [1, 2, 3, 4, 5]
    correlations_of = read_table(out / "correlations.parquet").to_pandas()
    assert correlations_of[correlations_of.measure == "detection"].value.isna().all()


def test_the_command_asks_an_endpoint_once(folders, corpus, tmp_path, monkeypatch):
    server = Server()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("UNIVERSALITY_JUDGE_MODEL", "m")
    judge = {"kind": "endpoint", "features": 4, "tested": 3, "seed": 0, "per_minute": 60000.0, "timeout": 5.0}
    arguments = ["analysis", "judge", "--settings", json.dumps({"held": HELD, "judge": judge})]
    arguments += ["--features", folders / "features", "--codes", folders / "codes", "--tokens", corpus / "tokens"]
    arguments += ["--tokenizer", corpus / "tokenizer", "--cache", tmp_path / "answers", "--out"]
    server.script = ["no JSON at all"]
    first = CliRunner().invoke(application(), [*map(str, arguments), str(tmp_path / "one")])
    assert first.exit_code == 0, first.output
    asked = len(server.asked)
    table = read_table(tmp_path / "one" / "judged.parquet").to_pandas()
    assert len(table) == 4
    assert table.malformed.tolist()[0] == 1
    assert np.isnan(table.complexity[0])
    assert table.complexity[1:].tolist() == [2, 2, 2]
    tested = table[["detection", "fuzzing"]].stack().dropna()  # a feature that fires everywhere has no silent text
    assert tested.between(0, 1).all()
    assert asked == 4 + len(tested)
    assert len(tested) >= 3
    CliRunner().invoke(application(), [*map(str, arguments), str(tmp_path / "two")])
    assert len(server.asked) == asked
    assert (tmp_path / "two" / "judged.parquet").read_bytes() == (tmp_path / "one" / "judged.parquet").read_bytes()
    monkeypatch.delenv("OPENAI_BASE_URL")
    refused = CliRunner().invoke(application(), [*map(str, arguments), str(tmp_path / "three")])
    assert isinstance(refused.exception, StudyError)
    assert "judge: the environment has no OPENAI_BASE_URL" in str(refused.exception)
