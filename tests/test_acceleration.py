"""The search beyond EM: the exact score, coordinates, and that it gets further in fewer E steps without ever going down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import issm
from issm.fitting.gauge import GaugeStep, _changed, _turned, count_clamps
from issm.fitting.m_step import log_prior, make_rules
from issm.fitting.mask_patterns import find_patterns
from issm.fitting.score import Preconditioner, from_coordinates, score, to_coordinates
from issm.fitting.statistics import expected_statistics
from issm.models.trials import as_trials

SHAPE = dict(num_trials=4, num_timesteps=12, emission_dim=3, state_dim=2, input_dim=1, missing=0.2)
DIAGONAL = dict(initial_cov="diagonal", dynamics_cov="diagonal", emissions_cov="diagonal")
PRIORS = issm.Priors(
    initial=issm.RegressionPrior(mean=0.2, precision=0.5, degrees=4.0, scale=0.3),
    dynamics=issm.RegressionPrior(mean=0.1, precision=[2.0, 1.0, 3.0, 0.5], degrees=5.0, scale=[0.4, 0.2]),
    emissions=issm.RegressionPrior(precision=1.5, degrees=6.0, scale=0.3),
)
CASES = {
    "rows": (helpers.random_system(5, **SHAPE, **DIAGONAL, clamps="mixed", shared_interventions=False), PRIORS),
    "full": (helpers.random_system(6, **SHAPE, clamps="mixed", shared_interventions=False), None),
}
FLOOR = jnp.full(3, 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_score_is_the_gradient_of_the_objective(name):
    system, priors = CASES[name]
    args, kwargs = system.data
    params = system.params
    trials, rules = as_trials(params, *args, kwargs["interventions"]), make_rules(params, None, priors)
    patterns, point = find_patterns(params, trials), to_coordinates(params)
    back = from_coordinates(point, params, rules, FLOOR)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)

    def objective(vector):
        moved = from_coordinates(vector, params, rules, FLOOR)
        return issm.marginal_log_prob(moved, *args, **kwargs).sum() + log_prior(moved, rules)

    @jax.jit
    def everything():
        stats = expected_statistics(params, trials, patterns)
        steps = (Preconditioner(params, stats, rules), GaugeStep(params, stats, count_clamps(trials)))
        matrices = [jax.vmap(step)(jnp.eye(point.size)) for step in steps]
        return score(params, stats, rules, FLOOR), jax.grad(objective)(point), matrices

    found, expected, matrices = everything()
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)
    for matrix in map(np.asarray, matrices):  # symmetric and semidefinite: any such matrix gives an ascent
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-10 * np.abs(matrix).max())
        assert np.linalg.eigvalsh(matrix).min() > -1e-10 * np.abs(matrix).max()


def test_changes_of_coordinates_leave_the_likelihood_without_clamps():
    system = helpers.random_system(7, **SHAPE)
    args, _ = system.data
    change = 0.1 * jnp.asarray(np.random.default_rng(0).normal(size=6))
    before, after = (issm.marginal_log_prob(p, *args).sum() for p in (system.params, _turned(system.params, change)))
    np.testing.assert_allclose(before, after, rtol=1e-10)
    zeros, small = jnp.zeros(6), 1e-6
    _, slope = jax.jvp(lambda c: to_coordinates(_changed(system.params, c)), (zeros,), (change,))
    both = [to_coordinates(_turned(system.params, sign * small * change)) for sign in (1.0, -1.0)]
    np.testing.assert_allclose(slope, (both[0] - both[1]) / (2 * small), rtol=1e-6, atol=1e-8)


def test_gets_further_in_the_same_number_of_e_steps():
    """A state that is never clamped, and one that is clamped rarely: EM is slow."""
    rng = np.random.default_rng(0)
    truth = issm.make_lgssm_params(
        np.zeros(2), np.ones(2), [[0.9, -0.2], [0.2, 0.9]], [0.1, 0.1], rng.normal(size=(4, 2)), np.full(4, 0.1)
    )
    plan = issm.do({0: [2.0, 2.0, -2.0]}, num_timesteps=40, state_dim=2, start=10, stop=13)
    keys = jax.random.split(jax.random.key(0), 5)
    _, emissions = jax.vmap(lambda key: issm.lgssm_sample(key, truth, 40, interventions=plan))(keys)
    start = issm.make_lgssm_params(
        np.zeros(2), np.ones(2), 0.5 * np.eye(2), np.ones(2), rng.normal(size=(4, 2)), np.ones(4)
    )
    run = lambda accelerate: issm.fit_em(  # noqa: E731
        start, emissions, interventions=plan, num_iters=60, tol=0.0, accelerate=accelerate
    )
    fast, plain = run(True), run(False)
    for fit in (fast, plain):
        assert (np.diff(fit.log_probs) >= 0).all()
        at_end = issm.marginal_log_prob(fit.params, emissions, interventions=plan).sum()
        np.testing.assert_allclose(fit.log_probs[-1], at_end, rtol=1e-9)
    np.testing.assert_allclose(fast.log_probs[:6], plain.log_probs[:6], rtol=1e-9)  # EM comes first
    assert fast.log_probs[-1] > plain.log_probs[-1] + 0.05  # nats that EM has not found after as many E steps


def test_a_full_covariance_keeps_what_the_data_are_silent_about():
    """The noise of states that are never free, given that of the others, is what EM alone leaves it: what it was."""
    rng = np.random.default_rng(1)
    start = issm.make_lgssm_params(
        [0.0, 0.0], [1.0, 1.0], [[0.7, 0.2], [-0.2, 0.6]], [[0.2, 0.05], [0.05, 0.2]], rng.normal(size=(3, 2)),
        np.diag([0.1, 0.2, 0.3]) + 0.02,
    )  # fmt: skip
    emissions = rng.normal(size=(3, 8, 3))
    emissions[rng.random(emissions.shape) < 0.2] = np.nan
    first = issm.Intervention(np.tile([True, False], (8, 1)), rng.normal(size=(8, 2)))
    fits = [issm.fit_em(start, emissions, interventions=first, num_iters=30, accelerate=a) for a in (True, False)]
    assert fits[0].log_probs[-1] > fits[1].log_probs[-1] + 0.01  # the search has moved
    for fit in fits:
        (own, shared), (_, other) = np.asarray(fit.params.dynamics.cov)
        assert abs(other - 0.2) > 0.01
        np.testing.assert_allclose([shared / other, own - shared**2 / other], [0.25, 0.1875], rtol=1e-9)
    every = issm.Intervention(np.ones((8, 2), bool), rng.normal(size=(8, 2)))
    fit = issm.fit_em(start, emissions, interventions=every, num_iters=30)
    np.testing.assert_allclose(fit.params.dynamics.cov, start.dynamics.cov, rtol=1e-12)
