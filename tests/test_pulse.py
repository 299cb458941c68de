"""One pulse, one step: every path through the library must agree on the step in which it acts.

Entry t of an intervention, and of the inputs, acts on the arrival in x_t.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm

NUM_TIMESTEPS, STEP = 7, 3
TINY = 1e-16
CLAMP = issm.do({0: 4.0}, num_timesteps=NUM_TIMESTEPS, state_dim=2, start=STEP, stop=STEP + 1)
PULSE = np.zeros((NUM_TIMESTEPS, 1))
PULSE[STEP] = 4.0
# x_0 decays by half at each step and drives x_1, which forgets
WEIGHTS = np.array([[0.5, 0.0], [1.0, 0.0]])
AFTER = 4.0 * 0.5 ** np.arange(NUM_TIMESTEPS - STEP)
STATES = np.zeros((NUM_TIMESTEPS, 2))
STATES[STEP:, 0] = AFTER
STATES[STEP + 1 :, 1] = AFTER[:-1]


def params(noise):
    return issm.make_lgssm_params(
        np.zeros(2), noise * np.ones(2), WEIGHTS, noise * np.ones(2), np.eye(2), noise * np.ones(2),
        dynamics_input_weights=np.array([[1.0], [0.0]]), emissions_input_weights=np.array([[0.0], [1.0]]),
    )  # fmt: skip


CASES = {
    "clamp": dict(inputs=np.zeros((NUM_TIMESTEPS, 1)), interventions=CLAMP),
    "input": dict(inputs=PULSE, interventions=None),
}


def emissions_of(case):
    direct = np.stack([np.zeros(NUM_TIMESTEPS), case["inputs"][:, 0]], axis=1)
    return STATES + direct


@pytest.mark.parametrize("kind", CASES)
def test_sampler(kind):
    states, emissions = issm.lgssm_sample(jax.random.key(0), params(TINY), NUM_TIMESTEPS, **CASES[kind])
    np.testing.assert_allclose(states, STATES, atol=1e-6)
    np.testing.assert_allclose(emissions, emissions_of(CASES[kind]), atol=1e-6)


@pytest.mark.parametrize("kind", CASES)
def test_filter_and_smoother(kind):
    """Nothing is surprising: predictions, filtered and smoothed means are the pulse response itself."""
    posterior = issm.lgssm_smoother(params(1.0), emissions_of(CASES[kind]), **CASES[kind])
    for name in ("predicted_means", "filtered_means", "smoothed_means"):
        np.testing.assert_allclose(getattr(posterior, name), STATES, atol=1e-12, err_msg=name)
    filtered = issm.lgssm_filter(params(1.0), emissions_of(CASES[kind]), **CASES[kind])
    np.testing.assert_allclose(filtered.predicted_means, STATES, atol=1e-12)


@pytest.mark.parametrize("kind", CASES)
def test_log_likelihood_is_highest_at_the_step_of_the_pulse(kind):
    case = CASES[kind]
    log_probs = []
    for shift in (-1, 0, 1):
        moved = jax.tree.map(lambda leaf, shift=shift: np.roll(leaf, shift, axis=0), case)
        log_probs.append(float(issm.marginal_log_prob(params(0.1), emissions_of(case), **moved)))
    assert np.argmax(log_probs) == 1


@pytest.mark.parametrize("kind", CASES)
def test_prediction(kind):
    plan = CASES[kind]["interventions"] or issm.no_intervention(NUM_TIMESTEPS, 2)
    prediction = issm.interventional_prediction(params(1.0), plan, inputs=CASES[kind]["inputs"])
    np.testing.assert_allclose(prediction.states.mean, STATES, atol=1e-12)
    np.testing.assert_allclose(prediction.emissions.mean, emissions_of(CASES[kind]), atol=1e-12)


@pytest.mark.parametrize("kind", CASES)
def test_prediction_after_a_history(kind):
    """The first step of the plan is the step after the history's last, wherever the pulse falls."""
    case = jax.tree.map(np.asarray, CASES[kind])
    plan = case["interventions"] or issm.no_intervention(NUM_TIMESTEPS, 2)
    for cut in (STEP, STEP + 1, STEP + 2):
        past, future = ((jax.tree.map(lambda leaf, w=w: leaf[w], plan)) for w in (slice(cut), slice(cut, None)))
        history = issm.History(emissions_of(case)[:cut], case["inputs"][:cut], past)
        prediction = issm.interventional_prediction(params(1.0), future, history=history, inputs=case["inputs"][cut:])
        np.testing.assert_allclose(prediction.states.mean, STATES[cut:], atol=1e-12)
        np.testing.assert_allclose(prediction.emissions.mean, emissions_of(case)[cut:], atol=1e-12)


def test_effect():
    effect = issm.causal_effect(params(1.0), CLAMP, inputs=PULSE * 0, of="states")
    np.testing.assert_allclose(effect.mean, STATES, atol=1e-12)


def test_em_learns_from_the_arrivals_of_an_input():
    """States that are seen almost exactly make the M step a regression of x_t on u_t, and on nothing shifted."""
    truth = params(1e-4)
    start = eqx.tree_at(lambda p: p.dynamics.input_weights, truth, jnp.array([[0.2], [0.5]]))
    fit = issm.fit_em(
        start, emissions_of(CASES["input"]), PULSE, trainable=only(lambda p: p.dynamics.input_weights), num_iters=100
    )
    np.testing.assert_allclose(fit.params.dynamics.input_weights, [[1.0], [0.0]], atol=1e-3)


def test_em_leaves_out_the_arrivals_of_a_clamp():
    """A second clamp, two steps after the first: its arrival would teach a wrong A_00, the others the right one."""
    plan = issm.merge(CLAMP, issm.do({0: 4.0}, num_timesteps=NUM_TIMESTEPS, state_dim=2, start=5, stop=6))
    states = np.zeros((NUM_TIMESTEPS, 2))
    for t in range(1, NUM_TIMESTEPS):
        states[t] = np.where(plan.mask[t], plan.value[t], WEIGHTS @ states[t - 1])
    truth = params(1e-4)
    start = eqx.tree_at(lambda p: p.dynamics.weights, truth, jnp.array([[0.3, 0.0], [0.6, 0.1]]))
    fit = issm.fit_em(
        start, states, 0 * PULSE, interventions=plan, trainable=only(lambda p: p.dynamics.weights), num_iters=100
    )
    np.testing.assert_allclose(fit.params.dynamics.weights, WEIGHTS, atol=1e-3)


def only(where):
    """Everything frozen but one field."""
    return eqx.tree_at(where, jax.tree.map(lambda _: False, params(1.0)), True)
