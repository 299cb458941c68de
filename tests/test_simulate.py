"""Simulated systems against an independent NumPy loop, and the promises of the protocols."""

from itertools import chain, combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from issm import simulate

DRIFTS = {
    "linear": (
        simulate.Linear([[0.2, 1.0], [-1.0, 0.4]], [0.3, -0.1]),
        lambda x: np.array([-0.8 * x[0] + x[1] + 0.3, -x[0] - 0.6 * x[1] - 0.1]),
    ),
    "saddle": (
        simulate.Saddle(a=-0.5, b=1.5, c=-2.0, coherence=0.1),
        lambda x: np.array([-0.5 * x[0] ** 3 + 1.5 * x[0] + 0.1, -2.0 * x[1] + 0.1]),
    ),
    "point_attractor": (simulate.point_attractor(0.5, -2.0), lambda x: np.array([-0.5 * x[0], -2.0 * x[1]])),
    "rotational": (simulate.RotationalDynamics(1.2), lambda x: np.array([0.0, 1.2 * x[0]])),
    "dynamic_attractor": (
        simulate.DynamicAttractor(-10.0, 1.2),
        lambda x: np.array([-10.0 * x[0], 1.2 * (1 - x[0])]),
    ),
}


@pytest.mark.parametrize("name", DRIFTS)
def test_euler_against_a_loop(name, getkey):
    drift, reference = DRIFTS[name]
    num_trials, num_timesteps, dt = 3, 40, 0.05
    plan = simulate.random_stimulation(getkey(), num_timesteps, 2, num_trials=num_trials, duration=(3, 6), gap=(0, 8))
    initial = np.array([[0.3, -0.2], [1.0, 0.5], [-0.4, 0.1]])
    states = simulate.euler_sample(getkey(), drift, num_timesteps, dt=dt, initial_state=initial, interventions=plan)
    mask, value = np.asarray(plan.mask), np.asarray(plan.value)
    for k in range(num_trials):
        x = initial[k].copy()
        for t in range(num_timesteps):
            if t > 0:
                x = x + dt * reference(x)
            for i in range(2):
                if mask[k, t, i]:
                    x[i] = value[k, t, i]
            np.testing.assert_allclose(states[k, t], x, rtol=1e-12, atol=1e-14)


def test_process_noise_is_scaled_by_the_root_of_the_step(getkey):
    drift, reference = DRIFTS["linear"]
    dt, scale = 0.1, np.array([0.5, 2.0])
    plan = issm.do({1: 0.7}, num_timesteps=500, state_dim=2, start=100, stop=200)
    states = np.asarray(
        simulate.euler_sample(
            getkey(), drift, 500, dt=dt, initial_state=[0.0, 0.0], noise_scale=scale, num_trials=40, interventions=plan
        )
    )
    assert (states[:, 100:200, 1] == 0.7).all()
    steps = np.array([[reference(x) for x in trial] for trial in states])
    shocks = (states[:, 1:] - states[:, :-1] - dt * steps[:, :-1]) / (np.sqrt(dt) * scale)
    free = np.ones((499, 2), bool)
    free[99:199, 1] = False
    first, second = shocks[:, free[:, 0], 0], shocks[:, free[:, 1], 1]
    for white in (first, second):
        assert abs(white.mean()) < 0.03
        assert abs(white.std() - 1) < 0.02
    assert abs(np.corrcoef(shocks[0, :99, 0], shocks[1, :99, 0])[0, 1]) < 0.35  # trials do not share noise
    assert abs(np.corrcoef(shocks[..., 0].ravel(), shocks[..., 1].ravel())[0, 1]) < 0.02


def test_linear_is_an_lgssm_after_discretisation(getkey):
    drift = DRIFTS["linear"][0]
    weights, bias = drift.discretize(0.05)
    x = np.array([0.4, -1.3])
    np.testing.assert_allclose(weights @ x + bias, x + 0.05 * np.asarray(drift(x)), rtol=1e-14)


def test_rate_parameters_of_the_dynamic_attractor():
    """The published rate form x_t = (1 - dt) x + dt (A x + b), with A = [[-19, 0], [-1.2, 1]] and b = [0, 1.2]."""
    same = simulate.Linear([[-19.0, 0.0], [-1.2, 1.0]], [0.0, 1.2])
    other = simulate.Linear([[1.0, 0.0], [1.2, 1.0]])
    for x in np.random.default_rng(0).normal(size=(5, 2)):
        np.testing.assert_allclose(simulate.DynamicAttractor()(x), same(x), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(simulate.RotationalDynamics()(x), other(x), rtol=1e-12, atol=1e-12)


def test_attractors_attract(getkey):
    line = simulate.line_attractor(right=(1.0, 0.3), left=(0.2, 1.0), decay=-2.0)
    along = np.array([[1.0, -1.0], [1.0, 1.0]]) @ [1.0, 0.3]
    np.testing.assert_allclose(line(along), 0.0, atol=1e-12)
    eigenvalues = np.linalg.eigvals(np.asarray(line.rates) - np.eye(2))
    np.testing.assert_allclose(np.sort(eigenvalues.real), [-2.0, 0.0], atol=1e-12)
    integrator = np.asarray(simulate.lr_integrator(getkey(), 5).rates) - np.eye(5)
    np.testing.assert_allclose(np.linalg.eigvalsh(integrator), np.exp(np.linspace(-1, 0, 5)) - 1, atol=1e-12)
    chain_ = np.asarray(simulate.ff_integrator(getkey(), 4).rates) - np.eye(4)
    expected = np.linalg.eigvals(np.eye(4, k=1) + 0.5 * np.eye(4)[:, -1:].T * np.ones((4, 1)) - np.eye(4))
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(chain_).real), np.sort(expected.real), atol=1e-3)
    np.testing.assert_allclose(np.trace(chain_), -3.5, atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(chain_),
        np.linalg.norm(np.eye(4, k=1) + 0.5 * np.ones((4, 1)) * np.eye(4)[-1] - np.eye(4)),
        rtol=1e-12,
    )


def test_emissions_of_the_ring_systems(getkey):
    states = np.array([[0.2, 0.5], [-0.1, 2.0]])
    expected = [[0.8 * np.cos(0.5), 0.8 * np.sin(0.5)], [1.1 * np.cos(2.0), 1.1 * np.sin(2.0)]]
    np.testing.assert_allclose(simulate.DynamicAttractor().emit(states), expected, rtol=1e-12)
    expected = [[0.2 * np.cos(0.5), 0.2 * np.sin(0.5)], [-0.1 * np.cos(2.0), -0.1 * np.sin(2.0)]]
    np.testing.assert_allclose(simulate.RotationalDynamics().emit(states), expected, rtol=1e-12)
    lift = simulate.orthogonal_lift(getkey(), 2, 7)
    lifted = simulate.DynamicAttractor().emit(states, lift)
    assert lifted.shape == (2, 7)
    np.testing.assert_allclose(lifted @ lift.T, simulate.DynamicAttractor().emit(states), rtol=1e-12)


@pytest.mark.parametrize("distribution", ["normal", "uniform", "sign"])
@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_stimulation_keeps_its_protocol(distribution, one_at_a_time, getkey):
    plan = simulate.random_stimulation(
        getkey(), 400, 3, num_trials=20, duration=(5, 9), gap=(4, 12), amplitude=2.0,
        distribution=distribution, one_at_a_time=one_at_a_time,
    )  # fmt: skip
    mask, value = np.asarray(plan.mask), np.asarray(plan.value)
    assert mask.any(axis=(0, 1)).all()  # each state is clamped
    assert not one_at_a_time or mask.sum(axis=-1).max() == 1
    heights = []
    for k in range(20):
        rows = [mask[k].any(axis=-1)] if one_at_a_time else mask[k].T
        for i, row in enumerate(rows):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
            starts, stops = edges[::2], edges[1::2]
            whole = stops < 400
            lengths = (stops - starts)[whole]
            assert ((lengths >= 5) & (lengths <= 9)).all()
            pauses = starts[1:] - stops[:-1]
            assert ((pauses >= 4) & (pauses <= 12)).all()
            assert 4 <= starts[0] <= 12
            for start, stop in zip(starts, stops, strict=True):
                pulse = value[k, start:stop].sum(axis=-1) if one_at_a_time else value[k, start:stop, i]
                assert (pulse == pulse[0]).all()
                heights.append(pulse[0])
    heights = np.array(heights)
    spread = {"normal": 2.0, "uniform": 2.0 / np.sqrt(3), "sign": 2.0}[distribution]
    assert abs(heights.std() / spread - 1) < 0.12
    if distribution != "normal":
        assert np.abs(heights).max() <= 2.0


def test_stimulation_through_targets(getkey):
    plan = simulate.random_stimulation(getkey(), 50, [[1.0, 0.0, -0.5]], duration=5, gap=5)
    mask, value = np.asarray(plan.mask), np.asarray(plan.value)
    assert mask.shape == (50, 3)
    assert not mask[:, 1].any()
    assert mask[5:10, 0].all()
    assert not mask[10:15].any()
    np.testing.assert_allclose(value[:, 2], -0.5 * value[:, 0])


def test_random_lgssm_is_stable_under_every_clamp(getkey):
    for state_dim in (1, 2, 5):
        params = simulate.random_clamped_lgssm(getkey(), state_dim, 3, norm=0.9)
        weights = np.asarray(params.dynamics.weights)
        free_sets = chain.from_iterable(combinations(range(state_dim), n) for n in range(1, state_dim + 1))
        radii = [np.abs(np.linalg.eigvals(weights[np.ix_(free, free)])).max() for free in free_sets]
        assert max(radii) <= 0.9 + 1e-12
        np.testing.assert_allclose(np.linalg.norm(weights, 2), 0.9, rtol=1e-12)


def test_under_transformations(getkey):
    plan = simulate.random_stimulation(getkey(), 20, 2, num_trials=2)
    keys = jax.random.split(getkey(), 3)

    @jax.jit
    def draw(key, a):
        return simulate.euler_sample(
            key,
            simulate.RotationalDynamics(a),
            20,
            dt=0.1,
            initial_state=jnp.ones(2),
            noise_scale=0.1,
            interventions=plan,
        )

    assert jax.vmap(draw, in_axes=(0, None))(keys, jnp.asarray(1.0)).shape == (3, 2, 20, 2)
    assert np.isfinite(jax.grad(lambda a: draw(keys[0], a).sum())(jnp.asarray(1.0)))
    plans = jax.vmap(lambda key: simulate.random_stimulation(key, 20, 2))(keys)
    assert plans.mask.shape == (3, 20, 2)
    params = jax.jit(lambda key: simulate.random_clamped_lgssm(key, 2, 3))(keys[0])
    assert params.dynamics.weights.shape == (2, 2)
    single = simulate.euler_sample(keys[0], DRIFTS["linear"][0], 5, dt=0.1, initial_state=jnp.zeros(2, jnp.float32))
    assert single.dtype == jnp.float32
    assert single.shape == (5, 2)


BAD = {
    "initial_state": dict(initial_state=[[[0.0]]]),
    "dt": dict(dt=0.0),
    "num_timesteps": dict(num_timesteps=0),
    "noise_scale": dict(noise_scale=[0.1, 0.1, 0.1]),
    "negative noise_scale": dict(noise_scale=-1.0),
    "interventions": dict(interventions=issm.no_intervention(4, 2)),
    "num_trials, initial_state": dict(num_trials=2, initial_state=np.zeros((3, 2))),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_of_euler_sample(case, getkey):
    arguments = dict(num_timesteps=5, dt=0.1, initial_state=[0.0, 0.0]) | BAD[case]
    with pytest.raises(ValueError, match=case.split()[-1] + ": got .*; expected .*"):
        simulate.euler_sample(getkey(), DRIFTS["linear"][0], arguments.pop("num_timesteps"), **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("duration", dict(duration=0)),
        ("gap", dict(gap=(3, 2))),
        ("distribution", dict(distribution="cauchy")),
        ("num_trials", dict(num_trials=0)),
    ],
)
def test_bad_arguments_of_random_stimulation(name, arguments, getkey):
    with pytest.raises(ValueError, match=f"{name}: got .*; expected .*"):
        simulate.random_stimulation(getkey(), 20, 2, **arguments)


def test_bad_systems(getkey):
    with pytest.raises(ValueError, match="rates: got shape"):
        simulate.Linear([[1.0, 2.0]])
    with pytest.raises(ValueError, match="bias: got shape"):
        simulate.Linear([[1.0]], [1.0, 2.0])
    with pytest.raises(ValueError, match="right, left: got parallel"):
        simulate.line_attractor(right=(1.0, 1.0), left=(2.0, 2.0))
    with pytest.raises(ValueError, match="num_rows"):
        simulate.orthogonal_lift(getkey(), 3, 2)
    with pytest.raises(ValueError, match="norm: got 1"):
        simulate.random_clamped_lgssm(getkey(), 2, 2, norm=1.0)
    with pytest.raises(ValueError, match="state: got shape"):
        simulate.Saddle()([1.0, 2.0, 3.0])


def test_any_function_is_a_drift(getkey):
    states = simulate.euler_sample(getkey(), lambda x: -x, 3, dt=0.5, initial_state=[1.0, 2.0], num_trials=2)
    np.testing.assert_allclose(states[1], [[1.0, 2.0], [0.5, 1.0], [0.25, 0.5]])
