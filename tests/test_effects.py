"""`causal_effect` against draws of two worlds that share their noise, and against what it must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import stats

import issm
from helpers import random_system
from worlds import as_plan, assert_within, simulate

CASES = {
    "two-states": dict(state_dim=2, dynamics_cov="full"),
    "five-states-diagonal": dict(state_dim=5, dynamics_cov="diagonal"),
    "ten-states": dict(state_dim=10, dynamics_cov="full"),
}
NUM_TIMESTEPS = 5


def plans(state_dim):
    """Two clamps at once against one of them noisy and one elsewhere; a clamp to zero in each."""
    sizes = dict(num_timesteps=NUM_TIMESTEPS, state_dim=state_dim)
    plan = issm.merge(issm.do({0: 0.0}, **sizes, stop=3), issm.do({1: 2.0}, **sizes, start=1, stop=3))
    reference = issm.merge(
        issm.do({0: 1.0}, **sizes, start=2, stop=4, variance=0.5),
        issm.do({state_dim - 1: 0.0}, **sizes, start=2, stop=3),
    )
    return plan, reference


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("past", [False, True])
def test_draws_of_two_worlds(name, past):
    options = CASES[name]
    system = random_system(1, num_timesteps=3, emission_dim=2, input_dim=1, **options)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(NUM_TIMESTEPS, 1))
    plan, reference = plans(options["state_dim"])
    history = issm.History(system.emissions, system.inputs) if past else None
    start = None
    if past:
        last = issm.lgssm_filter(system.params, system.emissions, system.inputs)
        start = rng.multivariate_normal(last.filtered_means[-1], last.filtered_covariances[-1], size=100_000)
    effect = issm.causal_effect(system.params, plan, reference=reference, history=history, inputs=inputs, window=(1, 4))
    worlds = simulate(rng, system.fields, inputs, [as_plan(plan), as_plan(reference)], 100_000, start=start)
    drawn = worlds[0][1] - worlds[1][1]
    assert_within(drawn, effect.mean, effect.sd**2)
    summed = np.concatenate([np.zeros_like(drawn[:, :1]), drawn[:, 1:4], np.zeros_like(drawn[:, :1])], axis=1)
    assert_within(summed.cumsum(axis=1), effect.cumulative.mean, effect.cumulative.sd**2)
    assert_within(drawn[:, 1:4].mean(axis=1), effect.average.mean, effect.average.sd**2)
    expected = worlds[1][1][:, 1:4].mean(axis=1)
    ratio_error = 4 * expected.std(axis=0) / np.sqrt(len(drawn)) * np.abs(effect.relative.mean)
    assert (np.abs(effect.relative.mean * expected.mean(axis=0) - effect.average.mean) < ratio_error).all()
    np.testing.assert_allclose(
        effect.relative.sd * np.abs(effect.average.mean / effect.relative.mean), effect.average.sd, rtol=1e-10
    )


def test_a_plan_that_changes_nothing_has_no_effect():
    system = random_system(2, clamps="mixed", input_dim=1)
    effect = issm.causal_effect(
        system.params, system.interventions, reference=system.interventions, inputs=system.inputs
    )
    for part in (effect.per_step, effect.cumulative, effect.average):
        for each in (part.mean, part.sd, part.lower, part.upper, part.total.prob_positive, part.total.prob_negative):
            np.testing.assert_array_equal(each, np.zeros_like(each))
        np.testing.assert_array_equal(part.total.p_value, np.ones_like(part.mean))
    unconnected = issm.make_lgssm_params([0.0, 0.0], [1.0, 1.0], np.eye(2), [0.1, 0.1], [[0.0, 1.0]], [0.5])
    effect = issm.causal_effect(unconnected, issm.do({0: 9.0}, num_timesteps=5, state_dim=2))
    np.testing.assert_array_equal(effect.mean, np.zeros((5, 1)))


def test_effects_are_differences_of_predictions():
    system = random_system(3, num_trials=2, input_dim=1, shared_inputs=False, missing=0.1)
    plan, reference = plans(2)
    plan, reference = (jax.tree.map(lambda leaf: leaf[:4], each) for each in (plan, reference))
    history, inputs = issm.History(system.emissions, system.inputs), system.inputs[:, :4]
    with_plan, without = (
        issm.interventional_prediction(system.params, each, history=history, inputs=inputs)
        for each in (plan, reference)
    )
    readout = np.array([[1.0, -1.0, 0.5]])
    for of, moments in [
        ("emissions", lambda prediction: prediction.emissions.mean),
        (issm.Readout(readout), lambda prediction: prediction.emissions.mean @ readout.T),
        (issm.Readout(readout[:, :2], of="states"), lambda prediction: prediction.states.mean @ readout[:, :2].T),
    ]:
        effect = issm.causal_effect(system.params, plan, reference=reference, history=history, inputs=inputs, of=of)
        difference = moments(with_plan) - moments(without)
        np.testing.assert_allclose(effect.mean, difference, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(effect.cumulative.mean, jnp.cumsum(difference, 1), rtol=1e-9, atol=1e-12)
        average = difference.mean(axis=1)
        np.testing.assert_allclose(effect.average.mean, average, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(effect.relative.mean, average / moments(without).mean(axis=1), rtol=1e-9)


@pytest.mark.parametrize(("window", "steps"), [
    (None, [0, 1, 2, 3, 4, 5]), ("on", [1, 2, 4]), ("off", [0, 3, 5]), ("after", [5]), ((2, 4), [2, 3]),
    (np.array([1, 0, 0, 0, 0, 1], bool), [0, 5]),
])  # fmt: skip
def test_windows(window, steps):
    sizes = dict(num_timesteps=6, state_dim=2)
    plan = issm.merge(issm.do({0: 1.0}, **sizes, start=1, stop=4), issm.do({1: 2.0}, **sizes, start=4, stop=5))
    reference = issm.do({0: 1.0}, **sizes, start=3, stop=4)
    effect = issm.causal_effect(random_system(4).params, plan, reference=reference, window=window)
    counted = np.zeros((6, 1))
    counted[steps] = 1
    np.testing.assert_allclose(effect.cumulative.mean, np.cumsum(effect.mean * counted, axis=0), atol=1e-12)
    np.testing.assert_allclose(effect.average.mean, effect.mean[np.array(steps)].mean(axis=0), atol=1e-12)


def test_a_window_of_trials_beside_one_reference_while_jax_traces():
    params = random_system(4).params
    mask = np.zeros((2, 6, 2), bool)
    mask[0, 1:3, 0] = mask[1, 2:5, 1] = True
    reference = issm.do({0: 1.0}, num_timesteps=6, state_dim=2, start=3, stop=4)

    def average(value):
        plan = issm.Intervention(mask, value)
        return issm.causal_effect(params, plan, reference=reference, window="on").average.mean

    value = np.where(mask, 1.5, 0.0)
    np.testing.assert_allclose(jax.jit(average)(value), average(value), rtol=1e-12)


def test_average_over_trials():
    system = random_system(5, num_trials=3, missing=0.2)
    plan = issm.do({0: [1.0, 2.0]}, num_timesteps=4, state_dim=2, start=1, stop=3)
    history = issm.History(system.emissions)
    apart = issm.causal_effect(system.params, plan, history=history)
    together = issm.causal_effect(system.params, plan, history=history, average_trials=True)
    np.testing.assert_allclose(together.mean, apart.mean.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(together.sd**2, (apart.sd**2).sum(axis=0) / 9, rtol=1e-12)
    np.testing.assert_allclose(together.average.mean, apart.average.mean.mean(axis=0), rtol=1e-12)


# Uncertain parameters

SYSTEM = random_system(
    6, emission_dim=2, input_dim=1, initial_cov="diagonal", dynamics_cov="diagonal", emissions_cov="diagonal"
)
PLAN = issm.do({0: 1.5}, num_timesteps=4, state_dim=2, start=1, stop=3)
QUESTION = dict(history=issm.History(SYSTEM.emissions, SYSTEM.inputs), inputs=SYSTEM.inputs[:4], window=(1, 3))


def draws(scale, count=400):
    flat, unravel = ravel_pytree(SYSTEM.params)
    factor = scale * np.diag(np.abs(flat))
    chosen = np.asarray(flat) + np.random.default_rng(0).normal(size=(count, flat.size)) @ factor.T
    return jax.vmap(unravel)(jnp.asarray(chosen)), jnp.asarray(factor @ factor.T)


def each_effect(estimate):
    return [estimate.per_step, estimate.cumulative, estimate.average, estimate.relative]


def test_draws_are_asked_one_by_one():
    drawn, _ = draws(0.1, 40)
    estimate = issm.causal_effect(SYSTEM.params, PLAN, parameters=drawn, **QUESTION)
    alone = [issm.causal_effect(jax.tree.map(lambda leaf, s=s: leaf[s], drawn), PLAN, **QUESTION) for s in range(40)]
    for got, *ones in zip(each_effect(estimate), *map(each_effect, alone), strict=True):
        means, sds = (np.stack([getattr(one, name) for one in ones]) for name in ("mean", "sd"))
        np.testing.assert_allclose(got.mean, means.mean(axis=0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(got.parameter.sd, means.std(axis=0, ddof=1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(got.trial.sd, np.sqrt((sds**2).mean(axis=0)), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(got.sd**2, got.trial.sd**2 + got.parameter.sd**2, rtol=1e-9, atol=1e-12)
        for end, prob in ((got.parameter.lower, 0.025), (got.parameter.upper, 0.975)):
            np.testing.assert_allclose(end, np.quantile(means, prob, axis=0), rtol=1e-9, atol=1e-12)
        for end, prob in ((np.asarray(got.lower), 0.025), (np.asarray(got.upper), 0.975)):
            below = np.where(sds > 0, stats.norm.cdf((end - means) / np.where(sds > 0, sds, 1)), means <= end)
            random = (sds > 0).all(axis=0)
            np.testing.assert_allclose(below.mean(axis=0)[random], prob, atol=1e-5)
        positive = np.where(sds > 0, stats.norm.cdf(means / np.where(sds > 0, sds, 1)), means > 0).mean(axis=0)
        np.testing.assert_allclose(got.total.prob_positive, positive, atol=1e-12)
        np.testing.assert_allclose(got.parameter.prob_positive, (means > 0).mean(axis=0), atol=1e-12)


def test_a_small_covariance_and_draws_from_it_agree():
    drawn, cov = draws(1e-3)
    from_draws = issm.causal_effect(SYSTEM.params, PLAN, parameters=drawn, **QUESTION)
    from_cov = issm.causal_effect(SYSTEM.params, PLAN, parameters=cov, **QUESTION)
    exact = issm.causal_effect(SYSTEM.params, PLAN, **QUESTION)
    for a, b, known in zip(*map(each_effect, (from_draws, from_cov, exact)), strict=True):
        np.testing.assert_allclose(b.mean, known.mean, rtol=1e-12)
        np.testing.assert_allclose(b.trial.sd, known.sd, rtol=1e-10)
        np.testing.assert_allclose(a.parameter.sd, b.parameter.sd, rtol=4 / np.sqrt(2 * 400), atol=1e-9)
        np.testing.assert_allclose(b.sd**2, b.trial.sd**2 + b.parameter.sd**2, rtol=1e-10)


def test_a_covariance_of_zero_and_equal_draws_leave_trial_noise_alone():
    known = issm.causal_effect(SYSTEM.params, PLAN, **QUESTION)
    size = ravel_pytree(SYSTEM.params)[0].size
    equal = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), SYSTEM.params)
    for parameters, tol in ((np.zeros((size, size)), 1e-12), (equal, 1e-6)):
        estimate = issm.causal_effect(SYSTEM.params, PLAN, parameters=parameters, **QUESTION)
        for a, b in zip(each_effect(estimate), each_effect(known), strict=True):
            np.testing.assert_allclose(a.parameter.sd, np.zeros_like(b.sd), atol=1e-7)
            for name in ("mean", "sd", "lower", "upper"):
                np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=tol, rtol=tol)


@pytest.mark.parametrize("level", [0.5, 0.9])
@pytest.mark.parametrize("source", ["draws", "covariance"])
def test_p_values_never_contradict_intervals(level, source):
    drawn, cov = draws(0.15)
    parameters = drawn if source == "draws" else cov
    estimate = issm.causal_effect(SYSTEM.params, PLAN, parameters=parameters, level=level, **QUESTION)
    for effect in each_effect(estimate):
        for spread in (effect.trial, effect.parameter, effect.total):
            outside = (np.asarray(spread.lower) > 0) | (np.asarray(spread.upper) < 0)
            certain = np.abs(spread.p_value - (1 - level)) > 2 / 400
            np.testing.assert_array_equal((spread.p_value < 1 - level)[certain], outside[certain])
            assert (spread.lower <= spread.upper).all()
            assert (spread.prob_positive + spread.prob_negative <= 1 + 1e-12).all()


def test_single_precision():
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), SYSTEM.params)
    drawn, _ = draws(0.1, 40)
    drawn32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), drawn)
    got = issm.causal_effect(single, PLAN, parameters=drawn32, **QUESTION)
    expected = issm.causal_effect(SYSTEM.params, PLAN, parameters=drawn, **QUESTION)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    for a, b in zip(each_effect(got)[:3], each_effect(expected)[:3], strict=True):
        for name in ("mean", "sd", "lower", "upper"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=2e-3, atol=2e-3)


def test_gradients_with_respect_to_the_plan_are_finite_differences():
    def average(value):
        plan = issm.Intervention(PLAN.mask, jnp.where(PLAN.mask, value, 0.0))
        effect = issm.causal_effect(SYSTEM.params, plan, **QUESTION)
        return (effect.average.mean + effect.average.sd).sum()

    gradient = jax.grad(average)(1.5)
    np.testing.assert_allclose(gradient, (average(1.5 + 1e-5) - average(1.5 - 1e-5)) / 2e-5, rtol=1e-6)
