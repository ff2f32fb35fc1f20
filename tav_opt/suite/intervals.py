"""How sure a mean is, and how far raters agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 10_000
SEED = 33


def bootstrap_interval(groups: Sequence[Sequence[float]], level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the mean over all values, whole groups drawn anew (Efron & Tibshirani 1993, ch. 13).

    A group is what hangs together, such as the edits of one video: drawn one by one they would look like more evidence
    than they are. One group alone gives its mean twice.
    """
    sums = np.array([sum(group) for group in groups if len(group)])
    counts = np.array([len(group) for group in groups if len(group)])
    drawn = np.random.default_rng(SEED).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float | None:
    """Agreement beyond chance of raters on items: 1 all agree, 0 as by chance (Fleiss 1971, Psychological Bulletin 76).

    `counts` has for each item how many raters chose each answer, the same number of raters (two or more) everywhere.
    None where every answer is the same, and nothing could differ by chance.
    """
    table = np.asarray(counts, float)
    raters = table[0].sum()
    assert raters >= 2 and (table.sum(1) == raters).all(), "as many raters for each item, two or more"
    observed = ((table**2).sum(1) - raters) / (raters * (raters - 1))
    by_chance = float(((table.sum(0) / table.sum()) ** 2).sum())
    return None if by_chance == 1 else float((observed.mean() - by_chance) / (1 - by_chance))


def grouped(values: Mapping[str, Sequence[float]]) -> tuple[float, float | None, float | None]:
    """The mean of all values, and its interval by groups of whatever names."""
    every = [value for group in values.values() for value in group]
    return (float(np.mean(every)), *bootstrap_interval(list(values.values())))
