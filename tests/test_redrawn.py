"""The start that learns the dynamics first: its regressions on states with errors, and how near it gets where clamps are rare."""

import jax
import numpy as np

import issm
from issm.fitting.redrawn import _functionals, from_emissions_alone


def rare_clamps(*, levels=(-2.0, 2.0)):
    """Four states: two that are only ever clamped together, one alone, one never; 3 % of the steps."""
    rng = np.random.default_rng(0)
    weights = 0.9 * np.linalg.qr(rng.normal(size=(4, 4)))[0]
    truth = issm.make_lgssm_params(
        np.zeros(4), np.ones(4), weights, np.full(4, 0.2), rng.normal(size=(8, 4)), np.full(8, 0.2), emissions_bias=rng.normal(size=8)
    )  # fmt: skip
    mask, value = np.zeros((40, 60, 4), bool), np.zeros((40, 60, 4))
    for k in range(0, 40, 2):
        amplitude = rng.uniform(*levels) if levels[0] != levels[1] else levels[0]
        states = [0, 1] if k % 4 else [2]
        mask[k, 20:24, states] = True
        value[k, 20:24, states] = (amplitude * np.array([[1.0], [-0.6]]))[: len(states)]
    plan = issm.Intervention(mask, value)
    keys = jax.random.split(jax.random.key(1), 40)
    _, emissions = jax.vmap(lambda key, plan: issm.lgssm_sample(key, truth, 60, interventions=plan))(keys, plan)
    return truth, emissions, plan


def test_is_close_to_the_optimum_where_clamps_are_rare():
    truth, emissions, plan = rare_clamps()
    start = issm.initialize_lgssm(jax.random.key(0), emissions, 4, interventions=plan)
    assert start.start == "redrawn"
    fits = [
        issm.fit_em(params, emissions, interventions=plan, num_iters=num_iters, tol=1e-10)
        for params, num_iters in ((truth, 80), (start.params, 80))
    ]
    best = max(float(fit.log_probs[-1]) for fit in fits)
    others = [value for name, value in zip(start.starts, start.log_probs.tolist(), strict=True) if name != "redrawn"]
    assert float(start.log_probs.max()) > best - 100 > max(others) + 100
    assert float(fits[1].log_probs[-1]) > best - 0.1


def test_is_not_tried_with_one_level():
    _, emissions, plan = rare_clamps(levels=(2.0, 2.0))
    assert "redrawn" not in issm.initialize_lgssm(jax.random.key(0), emissions, 4, interventions=plan).starts


def test_estimates_from_the_emissions_alone():
    """The posterior of N(0, v) times the likelihood N(estimate; x, error)."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(7, 3, 3))
    error, estimate, variances = (
        factor @ factor.transpose(0, 2, 1) + 0.1 * np.eye(3),
        rng.normal(size=(7, 3)),
        [90.0, 100.0, 110.0],
    )
    prior = np.diag(variances)
    covs = prior - prior @ np.linalg.solve(prior + error, prior)
    means = np.einsum("ij,tjk,tk->ti", prior, np.linalg.inv(prior + error), estimate)
    found = from_emissions_alone(means, covs, np.broadcast_to(variances, (7, 3)))
    np.testing.assert_allclose(found[0], estimate, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found[1], error, rtol=1e-9, atol=1e-9)


def test_functionals_of_states_with_errors():
    """States clamped alone, together and never; least squares would give rows that are too short."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    rows, offset = np.array([2.0, 1.0, 0.5, 1.0])[:, None] * turn, np.array([0.5, -1.0, 0.0, 0.0])
    mask = np.zeros((6000, 4), bool)
    mask[:2000, [0, 1]] = mask[2000:4000, 1] = mask[4000:, 2] = True
    states = rng.normal(size=(6000, 4))
    states[:2000, 1] = -0.6 * states[:2000, 0]
    error = np.diag([0.3, 0.2, 0.4, 0.1])
    white = (states - offset) @ np.linalg.inv(rows).T
    estimate = white + rng.normal(size=white.shape) * np.sqrt(np.diag(error))
    clamped = np.array([True, True, True, False])
    errors = np.broadcast_to(error, (6000, 4, 4))
    found, shift = _functionals(estimate, errors, mask, states, np.zeros((6000, 4)), clamped)
    np.testing.assert_allclose(found[:3], rows[:3], atol=0.08)
    np.testing.assert_allclose(shift[:3], offset[:3], atol=0.06)
    np.testing.assert_allclose(found[:3] @ found[3], 0.0, atol=1e-10)
    design = estimate[4000:] - estimate[4000:].mean(axis=0)
    short = np.linalg.lstsq(design, states[4000:, 2] - states[4000:, 2].mean())[0]
    assert abs(np.linalg.norm(found[2]) - 0.5) < 0.01 < 0.49 - np.linalg.norm(short)
