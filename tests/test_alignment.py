"""Alignment against exhaustive search and least squares, consistency against its definition, co-smoothing against the joint
Gaussian of `helpers`.
"""

import itertools

import numpy as np
import pytest

from helpers import joint_moments, random_system
from issm import metrics

D = 3
RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=(4, 25, D)) @ RNG.normal(size=(D, D)) * [1.0, 10.0, 0.1] + [3.0, 0.0, -5.0]
STATES = TRUTH[..., [2, 0, 1]] * [-1.0, 1.0, -1.0] + RNG.normal(size=TRUTH.shape) * [0.05, 1.0, 5.0]


def weighted_error(matrix, center=True):
    """What permutations minimise: squared error over the variance of each true state."""
    x, z = STATES.reshape(-1, D), TRUTH.reshape(-1, D)
    rest = (z - z.mean(0) - (x - x.mean(0)) @ matrix.T) if center else z - x @ matrix.T
    return ((rest**2).sum(0) / ((z - z.mean(0) * center) ** 2).sum(0)).sum()


def candidates(kind):
    """All matrices of a kind; the best scale for each permutation."""
    x, z = (a.reshape(-1, D) - a.reshape(-1, D).mean(0) for a in (STATES, TRUTH))
    for order in itertools.permutations(range(D)):
        rows = np.eye(D)[list(order)]
        if kind == "permutation":
            yield rows
        elif kind == "scaled_permutation":
            yield rows * (z.T @ x / (x**2).sum(0))
        else:
            for signs in itertools.product([-1.0, 1.0], repeat=D):
                yield rows * np.array(signs)[:, None]


@pytest.mark.parametrize("kind", ["permutation", "signed_permutation", "scaled_permutation"])
def test_permutations_against_exhaustive_search(kind):
    found = metrics.align_states(STATES, TRUTH, kind=kind)
    best = min(candidates(kind), key=weighted_error)
    np.testing.assert_allclose(found.matrix, best, rtol=1e-12, atol=1e-14)
    offset = (TRUTH - STATES @ best.T).reshape(-1, D).mean(0)
    np.testing.assert_allclose(found.offset, offset, rtol=1e-10, atol=1e-12)


def test_orthogonal_is_the_best_of_all_rotations():
    """No rotation by a small or a random skew matrix, nor a reflection, does better."""
    x, z = (a.reshape(-1, D) - a.reshape(-1, D).mean(0) for a in (STATES, TRUTH))
    found = np.asarray(metrics.align_states(STATES, TRUTH, kind="orthogonal").matrix)
    np.testing.assert_allclose(found @ found.T, np.eye(D), atol=1e-12)
    error = ((z - x @ found.T) ** 2).sum()
    for size in (1e-3, 1.0, 1.0, 10.0):
        skew = size * RNG.normal(size=(D, D))
        turn = np.linalg.solve(np.eye(D) + skew - skew.T, np.eye(D) - skew + skew.T)  # Cayley
        for reflection in (1.0, -1.0):
            other = turn @ found * np.array([reflection, 1.0, 1.0])[:, None]
            assert ((z - x @ other.T) ** 2).sum() >= error * (1 - 1e-9)
    exact = metrics.align_states(TRUTH @ found + 1.0, TRUTH, kind="orthogonal")
    np.testing.assert_allclose(exact.r2, 1.0, rtol=1e-9)


@pytest.mark.parametrize("center", [True, False])
def test_affine_is_least_squares(center):
    more = np.concatenate([STATES, RNG.normal(size=(4, 25, 2))], axis=-1)
    found = metrics.align_states(more, TRUTH, center=center)
    x, z = more.reshape(-1, D + 2), TRUTH.reshape(-1, D)
    design = np.column_stack([x, np.ones(len(x))]) if center else x
    expected, rest, *_ = np.linalg.lstsq(design, z, rcond=None)
    np.testing.assert_allclose(found.matrix, expected[: D + 2].T, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found.r2, 1 - rest / ((z - z.mean(0)) ** 2).sum(0), rtol=1e-9)
    if center:
        np.testing.assert_allclose(found.apply(more), (design @ expected).reshape(TRUTH.shape), rtol=1e-8)


def test_signs():
    flipped = TRUTH * [1.0, -1.0, -1.0]
    np.testing.assert_array_equal(metrics.align_states(flipped, TRUTH, kind="sign").matrix, np.diag([1.0, -1.0, -1.0]))


MAPS = {
    "sign": np.diag([1.0, -1.0, -1.0]),
    "permutation": np.eye(D)[[1, 2, 0]],
    "signed_permutation": np.eye(D)[[2, 1, 0]] * [-1.0, 1.0, 1.0],
    "scaled_permutation": np.eye(D)[[2, 0, 1]] * [-3.0, 0.1, 1.0],
    "orthogonal": np.linalg.qr(RNG.normal(size=(D, D)))[0],
    "affine": RNG.normal(size=(D, D)),
}


@pytest.mark.parametrize("kind", MAPS)
def test_consistency_is_invariant(kind):
    fits = np.stack([TRUTH, STATES, RNG.normal(size=TRUTH.shape)])
    score = metrics.consistency(fits, kind=kind)
    np.testing.assert_allclose(np.diag(score.pairwise), 1.0, rtol=1e-9)
    np.testing.assert_allclose(score.pairwise, score.pairwise.T, rtol=1e-9, atol=1e-12)
    moved = fits.copy()
    moved[1] = moved[1] @ MAPS[kind].T + 5.0
    np.testing.assert_allclose(metrics.consistency(moved, kind=kind).pairwise, score.pairwise, rtol=1e-8, atol=1e-10)
    off = score.pairwise[np.triu_indices(3, 1)]
    np.testing.assert_allclose([score.mean, score.lowest], [off.mean(), off.min()], rtol=1e-12)


def test_canonical_correlations():
    """Squared canonical correlations are the eigenvalues of Sxx^-1 Sxy Syy^-1 Syx."""
    x, z = STATES.reshape(-1, D), TRUTH.reshape(-1, D)
    cov = np.cov(np.column_stack([x, z]).T)
    xx, xz, zz = cov[:D, :D], cov[:D, D:], cov[D:, D:]
    expected = np.trace(np.linalg.solve(xx, xz) @ np.linalg.solve(zz, xz.T)) / D
    assert float(metrics.consistency([STATES, TRUTH]).lowest) == pytest.approx(expected, rel=1e-10)


def test_co_smoothing_against_the_joint_gaussian():
    """Correlated emission noise, clamps, inputs, missing entries."""
    system = random_system(3, num_trials=2, num_timesteps=4, emission_dim=3, input_dim=1, clamps="mixed", missing=0.2)
    (emissions, inputs), kwargs = system.data
    groups = np.array([0, 1, 0])
    found = metrics.co_smoothing(system.params, emissions, inputs, groups=groups, **kwargs)
    log_probs, predictions = np.asarray(found.log_probs), np.asarray(found.predictions)
    for k in range(2):
        y = system.trial(k)[0].ravel()
        mean, cov = joint_moments(system, k)
        mean, cov = mean[8:], cov[8:, 8:]
        for group in range(2):
            held = np.tile(groups == group, 4)
            given = ~held & ~np.isnan(y)
            weights = np.linalg.solve(cov[np.ix_(given, given)], cov[given]).T
            expected = mean + weights @ (y - mean)[given]
            np.testing.assert_allclose(predictions[k].ravel()[held], expected[held], rtol=1e-8)
            rest = cov - weights @ cov[given]
            seen = held & ~np.isnan(y)
            gap, inner = (y - expected)[seen], rest[np.ix_(seen, seen)]
            density = -0.5 * (np.linalg.slogdet(2 * np.pi * inner)[1] + gap @ np.linalg.solve(inner, gap))
            np.testing.assert_allclose(log_probs[group, k], density, rtol=1e-8)
    np.testing.assert_allclose(found.score, log_probs.sum() / float((~np.isnan(emissions)).sum()), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.align_states(STATES, TRUTH[:2]), "truth: got shape"),
        (lambda: metrics.align_states(STATES, TRUTH, kind="rotation"), "kind: got 'rotation'"),
        (lambda: metrics.align_states(STATES[..., :2], TRUTH, kind="sign"), "kind: got 'sign' for 2 and 3"),
        (lambda: metrics.align_states(STATES * np.nan, TRUTH), "states: got 300 entries"),
        (lambda: metrics.consistency(STATES[:1]), "states: got shape"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_co_smoothing_needs_two_groups():
    system = random_system(3)
    for groups in (np.zeros(3, int), [0, 2, 2], [0.0, 1.0, 1.0], [0, 1]):
        with pytest.raises(ValueError, match="groups: got"):
            metrics.co_smoothing(system.params, system.emissions, groups=groups)
