"""The start of the fitters: it follows changes of units, is sound on little or broken data, and says what it cannot do."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import issm

KEY = jax.random.key(0)
WEIGHTS = np.array([[0.9, -0.3], [0.2, 0.8]])


def simulate(seed=0, *, num_trials=None, num_timesteps=200, state_dim=2, emission_dim=5, noise=0.1):
    """Emissions of a stable system whose state 0 is clamped in the middle third, and the clamps."""
    rng = np.random.default_rng(seed)
    weights = WEIGHTS if state_dim == 2 else 0.9 * np.linalg.qr(rng.normal(size=(state_dim, state_dim)))[0]
    truth = issm.make_lgssm_params(
        np.zeros(state_dim),
        np.ones(state_dim),
        weights,
        np.full(state_dim, 0.2),
        rng.normal(size=(emission_dim, state_dim)),
        np.full(emission_dim, noise),
        emissions_bias=rng.normal(size=emission_dim),
    )
    third = num_timesteps // 3
    value = np.repeat(rng.normal(size=-(-third // 5)), 5)[:third]
    plan = issm.no_intervention(num_timesteps, state_dim)
    if third:
        plan = issm.do({0: value}, num_timesteps=num_timesteps, state_dim=state_dim, start=third, stop=2 * third)
    if num_trials is not None:
        plan = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_trials), plan)
    _, emissions = issm.lgssm_sample(jax.random.key(seed), truth, num_timesteps, interventions=plan)
    return truth, np.array(emissions), plan


def assert_sound(params):
    """Finite, positive variances, an A that does not explode."""
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    for cov in (params.initial.cov, params.dynamics.cov, params.emissions.cov):
        assert cov.ndim == 1
        assert (cov > 0).all()
    assert np.abs(np.linalg.eigvals(params.dynamics.weights)).max() < 1.2


def in_units(params, scale, offset):
    """The same model of the emissions `scale * y + offset`."""
    emissions = params.emissions
    new = (
        scale[:, None] * emissions.weights,
        scale * emissions.bias + offset,
        scale[:, None] * emissions.input_weights,
        scale**2 * emissions.cov,
    )
    where = lambda p: (p.emissions.weights, p.emissions.bias, p.emissions.input_weights, p.emissions.cov)  # noqa: E731
    return eqx.tree_at(where, params, new)


def up_to_sign(params, state):
    """With the sign of a state that is never clamped chosen by the first emission, which may be mirrored in both."""
    sign = np.ones(params.state_dim)
    sign[state] = np.sign(params.emissions.weights[0, state])
    return issm.transform_params(params, np.diag(sign))


UNITS = pytest.mark.parametrize(
    ("scale", "offset"),
    [
        (np.full(5, 1000.0), np.zeros(5)),
        (np.full(5, -1e-6), np.full(5, 3.0)),
        (np.ones(5), np.full(5, 1e4)),
        (np.array([1e-3, 1.0, -7.0, 1e3, 0.2]), np.array([0.0, 5.0, -100.0, 1.0, 1e3])),
    ],
    ids=["scale", "small, mirrored and moved", "far away", "channel by channel"],
)


@pytest.mark.parametrize("missing", [0.0, 0.2])
@UNITS
def test_regressions_follow_a_change_of_units(scale, offset, missing):
    """Clamped to one value, so that nothing but regressions and five updates is tried."""
    _, emissions, plan = simulate()
    plan = issm.Intervention(plan.mask, 1.0)
    emissions = np.where(np.random.default_rng(1).random(emissions.shape) < missing, np.nan, emissions)
    plain = issm.initialize_lgssm(KEY, emissions, 2, interventions=plan)
    other = issm.initialize_lgssm(KEY, scale * emissions + offset, 2, interventions=plan)
    assert other.start == plain.start
    other, expected = up_to_sign(other.params, 1), up_to_sign(in_units(plain.params, scale, offset), 1)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max(initial=0.0))


@UNITS
def test_a_fit_to_untouched_steps_follows_a_change_of_units(scale, offset):
    """As far as its tolerance determines it: in likelihood, and in what the data determine well."""
    _, emissions, plan = simulate(num_trials=8, num_timesteps=60)
    plain = issm.initialize_lgssm(KEY, emissions, 2, interventions=plan)
    other = issm.initialize_lgssm(KEY, scale * emissions + offset, 2, interventions=plan)
    assert other.start == plain.start == "redrawn"
    volume = np.log(np.abs(scale)).sum() * 8 * 60
    np.testing.assert_allclose(other.log_probs + volume, plain.log_probs, atol=0.05)
    other, expected = up_to_sign(other.params, 1), up_to_sign(in_units(plain.params, scale, offset), 1)
    for where in (lambda p: p.dynamics.weights, lambda p: p.emissions.weights, lambda p: p.emissions.cov):
        a, b = where(other), where(expected)
        np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max())


def test_is_near_the_truth_in_the_coordinates_of_the_clamps():
    """All states clamped at some time, so that their coordinates are known."""
    rng = np.random.default_rng(0)
    truth, _, _ = simulate(emission_dim=8)
    plans = [
        issm.do(
            {k % 2: np.repeat(rng.normal(size=10), 5)}, num_timesteps=200, state_dim=2, start=20 * k, stop=20 * k + 50
        )
        for k in range(6)
    ]
    plan = jax.tree.map(lambda *leaves: jnp.stack(leaves), *plans)
    _, emissions = issm.lgssm_sample(jax.random.key(0), truth, 200, interventions=plan)
    start = issm.initialize_lgssm(KEY, emissions, 2, interventions=plan).params
    for block in ("dynamics", "emissions"):
        found, true = (getattr(p, block).weights for p in (start, truth))
        assert np.linalg.norm(found - true) < 0.3 * np.linalg.norm(true), (block, found, true)
    np.testing.assert_allclose(start.emissions.bias, truth.emissions.bias, atol=0.5)


CASES = {
    "few missing": dict(missing=0.05),
    "most missing": dict(missing=0.8),
    "one emission, three states": dict(emission_dim=1, state_dim=3),
    "two emissions, six states": dict(emission_dim=2, state_dim=6),
    "300 emissions": dict(emission_dim=300, num_timesteps=60),
    "300 emissions, 12 steps": dict(emission_dim=300, num_timesteps=12),
    "one trial of few steps": dict(num_trials=1, num_timesteps=4),
    "trials of one step": dict(num_trials=20, num_timesteps=1),
    "trials of two steps": dict(num_trials=20, num_timesteps=2),
    "trials of three steps, missing": dict(num_trials=30, num_timesteps=3, missing=0.3),
    "just enough steps": dict(num_timesteps=3),
    "no noise": dict(noise=1e-12),
}


@pytest.mark.parametrize("name", CASES)
def test_is_sound_on_little_data(name):
    options = dict(CASES[name])
    missing = options.pop("missing", 0.0)
    _, emissions, plan = simulate(3, **options)
    emissions = np.where(np.random.default_rng(2).random(emissions.shape) < missing, np.nan, emissions)
    state_dim = options.get("state_dim", 2)
    start = issm.initialize_lgssm(KEY, emissions, state_dim, interventions=plan)
    assert_sound(start.params)
    assert start.start in start.starts
    assert f"start {start.start}" in start.reason
    assert start.params.dynamics.weights.shape == (state_dim, state_dim)
    again = issm.initialize_lgssm(KEY, emissions, state_dim, interventions=plan)
    jax.tree.map(np.testing.assert_array_equal, again, start)


@pytest.mark.parametrize("values", [0.0, 7.0, 1e6], ids=["zero", "seven", "a million"])
@pytest.mark.parametrize("clamped", [False, True])
def test_constant_data(values, clamped):
    plan = issm.do({0: np.tile([1.0, 2.0], 2)}, num_timesteps=80, state_dim=2, start=20, stop=24) if clamped else None
    start = issm.initialize_lgssm(KEY, np.full((80, 3), values), 2, interventions=plan).params
    assert_sound(start)
    np.testing.assert_allclose(start.emissions.bias, values, rtol=1e-6, atol=1e-6)


def test_constant_duplicate_and_unobserved_channels():
    _, emissions, plan = simulate()
    emissions[:, 1], emissions[:, 2], emissions[:, 3] = 3.0, emissions[:, 0], np.nan
    assert_sound(issm.initialize_lgssm(KEY, emissions, 2, interventions=plan).params)


def test_state_clamped_throughout():
    _, emissions, _ = simulate()
    plan = issm.do({0: 1.0}, num_timesteps=200, state_dim=2)
    assert_sound(issm.initialize_lgssm(KEY, emissions, 2, interventions=plan).params)


def test_inputs_are_regressors():
    rng = np.random.default_rng(0)
    inputs = np.repeat(rng.normal(size=(40, 1)), 5, axis=0)
    direct = np.array([[2.0], [0.0], [-1.0], [0.0], [0.5]])
    _, emissions, plan = simulate()
    start = issm.initialize_lgssm(KEY, emissions + inputs @ direct.T, 2, inputs=inputs, interventions=plan).params
    assert_sound(start)
    assert start.dynamics.input_weights.shape == (2, 1)
    assert start.emissions.input_weights.shape == (5, 1)


@pytest.mark.parametrize("one_level", [True, False])
def test_follows_the_dtype_of_the_data(one_level):
    """With one level there are only regressions and five updates; a fit in single precision ends where rounding lets it."""
    _, emissions, plan = simulate()
    plan = issm.Intervention(plan.mask, 1.0) if one_level else plan
    single = issm.initialize_lgssm(KEY, np.float32(emissions), 2, interventions=plan)
    assert {leaf.dtype for leaf in jax.tree.leaves(single.params)} == {np.dtype("float32")}
    double = issm.initialize_lgssm(KEY, np.float64(np.float32(emissions)), 2, interventions=plan)
    assert ("redrawn" in single.starts) != one_level
    np.testing.assert_allclose(single.log_probs, double.log_probs, atol=1e-2 if one_level else 0.5)
    if one_level:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), single.params, double.params)


def test_says_what_the_data_do_not_decide():
    rng = np.random.default_rng(0)
    emissions = rng.normal(size=(5, 12, 3))
    emissions[..., 2] = np.nan
    mask = np.zeros((12, 3), bool)
    mask[4:8, 1] = mask[9:11, 2] = True
    value = np.where(mask, [0.0, 1.0, 0.0], 0.0)
    value[10, 2] = 2.0
    plan = issm.Intervention(mask, value)
    start = issm.initialize_lgssm(KEY, emissions, 3, inputs=np.ones((12, 1)), interventions=plan)
    np.testing.assert_array_equal(start.never_clamped, [True, False, False])
    np.testing.assert_array_equal(start.one_level, [False, True, False])
    for said in (
        "state 0 is never clamped",
        "state 1 is clamped to one value",
        "emission 2 is never observed",
        "input 0 never changes",
    ):
        assert said in start.reason
    log_prob = issm.marginal_log_prob(start.params, emissions, np.ones((12, 1)), interventions=plan).sum()
    np.testing.assert_allclose(start.log_probs.max(), log_prob, rtol=1e-9)
    assert start.starts[int(np.argmax(start.log_probs))] == start.start


Y = np.random.default_rng(0).normal(size=(20, 3))
# name: (call, the argument named, what came, what was expected)
BAD_CALLS = {
    "no states": (lambda: issm.initialize_lgssm(KEY, Y, 0), "state_dim", "0", "at least 1"),
    "half a state": (lambda: issm.initialize_lgssm(KEY, Y, 1.5), "state_dim", "1.5", "an integer"),
    "True states": (lambda: issm.initialize_lgssm(KEY, Y, True), "state_dim", "True", "an integer"),
    "traced data": (
        lambda: jax.jit(lambda y: issm.initialize_lgssm(KEY, y, 2))(Y),
        "emissions",
        "traces",
        "concrete",
    ),
    "all missing": (lambda: issm.initialize_lgssm(KEY, np.full_like(Y, np.nan), 2), "emissions", "NaN", "observed"),
    "empty": (lambda: issm.initialize_lgssm(KEY, Y[:0], 2), "emissions", "empty", "one step"),
    "infinite": (lambda: issm.initialize_lgssm(KEY, np.full_like(Y, np.inf), 2), "emissions", "infinite", "finite"),
    "one axis": (lambda: issm.initialize_lgssm(KEY, Y[:, 0], 1), "emissions", "shape (20,)", "num_timesteps"),
    "one number": (lambda: issm.initialize_lgssm(KEY, 1.0, 1), "emissions", "", "num_timesteps"),
    "words": (lambda: issm.initialize_lgssm(KEY, np.full((20, 3), "a"), 2), "emissions", "dtype", "real numbers"),
    "more states than data": (
        lambda: issm.initialize_lgssm(KEY, Y, 20),
        "emissions",
        "20 steps with an observation",
        "21",
    ),
    "more states than observed steps": (
        lambda: issm.initialize_lgssm(KEY, np.where(np.arange(20)[:, None] < 3, Y, np.nan), 3),
        "emissions",
        "3 steps with an observation",
        "4",
    ),
    "inputs of fewer steps": (
        lambda: issm.initialize_lgssm(KEY, Y, 2, inputs=np.ones((10, 1))),
        "inputs",
        "(10, 1)",
        "(20, 1)",
    ),
    "clamps of more states": (
        lambda: issm.initialize_lgssm(KEY, Y, 2, interventions=issm.no_intervention(20, 3)),
        "interventions",
        "(20, 3)",
        "(20, 2)",
    ),
    "a seed for a key": (lambda: issm.initialize_lgssm(0, Y, 2), "key", "int", "key"),
}


@pytest.fixture
def user_calls():
    """Calls as a user makes them: without the type checks of these tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("user_calls")
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_the_argument(name):
    call, argument, got, expected = BAD_CALLS[name]
    with pytest.raises(ValueError) as caught:
        call()
    parts = re.fullmatch(r"(.+?): got (.*?); expected (.+?)\. (\S.*)", str(caught.value), flags=re.DOTALL)
    assert parts, caught.value
    assert parts[1] == argument
    assert got in parts[2]
    assert expected in parts[3]
