"""What is told of effects on prompts: means with intervals, p-values, which senders matter."""

import numpy as np
import scipy.stats

from universality.circuits.settings import Measuring


def draws(prompts: int, settings: Measuring) -> np.ndarray:
    """Prompts of each bootstrap sample [R, S]."""
    return np.random.default_rng(settings.bootstrap_seed).integers(0, prompts, (settings.bootstrap_samples, prompts))


def interval(values: np.ndarray, drawn: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high) [...] over prompts [S, ...], by bootstrap over these (percentiles)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[drawn].mean(axis=1), [tail, 1 - tail], axis=0)
    return values.mean(axis=0), low, high


def p_value(values: np.ndarray) -> float:
    """That the mean over prompts [S] is 0, by a t-test; 1 where all are 0."""
    if not np.ptp(values):
        return 0.0 if values[0] else 1.0
    return float(scipy.stats.ttest_1samp(values, 0).pvalue)


def significant(p: np.ndarray, rate: float) -> np.ndarray:
    """Which stay at this false discovery rate (Benjamini & Hochberg 1995)."""
    return scipy.stats.false_discovery_control(p) <= rate if len(p) else np.zeros(0, dtype=bool)
