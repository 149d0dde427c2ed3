"""What is told of effects on prompts: means with intervals, p-values, which senders matter."""

from typing import Literal

import numpy as np
import scipy.stats


def shares_drawn(drawn: np.ndarray) -> np.ndarray:
    """Share of each bootstrap sample [R, S] that every prompt makes up [R, S]."""
    resamples, prompts = drawn.shape
    place = drawn + prompts * np.arange(resamples)[:, None]
    return np.bincount(place.ravel(), minlength=drawn.size).reshape(drawn.shape) / prompts


def interval(values: np.ndarray, shares: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high) [...] over prompts [S, ...], by bootstrap over these (percentiles); `shares` [R, S]."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(shares @ values, [tail, 1 - tail], axis=0)
    return values.mean(axis=0), low, high


def p_value(values: np.ndarray, alternative: Literal["two-sided", "greater"] = "two-sided") -> float:
    """That the mean over prompts [S] is 0, or not above 0, by a t-test; of prompts all alike there is no doubt."""
    if not np.ptp(values):
        return 0.0 if values[0] > 0 or (values[0] < 0 and alternative == "two-sided") else 1.0
    return float(scipy.stats.ttest_1samp(values, 0, alternative=alternative).pvalue)


def significant(p: np.ndarray, rate: float) -> np.ndarray:
    """Which stay at this false discovery rate (Benjamini & Hochberg 1995)."""
    return scipy.stats.false_discovery_control(p) <= rate if len(p) else np.zeros(0, dtype=bool)
