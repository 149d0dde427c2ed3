"""How well do the last tokens predict a feature's activation? Held out, without a model.

An activation a_t is predicted from the n-gram g_n(t) that token t ends by a mean over training tokens, shrunk to the
prediction of the shorter n-gram:

    p_n(g) = (sum_{t in g} a_t + kappa p_{n-1}(g')) / (|g| + kappa)        p_0 = 0

with g' the n-gram a token shorter. That is ridge regression of what p_{n-1} leaves on indicators of the n-grams, with
penalty kappa (Hoerl & Kennard 1970, Technometrics 12), to which the tests hold it (sklearn.linear_model.Ridge).
Documents are cut into two halves; each is predicted from the other:

    R2_n = 1 - sum (a - p_n)^2 / sum (a - mean of the training half)^2     over both halves

Range: at most 1, which is a feature that the last n tokens decide; 0 says no more than its mean; below 0 where
n-grams seen in training mislead. It underestimates what rare n-grams decide, as they are shrunk; R2_n of more tokens
says nothing of a feature for which n-grams of the test half do not occur in the training half.
"""

import numba
import numpy as np
import scipy.sparse

from universality.analysis.text import Grams
from universality.kernels.compiled import njit

KAPPA = 1.0
"""The penalty: as many tokens of the shorter n-gram's mean are added."""


def predictability(codes: scipy.sparse.csc_array, grams: Grams, half: np.ndarray) -> np.ndarray:
    """R2 [3, F] from the last 1, 2 and 3 tokens, of codes [T, F]; NaN for a feature that does not vary. `half` [T]:
    which half a token's document is in."""
    errors = np.zeros((3, codes.shape[1]))
    around_mean = np.zeros(codes.shape[1])
    for trained in (False, True):
        train, test = half == trained, half != trained
        counts = [grams.counts(n, where) for n in (1, 2, 3) for where in (train, test)]
        error, spread = _errors(
            codes.indptr, codes.indices, codes.data, train, *grams.of_token.astype(np.int32), *grams.first_child,
            *counts, int(train.sum()), int(test.sum()), KAPPA, 4 * numba.get_num_threads(),
        )  # fmt: skip
        errors += error
        around_mean += spread
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(around_mean > 0, 1 - errors / around_mean, np.nan)


@njit(parallel=True)
def _errors(
    starts, tokens, values, train, gram1, gram2, gram3, children1, children2,
    train1, test1, train2, test2, train3, test3, n_train, n_test, kappa, n_chunks,
):  # fmt: skip
    """Squared errors [3, F] on the test half, and the squares around the training half's mean [F].

    sum (a - p)^2 = sum a^2 - 2 sum_g p_g sum_{t in g} a_t + sum_g |g| p_g^2; p is 0 below a token that the feature
    never fires at, so that only n-grams ending in the others are looked at.
    """
    n_features = len(starts) - 1
    errors, spread = np.zeros((3, n_features)), np.zeros(n_features)
    for chunk in numba.prange(n_chunks):
        sums1, sums2, sums3 = np.zeros(len(train1)), np.zeros(len(train2)), np.zeros(len(train3))
        held1, held2, held3 = np.zeros(len(train1)), np.zeros(len(train2)), np.zeros(len(train3))
        touched = np.empty(len(train1), np.int64)
        seen = np.zeros(len(train1), np.bool_)
        for feature in range(chunk, n_features, n_chunks):
            n_touched, total, held_total, squares = 0, 0.0, 0.0, 0.0
            for entry in range(starts[feature], starts[feature + 1]):
                token, value = tokens[entry], np.float64(values[entry])
                one, two, three = gram1[token], gram2[token], gram3[token]
                if train[token]:
                    sums1[one] += value
                    sums2[two] += value
                    sums3[three] += value
                    total += value
                    if not seen[one]:
                        seen[one] = True
                        touched[n_touched] = one
                        n_touched += 1
                else:
                    held1[one] += value
                    held2[two] += value
                    held3[three] += value
                    held_total += value
                    squares += value * value
            error1, error2, error3 = squares, squares, squares
            for place in range(n_touched):
                one = touched[place]
                p1 = sums1[one] / (train1[one] + kappa)
                error1 += p1 * (test1[one] * p1 - 2 * held1[one])
                for two in range(children1[one], children1[one + 1]):
                    if test2[two] == 0:
                        continue
                    p2 = (sums2[two] + kappa * p1) / (train2[two] + kappa)
                    error2 += p2 * (test2[two] * p2 - 2 * held2[two])
                    for three in range(children2[two], children2[two + 1]):
                        if test3[three] > 0:
                            p3 = (sums3[three] + kappa * p2) / (train3[three] + kappa)
                            error3 += p3 * (test3[three] * p3 - 2 * held3[three])
                seen[one] = False
            for entry in range(starts[feature], starts[feature + 1]):
                token = tokens[entry]
                sums1[gram1[token]], sums2[gram2[token]], sums3[gram3[token]] = 0.0, 0.0, 0.0
                held1[gram1[token]], held2[gram2[token]], held3[gram3[token]] = 0.0, 0.0, 0.0
            mean = total / n_train
            errors[0, feature], errors[1, feature], errors[2, feature] = error1, error2, error3
            spread[feature] = squares - 2 * mean * held_total + n_test * mean * mean
    return errors, spread
