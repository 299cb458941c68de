"""One pulse, one step: every path through the library must agree on the step in which it acts.

Entry t of an intervention, and of the inputs, acts on the arrival in x_t.
"""

import jax
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
