"""`counterfactual` against a joint Gaussian of both worlds built from the definition, its draws, and Pearl's axioms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from helpers import random_system
from worlds import as_plan, simulate

NUM_TIMESTEPS = 4
SIZES = dict(num_timesteps=NUM_TIMESTEPS, state_dim=2)
FREE = issm.no_intervention(**SIZES)
CLAMPED = issm.merge(issm.do({0: 0.0}, **SIZES, start=1, stop=3), issm.do({1: 2.0}, **SIZES, stop=2))
NOISY = issm.do({1: -1.0}, **SIZES, start=1, stop=4, variance=0.5)
WORLDS = {
    "free to clamped": (FREE, CLAMPED),
    "clamped to free": (CLAMPED, FREE),
    "clamped to noisy": (CLAMPED, NOISY),
    "noisy to noisy": (
        NOISY,
        issm.merge(issm.do({1: 3.0}, **SIZES, start=2, variance=2.0), issm.do({0: 0.0}, **SIZES, stop=1)),
    ),
}


def affine_worlds(fields, inputs, plans):
    """Mean and loadings of (states, emissions) in each world on one common vector of standard normal noise."""
    d, n = len(fields["initial_mean"]), len(fields["emissions_weights"])
    num_sources = NUM_TIMESTEPS * (2 * d + n)
    unit = np.vstack([np.zeros(num_sources), np.eye(num_sources)])

    class Basis:
        """Hands out the noise sources one after the other where `simulate` asks for normal draws."""

        used = 0

        def normal(self, size):
            count = int(np.prod(size)) // len(unit)
            first, self.used = self.used, self.used + count
            block = unit[:, first : self.used]
            if len(size) == 2:
                return block
            return np.moveaxis(block.reshape(len(unit), size[0], size[2]), 1, 0)

    # The draw of the initial state takes the place of the unused process noise at step 0.
    num_sources += d
    unit = np.vstack([np.zeros(num_sources), np.eye(num_sources)])
    worlds = simulate(Basis(), fields, inputs, plans, len(unit))
    return [
        tuple((part[0].ravel(), (part[1:] - part[:1]).reshape(num_sources, -1).T) for part in world) for world in worlds
    ]


def reference(system, factual, other):
    """Mean and covariance of the stacked counterfactual states and emissions given the observed emissions."""
    inputs = system.inputs
    (_, (mean, loading)), (states, emissions) = affine_worlds(system.fields, inputs, [as_plan(factual), as_plan(other)])
    y = system.emissions.ravel()
    seen = ~np.isnan(y)
    gram = loading[seen] @ loading[seen].T
    answers = []
    for m, l in (states, emissions):
        gain = np.linalg.solve(gram, loading[seen] @ l.T).T
        cov = l @ l.T - gain @ loading[seen] @ l.T
        answers.append((m + gain @ (y[seen] - mean[seen]), cov))
    return answers


def blocks(cov, dim):
    return np.stack([cov[t * dim : (t + 1) * dim, t * dim : (t + 1) * dim] for t in range(NUM_TIMESTEPS)])


@pytest.mark.parametrize("worlds", WORLDS)
@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("cov", ["full", "diagonal"])
def test_both_worlds_as_one_joint_gaussian(worlds, missing, cov):
    factual, other = WORLDS[worlds]
    system = random_system(
        1, num_timesteps=NUM_TIMESTEPS, input_dim=1, missing=missing, dynamics_cov=cov, emissions_cov=cov,
        missing_steps=(2,) if missing else (),
    )  # fmt: skip
    got = issm.counterfactual(system.params, system.emissions, other, interventions=factual, inputs=system.inputs)
    (states, states_cov), (emissions, emissions_cov) = reference(system, factual, other)
    np.testing.assert_allclose(got.states.mean.ravel(), states, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(got.states.cov, blocks(states_cov, 2), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(got.emissions.mean.ravel(), emissions, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(got.emissions.cov, blocks(emissions_cov, 3), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_equal_plans_give_the_trial_itself(missing):
    system = random_system(2, num_timesteps=6, input_dim=1, clamps="mixed", missing=missing)
    got = issm.counterfactual(
        system.params, system.emissions, system.interventions, interventions=system.interventions, inputs=system.inputs
    )
    seen = ~np.isnan(system.emissions)
    np.testing.assert_allclose(np.asarray(got.emissions.mean)[seen], system.emissions[seen], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.asarray(got.emissions.sd)[seen], 0.0, atol=1e-10)
    posterior = issm.lgssm_smoother(system.params, system.emissions, system.inputs, interventions=system.interventions)
    np.testing.assert_allclose(got.states.mean, posterior.smoothed_means, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(got.states.cov, posterior.smoothed_covariances, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("state_dim", [2, 5, 10])
def test_calibrated_on_twin_worlds_that_share_their_noise(state_dim):
    """The true counterfactual of 100 000 simulated trials, standardised by the answer for each, is standard normal."""
    system = random_system(3, num_timesteps=3, state_dim=state_dim, emission_dim=2)
    sizes = dict(num_timesteps=3, state_dim=state_dim)
    factual = issm.do({0: 0.0}, **sizes, start=1, stop=2)
    other = issm.do({0: 1.0, 1: -1.0}, **sizes, start=1, stop=2)
    inputs = np.zeros((3, 0))
    (_, seen), (_, unseen) = simulate(
        np.random.default_rng(0), system.fields, inputs, [as_plan(factual), as_plan(other)], 100_000
    )
    # The answer is affine in y with one covariance, so a few calls give it for all trials.
    basis = np.concatenate([np.zeros((1, 6)), np.eye(6)]).reshape(7, 3, 2)
    got = issm.counterfactual(system.params, basis, other, interventions=factual)
    means = np.asarray(got.emissions.mean).reshape(7, 6)
    answer = means[0] + seen.reshape(-1, 6) @ (means[1:] - means[:1])
    error = unseen.reshape(-1, 6) - answer
    variance = np.asarray(got.emissions.sd[0] ** 2).ravel()
    num = len(error)
    assert (np.abs(error.mean(axis=0)) <= 4 * np.sqrt(variance / num) + 1e-9).all()
    assert (np.abs(error.var(axis=0) - variance) <= 4 * variance * np.sqrt(2 / num) + 1e-9).all()
    signal = seen.reshape(num, 6)
    for i in range(6):  # the error is independent of everything that was seen
        correlation = np.abs(signal.T @ error[:, i]) / num
        assert (correlation <= 5 * np.sqrt(variance[i] * (signal**2).mean(axis=0) / num) + 1e-9).all()


# Pearl's axioms (Causality, sec. 7.3.1)

SYSTEM = random_system(4, num_timesteps=NUM_TIMESTEPS, input_dim=1)
PLANS = [CLAMPED, issm.do({0: 1.0}, **SIZES, start=1), issm.do({1: 0.0}, **SIZES, stop=3)]


def world(plan, factual=FREE):
    return issm.counterfactual(SYSTEM.params, SYSTEM.emissions, plan, interventions=factual, inputs=SYSTEM.inputs)


@pytest.mark.parametrize("plan", PLANS)
def test_effectiveness(plan):
    """In the world in which a state is set, it is what it was set to."""
    states = world(plan).states
    np.testing.assert_allclose(states.mean[plan.mask], plan.value[plan.mask], atol=1e-10)
    np.testing.assert_allclose(states.sd[plan.mask], 0.0, atol=1e-6)


def test_composition():
    """Clamping a state to the value that it takes anyway, in a world where that value is certain, changes nothing.

    Without process noise and with a known start every value is certain.
    """
    fields = SYSTEM.fields | {"dynamics_cov": np.zeros((2, 2)), "initial_cov": np.zeros((2, 2))}
    params = issm.make_lgssm_params(**fields)
    first = issm.counterfactual(params, SYSTEM.emissions, PLANS[1], inputs=SYSTEM.inputs)
    both = issm.merge(PLANS[1], issm.Intervention(np.array([[0, 0], [0, 1], [0, 1], [0, 0]], bool), first.states.mean))
    second = issm.counterfactual(params, SYSTEM.emissions, both, inputs=SYSTEM.inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), first, second)


def test_reversibility():
    """If x is what it would be were w set, and w what it would be were x set, then they are so without either being set."""
    fields = SYSTEM.fields | {"dynamics_cov": np.zeros((2, 2)), "initial_cov": np.zeros((2, 2))}
    params = issm.make_lgssm_params(**fields)
    ask = lambda plan: issm.counterfactual(params, SYSTEM.emissions, plan, inputs=SYSTEM.inputs).states.mean  # noqa: E731
    free = np.asarray(ask(FREE))
    masks = [np.zeros((NUM_TIMESTEPS, 2), bool) for _ in range(2)]
    masks[0][1:, 0] = masks[1][1:, 1] = True
    for mask in masks:
        np.testing.assert_allclose(ask(issm.Intervention(mask, free)), free, atol=1e-10)


def test_it_is_not_an_interventional_prediction():
    """It knows the noise of this trial: a clamp of no consequence leaves nothing uncertain, where a new trial is uncertain."""
    late = issm.do({0: 1.0}, **SIZES, start=3)
    got = world(late)
    np.testing.assert_allclose(got.emissions.mean[:3], SYSTEM.emissions[:3], atol=1e-10)
    np.testing.assert_allclose(got.emissions.sd[:3], 0.0, atol=1e-10)
    new = issm.interventional_prediction(SYSTEM.params, late, inputs=SYSTEM.inputs)
    assert (np.asarray(new.emissions.sd) > np.asarray(got.emissions.sd)).all()


def test_leading_axes_and_single_precision():
    system = random_system(5, num_trials=2, num_timesteps=NUM_TIMESTEPS, missing=0.2)
    plans = jax.tree.map(lambda a, b: jnp.stack([a, b]), CLAMPED, NOISY)
    together = issm.counterfactual(system.params, system.emissions, plans)
    shared = issm.counterfactual(system.params, system.emissions, CLAMPED)
    for k, plan in enumerate((CLAMPED, NOISY)):
        alone = issm.counterfactual(system.params, system.emissions[k], plan)
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-9, atol=1e-10), together, alone)
    np.testing.assert_allclose(shared.emissions.mean[0], together.emissions.mean[0], rtol=1e-9)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), system.params)
    single = issm.counterfactual(params, system.emissions, plans)
    assert {leaf.dtype for leaf in jax.tree.leaves(single)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-3), single, together)
