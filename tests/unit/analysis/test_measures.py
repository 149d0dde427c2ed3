"""Measures against plain forms and libraries, and features planted to need more and more of the text."""

import itertools

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
from sklearn.linear_model import Ridge

from universality.activations.format import TokenRows
from universality.alignment.token_order import order_by_document
from universality.analysis.against import Resampling, partial_rank_correlation, rank_correlation
from universality.analysis.context_needed import context_needed
from universality.analysis.contexts import WINDOW, find_contexts, sequence_numbers
from universality.analysis.ngrams import KAPPA, predictability
from universality.analysis.scores import complexity, monosemanticity
from universality.analysis.statistics import feature_measures
from universality.analysis.text import NOTHING, grams, preceding

VOCAB, LENGTH, SEQUENCES = 12, 24, 400
PLANTED = ("token", "bigram", "ten_back", "conjunction")


def text(sequences: int = SEQUENCES, vocabulary: int = VOCAB, seed: int = 0) -> TokenRows:
    """Sequences of random tokens, each a document, positions 1 to LENGTH (an end-of-text token stood at 0)."""
    tokens = np.random.default_rng(seed).integers(1, vocabulary, sequences * LENGTH).astype(np.int32)
    positions = np.tile(np.arange(1, LENGTH + 1, dtype=np.int32), sequences)
    documents = np.repeat(np.arange(sequences, dtype=np.int32), LENGTH)
    return TokenRows(tokens, documents, positions, positions, positions)


def planted(tokens: np.ndarray) -> np.ndarray:
    """Features [..., L, 4] of tokens [..., L]: of the current token; of it and the one before; of the token 10 back; of
    tokens 10 and 14 back together."""

    def back(n: int) -> np.ndarray:
        found = np.full(tokens.shape, NOTHING)
        found[..., n:] = tokens[..., : max(tokens.shape[-1] - n, 0)]
        return found

    token = tokens == 3
    return np.stack(
        [token, token & (back(1) == 4), back(10) == 5, (back(14) > 0) & (back(14) < 6) & (back(10) == 5)], -1
    )


def codes_of(rows: TokenRows) -> scipy.sparse.csc_array:
    values = planted(rows.tokens.reshape(-1, LENGTH)).reshape(-1, len(PLANTED)).astype(np.float32)
    return scipy.sparse.csc_array(values)


def random_codes(n_rows: int, n_features: int, seed: int, density: float = 0.1) -> scipy.sparse.csc_array:
    rng = np.random.default_rng(seed)
    values = rng.exponential(1, (n_rows, n_features)) * (rng.random((n_rows, n_features)) < density)
    values[:, 0] = 0  # one that never fires
    return scipy.sparse.csc_array(values.astype(np.float32))


def halves(rows: TokenRows) -> np.ndarray:
    return rows.documents % 2 == 1


def test_what_precedes_a_token_is_of_its_sequence():
    rows = text(sequences=2)
    assert preceding(rows, 0).tolist() == rows.tokens.tolist()
    expected = np.full((2, LENGTH), NOTHING)
    expected[:, 3:] = rows.tokens.reshape(2, LENGTH)[:, :-3]
    assert preceding(rows, 3).tolist() == expected.ravel().tolist()
    gap = rows._replace(positions=np.where(rows.positions > 5, rows.positions + 1, rows.positions))
    assert preceding(gap, 1).reshape(2, LENGTH)[:, 5].tolist() == [NOTHING, NOTHING]


def test_grams_are_a_tree_whose_children_are_neighbours():
    rows = text(sequences=30)
    found = grams(rows, 3)
    for n in (1, 2, 3):
        texts = list(zip(*(preceding(rows, k) for k in range(n)), strict=True))
        assert (
            len(set(zip(texts, found.of_token[n - 1], strict=True)))
            == len(set(texts))
            == found.of_token[n - 1].max() + 1
        )
    for n in (1, 2):
        first, children, parents = found.first_child[n - 1], found.of_token[n], found.of_token[n - 1]
        assert first[-1] == children.max() + 1
        assert ((first[parents] <= children) & (children < first[parents + 1])).all()


def test_predictions_are_ridge_regressions_of_what_shorter_n_grams_leave():
    rows = text(sequences=40)
    codes, half, found = random_codes(len(rows.tokens), 6, seed=1), halves(rows), grams(rows, 3)
    dense = codes.toarray().astype(np.float64)
    errors, spread = np.zeros((3, 6)), np.zeros(6)
    for trained in (False, True):
        train, test = half == trained, half != trained
        prediction = np.zeros_like(dense)
        spread += ((dense[test] - dense[train].mean(0)) ** 2).sum(0)
        for n in range(3):
            indicators = scipy.sparse.csr_matrix(np.eye(found.of_token[n].max() + 1)[found.of_token[n]])
            ridge = Ridge(alpha=KAPPA, fit_intercept=False, solver="cholesky")
            ridge.fit(indicators[train], dense[train] - prediction[train])
            prediction += ridge.predict(indicators)
            errors[n] += ((dense[test] - prediction[test]) ** 2).sum(0)
    r2 = predictability(codes, found, half)
    np.testing.assert_allclose(r2[:, 1:], 1 - errors[:, 1:] / spread[1:], atol=1e-6)
    assert np.isnan(r2[:, 0]).all()


def test_statistics_are_those_of_plain_numpy():
    rows = text(sequences=60)
    codes = random_codes(len(rows.tokens), 7, seed=2)
    codes = scipy.sparse.csc_array(scipy.sparse.hstack([codes, codes[:, [3]]]))  # the last a copy
    order = order_by_document(rows.documents, [], 64, 0)
    found = feature_measures(codes, rows.tokens, rows.positions, order)
    dense = codes.toarray().astype(np.float64)
    bins = np.ceil(np.log2(rows.positions)).astype(int)
    for i in range(1, 8):
        weights = np.bincount(rows.tokens, weights=dense[:, i])
        assert found.token_entropy[i] == pytest.approx(scipy.stats.entropy(weights, base=2), abs=1e-5)
        within = sum(((part - part.mean()) ** 2).sum() for part in (dense[bins == b, i] for b in np.unique(bins)))
        n, k = len(dense), len(np.unique(bins))
        whole = ((dense[:, i] - dense[:, i].mean()) ** 2).sum()
        assert found.position_share[i] == pytest.approx(1 - (within / (n - k)) / (whole / (n - 1)), abs=1e-6)
    r = np.corrcoef(dense[:, 1:].T)
    np.fill_diagonal(r, -1)
    np.testing.assert_allclose(found.most_alike[1:], r.max(1), atol=1e-6)
    assert (found.alike[3], found.alike[7]) == (7, 3)
    assert np.isnan(found.token_entropy[0])
    assert found.alike[0] == -1


def test_a_feature_of_positions_is_told_from_one_of_tokens():
    rows = text()
    early = (rows.positions <= 2).astype(np.float32)
    codes = scipy.sparse.csc_array(np.stack([early, (rows.tokens == 3).astype(np.float32)], 1))
    found = feature_measures(codes, rows.tokens, rows.positions, order_by_document(rows.documents, [], 64, 0))
    assert found.position_share[0] == pytest.approx(1, abs=1e-6)
    assert abs(found.position_share[1]) < 0.01
    assert found.token_entropy[1] == 0


def plain_top(column: np.ndarray, rows: TokenRows, n: int) -> list[int]:
    sequences, chosen, texts, of = sequence_numbers(rows), [], set(), set()
    for row in np.argsort(-column, kind="stable"):
        window = tuple(preceding(rows, k)[row] for k in range(WINDOW))
        if column[row] <= 0 or window in texts or sequences[row] in of:
            continue
        chosen.append(int(row))
        texts.add(window)
        of.add(sequences[row])
    return chosen[:n]


def test_contexts_are_the_strongest_of_different_text_and_random_ones_of_each_quantile():
    rows = text(sequences=40)
    tokens = rows.tokens.reshape(40, LENGTH).copy()
    tokens[20:] = tokens[:20]  # every sequence twice
    rows = rows._replace(tokens=tokens.ravel())
    codes = random_codes(len(rows.tokens), 5, seed=3)
    found = find_contexts(codes, rows, n_top=4, n_quantiles=3, n_random=2, seed=7)
    assert (np.diff(found.feature) >= 0).all()
    for feature in range(5):
        column = codes[:, [feature]].toarray()[:, 0]
        own = found.feature == feature
        top = own & (found.kind == "top")
        assert found.row[top].tolist() == plain_top(column, rows, 4)
        for group in range(3):
            drawn = own & (found.kind == "quantile") & (found.group == group)
            assert drawn.sum() == (2 if feature else 0)
            assert not set(found.row[drawn]) & set(found.row[top])
        strengths = [found.value[own & (found.kind == "quantile") & (found.group == g)] for g in range(3)]
        assert all(low.max() <= high.min() for low, high in itertools.pairwise(strengths) if len(low))
        np.testing.assert_array_equal(found.value[own], column[found.row[own]])
    again = find_contexts(codes, rows, n_top=4, n_quantiles=3, n_random=2, seed=7)
    assert all(np.array_equal(x, y) for x, y in zip(found, again, strict=True))


def activation(tokens: torch.Tensor, features: np.ndarray) -> np.ndarray:
    return planted(tokens.numpy())[np.arange(len(tokens)), -1, features].astype(float)


def test_planted_features_need_the_context_they_were_made_of():
    rows = text()
    codes = codes_of(rows)
    found = find_contexts(codes, rows, n_top=8, n_quantiles=2, n_random=2, seed=0)
    top = found.kind == "top"
    starts = found.row[top] - rows.positions[found.row[top]] + 1
    contexts = [rows.tokens[start : row + 1] for start, row in zip(starts, found.row[top], strict=True)]
    features = found.feature[top]
    needed = context_needed(contexts, features, activation, end_of_text=0, batch_size=7)
    medians = [np.median(needed[features == feature]) for feature in range(4)]
    assert medians == [1, 2, 12, 16]  # the first of the lengths looked at that hold 11 and 15 tokens


def test_planted_features_are_ranked_by_complexity():
    rows = text()
    codes = codes_of(rows)
    r2 = predictability(codes, grams(rows, 3), halves(rows))
    assert r2[0, 0] == pytest.approx(1, abs=0.01)
    assert r2[0, 1] < 0.3
    assert r2[1, 1] == pytest.approx(1, abs=0.05)
    assert (r2[:, 2:] < 0.05).all()
    measures = feature_measures(codes, rows.tokens, rows.positions, order_by_document(rows.documents, [], 64, 0))
    context = np.array([1, 2, 12, 16.0])
    score, full = complexity(context, r2, measures.token_entropy, LENGTH, VOCAB)
    assert full[0] < full[1] < full[2] < full[3]
    assert full[0] < 0.05
    assert score[0] < score[1] < score[2]
    unmeasured = complexity(np.full(4, np.nan), r2, measures.token_entropy, LENGTH, VOCAB)
    assert np.isnan(unmeasured.full).all()
    np.testing.assert_array_equal(unmeasured.score, score)


def test_contexts_that_share_words_are_monosemantic():
    rng = np.random.default_rng(0)
    random = rng.integers(20, 400, (60, 5))
    alike = np.concatenate([np.tile([1, 2, 3, 4], (6, 1)), np.full((6, 1), 9)], axis=1)
    mixed = rng.integers(20, 400, (6, 5))
    found = monosemanticity(np.repeat([0, 1, 3], [6, 6, 1]), np.concatenate([alike, mixed, mixed[:1]]), random, 4)
    assert found[0] == 1
    assert 0.3 < found[1] < 0.7
    assert np.isnan(found[2:]).all()


def test_rank_correlations_are_scipys_and_partial_ones_hold_others_equal():
    rng = np.random.default_rng(1)
    frequency, layer = np.exp(rng.normal(size=500)), rng.integers(0, 4, 500)
    confounder = np.log(frequency) + layer
    x, y = confounder + rng.normal(size=500), confounder + rng.normal(size=500)
    plain = rank_correlation(x, y, Resampling(200, 0, 0.95))
    assert plain.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert plain.low < plain.value < plain.high
    partial = partial_rank_correlation(x, y, frequency, layer, Resampling(200, 0, 0.95))
    assert plain.low > 0.5
    assert abs(partial.value) < 0.15
    few = np.where(np.arange(500) < 60, x, np.nan)  # of features without a value nothing depends
    alone = partial_rank_correlation(x[:60], y[:60], frequency[:60], layer[:60], Resampling(20, 0, 0.95))
    assert partial_rank_correlation(few, y, frequency, layer, Resampling(20, 0, 0.95)) == alone
    design = np.column_stack([layer[:60, None] == np.arange(4), scipy.stats.rankdata(frequency[:60])]).astype(float)
    ranks = np.column_stack([scipy.stats.rankdata(v[:60]) for v in (x, y)])
    left = ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
    assert alone.value == pytest.approx(np.corrcoef(left.T)[0, 1], abs=1e-9)
    x[3] = np.nan
    assert rank_correlation(x, y, Resampling(20, 0, 0.95)).n == 499
    assert np.isnan(rank_correlation(np.ones(500), y, Resampling(20, 0, 0.95)).value)
