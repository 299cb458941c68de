"""Learned targets: exact on moments that are exact, and on small clear simulations; what cannot be known is said to be unknown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from issm import metrics
from issm.fitting.spectra import Channel, Steps, describe, functionals, judge, share_states

D, KEY = 4, jax.random.key(0)
RNG = np.random.default_rng(0)
MAP = RNG.normal(size=(D, D))  # true states of those that a blind fit works with
STATES = [(0,), (0, 2), (1, 2)]  # the channels of each clamped state; the last state is never clamped
COV = np.cov(RNG.normal(size=(D, 3 * D)))


def exact_channel(m):
    """Moments without sampling error, in the coordinates of the blind fit."""
    back = np.linalg.inv(MAP)
    hit = np.array([m in (STATES[i] if i < 3 else ()) for i in range(D)])
    left = np.where(hit[:, None] | hit[None], 0.0, COV)
    moved = np.where(hit[:, None] & hit[None], COV + 1.0, 0.0)
    zeros = np.zeros(D)
    return Channel(
        left=back @ left @ back.T,
        free=back @ COV @ back.T,
        moved=back @ moved @ back.T,
        error=np.zeros((D, D)),
        eigenvalues=zeros,
        errors=zeros,
        evidence=zeros,
        soft_p=0.0,
        num_steps=100,
        num_clamped=int(hit.sum()),
    )


def test_states_and_functionals_from_exact_moments():
    channels = {m: exact_channel(m) for m in range(3)}
    assert share_states(channels, D) == STATES
    rows = functionals(channels, STATES, D)
    product = rows @ np.linalg.inv(MAP)  # each row a multiple of one true state
    scale = np.abs(product).max(axis=1, keepdims=True)
    np.testing.assert_allclose(product / scale / np.sign(np.diag(product))[:, None], np.eye(D), atol=1e-6)


def test_clamps_that_do_not_add_up_to_states():
    channels = {m: exact_channel(m) for m in range(3)}
    channels[1].num_clamped += 2  # five states in all, of four
    assert share_states(channels, D) is None


def draw_steps(kind, num_steps, noise=0.2):
    """Steps of one channel on two states: state 0 is clamped to -2 u, or both are pushed, or nothing happens."""
    rng = np.random.default_rng(1)
    expected, amplitude = rng.normal(size=(num_steps, 2)), rng.normal(size=num_steps)
    state = expected + rng.normal(size=(num_steps, 2))
    if kind == "clamp":
        state[:, 0] = 3.0 - 2.0 * amplitude
    elif kind == "soft":
        state += amplitude[:, None]
    same = lambda variance: np.broadcast_to(variance * np.eye(2), (num_steps, 2, 2))  # noqa: E731
    estimate = state + np.sqrt(noise) * rng.normal(size=(num_steps, 2))
    return Steps(estimate, same(noise), expected, same(1.0), amplitude[:, None], np.ones((num_steps, 1), bool))


@pytest.mark.parametrize("kind", ["clamp", "soft", "none"])
def test_kinds(kind):
    channel = describe(draw_steps(kind, 400), 0)
    assert judge(channel) == (kind, "")
    if kind == "clamp":
        assert channel.eigenvalues[0] == pytest.approx(0.0, abs=3 * channel.errors[0])


def test_what_is_not_clear_is_not_guessed():
    kind, reason = judge(describe(draw_steps("clamp", 40, noise=20.0), 0))
    assert kind == "undecided"
    assert "not clear" in reason
    assert judge(describe(draw_steps("clamp", 10), 0)) == ("undecided", "acts alone at too few steps")


# A simulation at twice as much signal as noise

TARGETS = np.array(
    [[1.5, 0.0, 0.0], [-0.8, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
)
KINDS = ("clamp", "clamp", "soft", "none", "undecided", "undecided")


@pytest.fixture(scope="module")
def data():
    """Six channels: two clamp, one is soft, one does nothing, one only ever comes with another, one is never used."""
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(6, 3))
    truth = issm.make_lgssm_params(
        np.zeros(3), np.ones(3), 0.9 * np.linalg.qr(rng.normal(size=(3, 3)))[0], np.full(3, 0.5), weights, np.full(6, 0.5),
        emissions_bias=rng.normal(size=6), dynamics_input_weights=np.eye(6)[[2, 0, 2]] * [[1.0], [0.0], [-1.0]],
    )  # fmt: skip
    active, amplitudes = np.zeros((40, 60, 6), bool), np.zeros((40, 60, 6))
    for k in range(40):
        for n, start in enumerate(range(5, 55, 10)):
            m = (k + n) % 5
            active[k, start : start + 5, m] = True
            amplitudes[k, start : start + 5, m] = rng.choice([-2.0, -1.0, 0.0, 1.0, 2.0])
    active[..., 3] |= active[..., 4]
    plan = issm.stimulate(amplitudes, TARGETS, active)
    _, emissions = issm.lgssm_sample(KEY, truth, 60, amplitudes, interventions=plan)
    return truth, emissions, amplitudes, active


@pytest.fixture(scope="module")
def learned(data):
    _, emissions, amplitudes, active = data
    return issm.learn_targets(KEY, emissions, amplitudes, 3, active=active, num_iters=30)


def test_kinds_targets_and_gains(learned):
    assert learned.kinds == KINDS
    found = np.asarray(learned.targets)
    # State 0 of the fit is clamped by both channels, state 1 by the second; the first gain of each is one.
    np.testing.assert_array_equal(found != 0, TARGETS != 0)
    assert found[0, 0] == found[1, 1] == 1.0
    assert found[1, 0] == pytest.approx(-0.8 / 1.5, rel=0.05)


def test_the_plan_and_the_fit_are_ready_for_use(data, learned):
    """In common units the fit has the truth's dynamics, and its likelihood is that of its own clamps and inputs."""
    truth, emissions, amplitudes, active = data
    plan = issm.stimulate(amplitudes, learned.targets, active)
    inputs = learned.inputs(amplitudes, active)
    np.testing.assert_array_equal(inputs[..., 2], amplitudes[..., 2])
    assert not np.delete(np.asarray(inputs), 2, axis=-1).any()
    truth_plan = issm.stimulate(amplitudes, TARGETS, active)
    assert (np.asarray(plan.mask) == np.asarray(truth_plan.mask)).all()
    smoothed = issm.lgssm_smoother(learned.params, emissions, inputs, interventions=plan).smoothed_means
    true_plan_states = issm.lgssm_smoother(truth, emissions, amplitudes, interventions=truth_plan).smoothed_means
    moved = metrics.align_states(smoothed, true_plan_states, kind="scaled_permutation")
    assert (np.asarray(moved.r2)[:2] > 0.97).all()
    np.testing.assert_array_equal(np.argmax(np.abs(moved.matrix), axis=1)[:2], [0, 1])


def test_evidence_and_words(learned):
    assert learned.num_steps[0] > 150
    assert (np.asarray(learned.variance_left)[0, 1:] > 0.5).all()
    assert abs(float(learned.variance_left[0, 0])) < 0.2
    assert float(learned.soft_p[2]) < 1e-6
    assert np.isnan(np.asarray(learned.soft_p)[4:]).all()
    words = learned.summary().splitlines()
    assert words[0].startswith("channel 0: clamps state 0 (gain 1)")
    assert words[2].startswith("channel 2: soft input")
    assert words[3].startswith("channel 3: does nothing")
    assert words[4].startswith("channel 4: undecided: acts alone at too few steps")
    assert words[5].startswith("channel 5: undecided: never used")
    assert np.isfinite(float(learned.log_prob))


Y, U = np.zeros((2, 6, 3)), np.ones((2, 6, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: issm.learn_targets(KEY, Y, U[:1], 2), "amplitudes: got shape"),
        (lambda: issm.learn_targets(KEY, Y, U, 4), "state_dim: got 4 for 3 emissions"),
        (lambda: issm.learn_targets(KEY, Y, 0 * U, 2), "active: got no stimulated step"),
        (lambda: issm.learn_targets(KEY, Y, U, 2, active=U), "active: got dtype float64"),
        (lambda: issm.learn_targets(KEY, Y, U * np.nan, 2), "amplitudes: got 12 entries"),
        (
            lambda: jax.jit(lambda y: issm.learn_targets(KEY, y, U, 2).targets)(jnp.asarray(Y)),
            "emissions: got data that JAX",
        ),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
