"""One order of three policies or more, from who wins against whom: Bradley–Terry."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from vpo_ray.evaluation.statistics import Floats, Interval, shared_resamples, too_few

PRIOR = 0.5  # comparisons that every two policies get, as half a win each


def bradley_terry(wins: ArrayLike, ties: ArrayLike | None = None, prior: float = PRIOR) -> Floats:
    """[..., k, k] -> [..., k]: log strengths with mean 0; i beats j with the odds exp(sᵢ - sⱼ).

    wins[i, j]: how often i won against j. ties: symmetric, each counts as half a win of either. The prior is
    half a comparison, tied, between every two policies. It keeps a policy that wins or loses everything
    finite, and connects policies that never met. The maximum of the likelihood (Bradley and Terry,
    Biometrika 39, 1952) is found by Newton's method.
    """
    won = np.asarray(wins, dtype=np.float64) + prior / 2
    if ties is not None:
        won = won + np.asarray(ties, dtype=np.float64) / 2
    k = won.shape[-1]
    won = won * (1 - np.eye(k))
    games = won + won.swapaxes(-1, -2)
    strengths = np.zeros(won.shape[:-1])
    for _ in range(100):
        odds = expit(strengths[..., :, None] - strengths[..., None, :])
        gradient = (won - games * odds).sum(axis=-1)
        information = games * odds * (1 - odds)
        # Adding 1 everywhere holds the mean at 0, which the likelihood leaves open.
        curvature = np.eye(k) * information.sum(axis=-1)[..., None] - information + 1.0
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        size = np.abs(step).max(axis=-1, keepdims=True, initial=0.0)
        strengths += step / np.maximum(1.0, size)  # no longer: far from the maximum it could overshoot
        if size.max(initial=0.0) < 1e-8:
            break
    return strengths - strengths.mean(axis=-1, keepdims=True)


def rank_policies(
    wins: ArrayLike, ties: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> list[Interval]:
    """Log strengths of k policies, with percentile bootstrap intervals over queries.

    wins, ties: [n queries, k, k], as `bradley_terry` takes them, of each query. `n` of an interval is on how
    many queries its policy was compared. Raises ValueError for other shapes.
    """
    won, tied = np.asarray(wins, dtype=np.float64), np.asarray(ties, dtype=np.float64)
    if won.ndim != 3 or won.shape[1] != won.shape[2] or tied.shape != won.shape:
        raise ValueError(f"wins and ties are [queries, k, k], not {won.shape} and {tied.shape}")
    n, k = won.shape[:2]
    counts = ((won + won.swapaxes(1, 2) + tied).sum(axis=2) > 0).sum(axis=0).tolist()
    strengths = bradley_terry(won.sum(axis=0), tied.sum(axis=0)).tolist()
    if max(counts, default=0) < 2:
        return [too_few(s if c else None, c) for s, c in zip(strengths, counts, strict=True)]
    points = (won + tied / 2).reshape(n, k * k)
    drawn = bradley_terry(shared_resamples(n, resamples, seed).means(points).reshape(-1, k, k) * n)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).tolist()
    stderr = drawn.std(axis=0, ddof=1).tolist()
    return [
        Interval(s, error, least, most, count) if count > 1 else too_few(s if count else None, count)
        for s, error, least, most, count in zip(strengths, stderr, low, high, counts, strict=True)
    ]
