"""Features are taken out exactly, in groups that differ in what they should alone, and planted carriers are found."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from scipy.optimize import linear_sum_assignment

from tests.conftest import tiny_model
from universality.ablation.effects import (
    DIFFERENCE,
    KINDS,
    LOSS,
    ablation_columns,
    ablation_edits,
    measure_loss,
    measure_task,
)
from universality.ablation.groups import (
    GROUPS,
    FeatureStatistics,
    balance,
    choose_groups,
    feature_statistics,
    group,
    mean_difference,
    pair,
)
from universality.ablation.settings import FeatureAblationSettings
from universality.activations.sample import Sample
from universality.circuits.columns import METRICS
from universality.circuits.metrics import measure
from universality.circuits.planted import planted_transformer
from universality.circuits.tasks.induction import make_task
from universality.errors import StudyError
from universality.features.codes import Codes
from universality.saes.build import build_sae
from universality.saes.settings import BatchTopKSettings, ReluL1Settings, TopKSettings, TranscoderSettings
from universality.settings import parse
from universality.storage import read_table, write_table

D, D_SAE, VOCAB = 16, 40, 50
AUX = {"k": 5, "k_aux": 8, "aux_coefficient": 0.03125}
RELU, TOPK, BATCH_TOPK = ReluL1Settings(l1_coefficient=1.0), TopKSettings(**AUX), BatchTopKSettings(**AUX)
INPUTS = [(RELU, "none"), (RELU, "layer_norm"), (TOPK, "constant_norm_rescale"), (BATCH_TOPK, "none")]


def settings(**changes) -> FeatureAblationSettings:
    values = {"quantile": 0.25, "caliper": 0.2, "sizes": [8, 32], "order": "norm", "group_seed": 5, "batch_size": 3}
    values |= {"bootstrap_seed": 1, "bootstrap_samples": 60, "confidence": 0.9} | changes
    return parse(FeatureAblationSettings, values, "ablation")


def random_sae(variant=RELU, normalisation="none", seed=0):
    generator = torch.Generator().manual_seed(seed)
    sae = build_sae(variant, D_SAE, [D]).eval().requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    sae.normalisation = normalisation
    return sae


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt_neox", VOCAB)


@pytest.fixture(scope="module")
def sample() -> Sample:
    """Seven sequences, led by end-of-text tokens, of three documents."""
    tokens = np.random.default_rng(0).integers(1, VOCAB, (7, 12)).astype(np.int32)
    tokens[:, 0] = 0
    tokens[2, 5] = 0
    documents = np.where(tokens == 0, -1, np.arange(7)[:, None] // 3).astype(np.int32)
    return Sample(tokens, documents, tokens, tokens, tokens != 0, "t")


def subtracted(sae, stream, features, target, kept):
    """The plain form: a feature and a token after the other, from dense codes."""
    out = stream.clone()
    for b, t in torch.nonzero(kept).tolist():
        x = stream[b, t][None]
        codes, scale = sae.encode(x)[0], sae._normalised(x)[2]
        for i in features:
            out[b, t] -= (scale * (codes[i] - target[i]) * sae.W_dec[i]).flatten()
    return out


@pytest.mark.parametrize(("variant", "normalisation"), INPUTS)
def test_ablation_is_explicit_subtraction_of_decoder_rows_layer_after_layer(variant, normalisation, model, sample):
    saes = {layer: random_sae(variant, normalisation, seed=layer) for layer in (0, 1)}
    groups = {0: np.array([3, 11, 12, 30]), 1: np.arange(0, D_SAE, 3)}
    targets = {layer: np.random.default_rng(layer).random(D_SAE) for layer in (0, 1)}
    tokens, kept = torch.from_numpy(sample.tokens).long(), torch.from_numpy(sample.kept)
    for of_kind in (None, targets):
        wanted: dict[str, torch.Tensor] = {}
        for layer in (0, 1):
            site, target = f"resid_post.{layer}", np.zeros(D_SAE) if of_kind is None else of_kind[layer]
            edits = {done: (lambda value, new=new: new) for done, new in wanted.items()}
            stream = model.run(tokens, capture=[site], edits=edits).captured[site]
            wanted[site] = subtracted(saes[layer], stream, groups[layer], target, kept)
            assert (wanted[site] - stream).abs().max() > 0.05
        edits = ablation_edits(saes, groups, of_kind, kept)
        run = model.run(tokens, capture=list(wanted), edits=edits)
        for site, value in wanted.items():
            torch.testing.assert_close(run.captured[site], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            model.loss(tokens, edits=edits), model.spliced_loss(tokens, wanted), rtol=1e-5, atol=1e-5
        )


def test_an_empty_group_changes_nothing_and_all_features_leave_bias_and_error(model, sample):
    saes = {0: random_sae(seed=3), 1: random_sae(TOPK, seed=4)}
    tokens, kept = torch.from_numpy(sample.tokens).long(), torch.from_numpy(sample.kept)
    empty = dict.fromkeys(saes, np.array([], dtype=int))
    clean = model.run(tokens, capture=["resid_post.0"])
    assert torch.equal(model.run(tokens, edits=ablation_edits(saes, empty, None, kept)).logits, clean.logits)

    edits = ablation_edits(saes, {0: np.arange(D_SAE)}, None, kept)
    x, ablated = clean.captured["resid_post.0"], model.run(tokens, ["resid_post.0"], edits).captured["resid_post.0"]
    left = (x - saes[0](x.flatten(0, 1)).view_as(x)) + saes[0].b_dec
    torch.testing.assert_close(ablated[kept], left[kept], rtol=1e-4, atol=1e-5)
    assert torch.equal(ablated[~kept], x[~kept])
    assert (left - x)[kept].abs().max() > 0.1


def test_losses_and_metrics_are_those_of_the_model_for_any_batch_size(model, sample):
    saes, groups = {1: random_sae()}, {1: np.arange(10)}

    def ablation(kept):
        return ablation_edits(saes, groups, None, kept)

    tokens, kept = torch.from_numpy(sample.tokens).long(), torch.from_numpy(sample.kept)
    logits = model.run(tokens, edits=ablation(kept)).logits
    log_p = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
    task = make_task(5, 16, VOCAB, end_of_text=0, seed=0)
    at_end = model.run(task.clean, edits=ablation(task.clean != 0)).logits[:, -1]
    for batch_size in (2, 7):
        losses = measure_loss(model, sample, ablation, batch_size)
        np.testing.assert_allclose(losses, -log_p[kept[:, :-1]], rtol=1e-5, atol=1e-5)
        of_task = measure_task(model, task, ablation, 0, batch_size)
        np.testing.assert_allclose(of_task, measure(at_end, task), rtol=1e-4, atol=1e-5)


def test_bad_ablations_are_named(model, sample):
    saes, kept = {0: random_sae()}, torch.from_numpy(sample.kept)
    for groups, targets, message in (
        ({1: np.array([0])}, None, "layer 1 has no SAE"),
        ({0: np.array([D_SAE])}, None, "beyond 0 .. 39"),
        ({0: np.array([2, 2])}, None, "twice"),
        ({0: np.array([2])}, {}, "targets: layer 0"),
    ):
        with pytest.raises(StudyError, match=message):
            ablation_edits(saes, groups, targets, kept)
    transcoder = build_sae(TranscoderSettings(**AUX, input="resid_mid", target="mlp.out"), D_SAE, [D, D])
    with pytest.raises(StudyError, match="transcoder"):
        ablation_edits({0: transcoder}, {0: np.array([1])}, None, kept)
    narrow = build_sae(RELU, D_SAE, [D - 1])
    with pytest.raises(StudyError, match="width 15"):
        model.run(torch.from_numpy(sample.tokens).long(), edits=ablation_edits({0: narrow}, {0: [1]}, None, kept))


# Groups


def planted_features(n=1200, seed=0, layers=(0, 2)) -> tuple[pd.DataFrame, dict[int, FeatureStatistics]]:
    """MPPC that rises with frequency and with norm; every tenth feature is dead."""
    rng = np.random.default_rng(seed)
    parts, statistics = [], {}
    for layer in layers:
        log_f = rng.normal(-6, 1.2, n)
        log_norm = 0.5 * log_f + rng.normal(0, 0.5, n)
        mppc = 1 / (1 + np.exp(-(0.6 * (log_f + 6) + 0.4 * (log_norm + 3) + rng.normal(0, 1, n))))
        dead = np.arange(n) % 10 == 0
        frequency, norm = (np.where(dead, 0.0, np.exp(x)) for x in (log_f, log_norm))
        statistics[layer] = FeatureStatistics(frequency, norm, norm)
        values = {"layer": layer, "feature": np.arange(n), "mppc": np.where(dead, np.nan, mppc), "dead": dead}
        parts.append(pd.DataFrame(values))
    return pd.concat(parts).sample(frac=1, random_state=seed), statistics


@pytest.mark.parametrize("order", ["norm", "random"])
def test_groups_differ_in_mppc_alone(order):
    features, statistics = planted_features()
    members = choose_groups(features, statistics, settings(order=order))
    for layer, part in members.groupby("layer"):
        by_group = {name: part[part.group == name].sort_values("rank") for name in GROUPS}
        table = features[(features.layer == layer) & ~features.dead]
        of_quantile = table.sort_values("mppc").feature.to_numpy()
        count = int(0.25 * len(table))
        well, badly, random = (by_group[name].feature.to_numpy() for name in GROUPS)
        assert len(well) == len(badly) == len(random) > count / 5
        assert len({*well, *badly, *random}) == 3 * len(well)
        assert set(well) <= set(of_quantile[-count:])
        assert set(badly) <= set(of_quantile[:count])
        live = np.log(np.stack(statistics[layer][::2], 1)[table.feature])
        places = {name: np.log(by_group[name][["frequency", "norm"]].to_numpy()) / live.std(0) for name in GROUPS}
        assert np.abs(places["well"] - places["badly"]).max() <= 0.2 + 1e-9
        # what matching had to make equal
        all_of = [np.log(statistics[layer].frequency[f]) for f in (of_quantile[-count:], of_quantile[:count])]
        assert mean_difference(*all_of) > 1
    told = balance(members, [0.02, 10**6])
    assert (told.loc[told["size"] > 1, ["frequency_smd", "norm_smd"]].abs() < 0.1).all(axis=None)
    assert (told[["frequency_smd", "norm_smd"]].abs() < 0.35).all(axis=None)
    mppc = told.set_index(["layer", "size", "group"]).mppc.unstack()
    assert (mppc.well > mppc.random + 0.1).all()
    assert (mppc.random > mppc.badly + 0.1).all()


def test_groups_are_nested_seeded_and_of_the_size_asked_for():
    features, statistics = planted_features()
    by_norm = choose_groups(features, statistics, settings())
    pd.testing.assert_frame_equal(by_norm, choose_groups(features.iloc[::-1], statistics, settings()))
    eight, share = (group(by_norm, "well", size) for size in (8, 0.05))
    assert {layer: len(chosen) for layer, chosen in eight.items()} == {0: 8, 2: 8}
    assert {len(chosen) for chosen in share.values()} == {54}
    assert all((share[layer][:8] == eight[layer]).all() for layer in eight)
    pairs = by_norm[by_norm.layer == 0].pivot(index="rank", columns="group", values="norm")
    removed = np.log(pairs.well * pairs.badly).to_numpy()
    assert (np.diff(removed) <= 1e-12).all()
    a, b = (choose_groups(features, statistics, settings(order="random", group_seed=seed)) for seed in (1, 2))
    assert set(a[a.group == "well"].feature) == set(b[b.group == "well"].feature)
    assert list(group(a, "well", 8)[0]) != list(group(b, "well", 8)[0])


def test_pairs_are_an_optimal_assignment_of_the_most_that_the_caliper_allows():
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b, caliper = rng.normal(0, 1, (30, 2)), rng.normal(0.7, 1, (40, 2)), 0.5
        distance = np.linalg.norm(a[:, None] - b[None], axis=2)
        allowed = np.abs(a[:, None] - b[None]).max(2) <= caliper
        rows, columns = linear_sum_assignment(np.where(allowed, distance, 1e3))
        kept = allowed[rows, columns]
        partner = pair(a, b, caliper)
        found = np.flatnonzero(partner >= 0)
        assert allowed[found, partner[found]].all()
        assert len(np.unique(partner[found])) == len(found) == kept.sum()
        assert np.isclose(distance[found, partner[found]].sum(), distance[rows, columns][kept].sum())


def test_bad_groups_are_named():
    features, statistics = planted_features(60)
    for table, message in (
        (features.drop(columns="mppc"), "lack the column 'mppc'"),
        (pd.concat([features, features]), "one direction"),
        (features[features.layer == 0], "layer 2 has 0 rows"),
        (features.assign(dead=True), "in no layer two make a pair"),
    ):
        with pytest.raises(StudyError, match=message):
            choose_groups(table, statistics, settings())
    with pytest.raises(StudyError, match="quantile"):
        settings(quantile=0.4)
    assert settings(sizes=[3, 0.1]).sizes == [3, 0.1]


def test_statistics_of_features_are_those_of_dense_codes():
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((70, D_SAE)) < 0.2, rng.random((70, D_SAE)), 0).astype(np.float32)
    sae = random_sae()
    found = feature_statistics(Codes(scipy.sparse.csr_array(dense), {}), sae)
    np.testing.assert_allclose(found.frequency, (dense > 0).mean(0))
    np.testing.assert_allclose(found.mean, dense.mean(0), rtol=1e-6)
    removed = np.abs(dense[:, :, None] * sae.W_dec.numpy()[None])  # what each feature writes at each token
    np.testing.assert_allclose(found.norm, np.sqrt((removed**2).sum(2)).mean(0), rtol=1e-5)
    with pytest.raises(StudyError, match="of 39 features, the SAE has 40"):
        feature_statistics(Codes(scipy.sparse.csr_array(dense[:, :-1]), {}), build_sae(RELU, 40, [D]))


# Planted carriers

N, WIDTH = 24, 33  # tokens; a space of the planted model's stream is one wider than its 32 positions
TOKEN, BEFORE, ANSWER = (space * WIDTH for space in range(3))


def codes_of(*spaces: int):
    """An SAE whose features are the codes of tokens in these spaces, N of each: feature i of a space writes code i."""
    sae = build_sae(RELU, N * len(spaces), [4 * WIDTH]).eval().requires_grad_(False)
    for number, space in enumerate(spaces):
        for token in range(N):
            sae.W_enc[space + token, number * N + token] = 1
            sae.W_dec[number * N + token, space + token] = 1
            sae.W_dec[number * N + token, space + WIDTH - 1] = -1
    return sae


@pytest.fixture(scope="module")
def planted():
    return planted_transformer(N, 32).model, make_task(12, 16, N, end_of_text=0, seed=0)


def test_what_alone_carries_the_answer_destroys_it_for_its_prompts_only(planted):
    model, task = planted
    saes = {0: codes_of(BEFORE), 2: codes_of(ANSWER, TOKEN)}
    top1, difference = METRICS.index("top1"), METRICS.index("logit_diff")

    def measured(groups):
        return measure_task(model, task, lambda kept: ablation_edits(saes, groups, None, kept), 0, 5)

    clean = measured({})
    assert (clean[:, top1] == 1).all()
    ablated = task.answer[:6].numpy()
    hit = np.isin(task.answer.numpy(), ablated)
    assert 0 < hit.sum() < len(hit)
    found = measured({2: np.unique(ablated)})
    np.testing.assert_allclose(found[hit, difference], 0, atol=1e-3)
    np.testing.assert_allclose(found[~hit], clean[~hit], atol=1e-4)
    # The inducer looks for A in the space of the tokens before.
    A = task.clean[:6, -1].numpy()
    hit = np.isin(task.clean[:, -1].numpy(), A)
    found = measured({0: np.unique(A)})
    assert (np.abs(found[hit, difference]) < 0.1).all()
    assert (found[~hit, difference] > 9.9).all()
    # Nothing reads the present token after layer 2, though the last norm sees that it is gone.
    assert (measured({2: N + np.arange(N)})[:, top1] == 1).all()


def test_the_table_tells_carriers_from_idle_features(planted, tmp_path):
    model, task = planted
    rng = np.random.default_rng(1)
    tokens = np.concatenate([np.zeros((6, 1), int), rng.integers(1, N, (6, 15))], 1).astype(np.int32)
    documents = np.where(tokens == 0, -1, np.arange(6)[:, None]).astype(np.int32)
    text = Sample(tokens, documents, tokens, tokens, tokens != 0, "t")
    sae = codes_of(ANSWER, TOKEN, TOKEN)
    sae.W_enc[:, 2 * N :] = 0  # the reference: nothing
    names = np.repeat(GROUPS, N)
    members = pd.DataFrame({"layer": 2, "rank": np.tile(np.arange(N), 3), "group": names, "feature": np.arange(3 * N)})
    members["live"] = 3 * N
    mean = np.concatenate([np.full(N, 1 / N), np.full(2 * N, 0.5)])
    statistics = {2: FeatureStatistics(mean, mean, mean)}
    arguments = (model, {2: sae}, statistics, members, text, [task], 0, settings(sizes=[4, 1000]))
    columns = ablation_columns("m", *arguments)
    assert columns == ablation_columns("m", *arguments)
    write_table(tmp_path / "table.parquet", columns)
    table = read_table(tmp_path / "table.parquet").to_pandas()
    assert len(table) == (1 + 2 * 2 * 4) * (1 + len(METRICS))
    assert set(table.kind) == {"none", *KINDS}
    assert set(table["features"]) == {0, 4, N}
    assert (table.low <= table.high).all()
    assert (table.n == np.where(table.what == LOSS, 6, 12)).all()

    def rows(what, metric, size=1000.0, kind="zero"):
        of = table[(table.what == what) & (table.metric == metric)]
        return of[(of["size"] == size) & (of.kind == kind)].set_index("group")

    diff = rows("induction", "logit_diff")
    clean = table[(table.group == "none") & (table.metric == "logit_diff")].value.item()
    assert diff.value["well"] == pytest.approx(-clean, abs=1e-3)
    assert diff.value["random"] == pytest.approx(0, abs=1e-4)
    assert diff.value[DIFFERENCE] == pytest.approx(diff.value["well"] - diff.value["badly"])
    assert diff.high[DIFFERENCE] < -clean / 2
    assert rows("induction", "top1").value[["well", "badly"]].tolist() == [-1, 0]
    # The paired difference, from the measures themselves.
    effects = {}
    for name in ("well", "badly"):
        edits = group(members, name, 4)
        values = measure_loss(model, text, lambda kept, edits=edits: ablation_edits({2: sae}, edits, None, kept), 4)
        effects[name] = values
    paired = effects["well"] - effects["badly"]
    assert rows(LOSS, "cross_entropy", 4.0).value[DIFFERENCE] == pytest.approx(paired.mean(), abs=1e-6)
    failing = pd.DataFrame(ablation_columns("m", *arguments, min_accuracy=1.1))
    assert set(failing[failing.what == "induction"].group) == {"none"}
    assert set(failing[~failing.passes].what) == {"induction"}
    assert len(failing[failing.what == LOSS]) == len(table[table.what == LOSS])
    with pytest.raises(StudyError, match="different names"):
        ablation_columns("m", *arguments[:5], [task, task], *arguments[6:])
