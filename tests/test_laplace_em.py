"""Fits of the general model: their pieces against exact EM and loops in NumPy, their guards, their options."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from helpers import assert_refused, random_system

KEY = jax.random.key(0)
T, D, N, K = 12, 2, 3, 4
MASK = np.zeros((K, T, D), bool)
MASK[:, 2:5, 0] = MASK[1::2, 6:9, 1] = True
PLAN = issm.Intervention(MASK, np.random.default_rng(0).normal(size=MASK.shape))
LINEAR = issm.make_lgssm_params(
    [0.0, 0.5], [0.2, 0.2], [[0.9, 0.2], [-0.2, 0.9]], [0.02, 0.02], np.ones((N, D)), np.ones(N)
)
TRUTH = issm.SSM(
    LINEAR.initial, LINEAR.dynamics,
    issm.PoissonEmission(issm.LinearMap([[1.0, 0.0], [0.0, -1.0], [1.0, 1.0]], [1.0, 1.0, 0.0]), 3.0),
)  # fmt: skip
COUNTS = issm.sample(KEY, TRUTH, T, interventions=PLAN)[1]
START = issm.initialize_ssm(KEY, COUNTS, D, likelihood="poisson", exposure=3.0, widths=(4,))


def fit(model=START, emissions=COUNTS, **options):
    options = {"num_rollout": 12, "num_iters": 4, "interventions": PLAN} | options
    return issm.fit_laplace_em(model, emissions, **options)


def test_clamps_make_a_better_start():
    """Near the truth before any update, where the other start knows of neither dynamics nor map; a missing entry is no matter."""
    rng = np.random.default_rng(1)
    mask, value = np.zeros((16, 40, D), bool), 1.5 * rng.normal(size=(16, 40, D))
    for k in range(16):
        for i in range(D):
            first = 3 + 18 * ((i + k) % 2) + rng.integers(8)
            mask[k, first : first + 6, i] = True
            value[k, first : first + 6, i] = value[k, first, i]
    plan = issm.Intervention(mask, value)
    counts = np.array(issm.sample(KEY, TRUTH, 40, interventions=plan)[1])
    counts[0, 3, 1] = np.nan
    how = dict(likelihood="poisson", exposure=3.0, widths=(4,))
    from_clamps = issm.initialize_ssm(KEY, counts, D, interventions=plan, **how)
    held = issm.initialize_ssm(KEY, counts, D, **how)
    np.testing.assert_allclose(from_clamps.dynamics.weights, TRUTH.dynamics.weights, atol=0.2)
    np.testing.assert_allclose(from_clamps.emission.map.skip, TRUTH.emission.map.weights, atol=0.35)
    truth, near, far = (
        float(issm.posterior(model, counts, interventions=plan).marginal_loglik.sum())
        for model in (TRUTH, from_clamps, held)
    )
    assert truth - near < 0.2 * (truth - far)


@pytest.fixture(scope="module")
def fitted():
    return fit()


@pytest.mark.parametrize("form", ["diagonal", "full"])
def test_a_sweep_is_exact_em_where_that_exists(form):
    """Dynamics and initial state of a linear Gaussian model after one sweep, with a frozen entry, and its objective."""
    system = random_system(
        5, num_trials=4, num_timesteps=8, input_dim=1, initial_cov=form, dynamics_cov=form, missing=0.2,
        clamps="mixed", shared_interventions=False, shared_inputs=False,
    )  # fmt: skip
    params = system.params
    arguments, options = system.data
    frozen = jax.tree.map(lambda _: True, params)
    entry = np.ones((2, 2), bool)
    entry[0, 1] = False
    frozen = eqx.tree_at(lambda p: p.dynamics.weights, frozen, entry)
    exact = issm.fit_em(params, *arguments, **options, num_iters=1, tol=0.0,
                        trainable=eqx.tree_at(lambda p: p.emissions, frozen, False))  # fmt: skip
    model = issm.ssm_from_lgssm(params)
    trainable = jax.tree.map(lambda _: True, model)
    trainable = eqx.tree_at(lambda m: (m.dynamics.weights, m.emission), trainable, (entry, False))
    ours = issm.fit_laplace_em(model, *arguments, **options, num_iters=1, num_rollout=0, trainable=trainable)
    count = float((~np.isnan(system.emissions)).sum())
    np.testing.assert_allclose(ours.log_probs[0] * count, exact.log_probs[0], rtol=1e-9)
    np.testing.assert_allclose(ours.log_probs[1] * count, exact.log_probs[1], rtol=1e-4)  # floors of the variances
    for block in ("initial", "dynamics"):
        for name, value in vars(getattr(exact.params, block)).items():
            np.testing.assert_allclose(
                getattr(getattr(ours.params, block), name), value, rtol=1e-6, atol=1.1e-5, err_msg=name
            )
    assert ours.params.dynamics.weights[0, 1] == params.dynamics.weights[0, 1]
    np.testing.assert_array_equal(ours.params.emission.cov, params.emissions.cov)


def test_rollout_is_the_path_of_the_loops(fitted):
    """The objective of the first stage at the start."""
    emission = START.emission
    total = 0.0
    for k in range(K):
        state = np.zeros(D)
        for t in range(T):
            if t:
                state = np.asarray(START.dynamics.weights) @ state + np.asarray(START.dynamics.bias)
            state = np.where(MASK[k, t], PLAN.value[k, t], state)
            total += float(emission.log_prob(COUNTS[k, t], emission.map(jnp.asarray(state))))
    np.testing.assert_allclose(fitted.rollout_log_probs[0], total / COUNTS.size, rtol=1e-10)
    assert fitted.rollout_log_probs.shape == (13,)
    assert fitted.rollout_log_probs[-1] > fitted.rollout_log_probs[0]


def test_objective_is_the_laplace_marginal(fitted):
    assert np.isfinite(fitted.log_probs).all()
    result = issm.posterior(fitted.params, COUNTS, interventions=PLAN)
    np.testing.assert_allclose(fitted.log_probs[-1], result.marginal_loglik.sum() / COUNTS.size, rtol=0.01)
    assert fitted.log_probs[-1] > fitted.log_probs[0]
    np.testing.assert_array_equal(fitted.params.emission.exposure, 3.0)  # never trained
    assert (fitted.reason, int(fitted.num_iters), bool(fitted.converged)) == (
        "stopped after the largest number of updates", 4, False,
    )  # fmt: skip


def test_many_seeds_at_once_in_float32(fitted):
    models = [issm.initialize_ssm(KEY, np.asarray(COUNTS, np.float32), D, likelihood="poisson", exposure=3.0, widths=(4,)),
              issm.initialize_ssm(jax.random.key(1), np.asarray(COUNTS, np.float32), D, likelihood="poisson", widths=(4,))]  # fmt: skip
    both = jax.jit(jax.vmap(fit))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *models))
    assert {leaf.dtype for leaf in jax.tree.leaves(both) if jnp.issubdtype(leaf.dtype, jnp.floating)} == {
        np.dtype("float32")
    }
    assert np.isfinite(both.log_probs).all()
    assert both.reason == ["stopped after the largest number of updates"] * 2


def test_logs_end_where_the_fit_ended():
    """Trimmed where their length is known, and otherwise their last entry is repeated: never NaN."""
    alone = fit(tol=1e9)
    assert (alone.reason.split(":")[0], int(alone.num_iters), alone.log_probs.shape) == ("converged", 1, (2,))
    both = jax.vmap(lambda model: issm.fit_laplace_em(
        model, COUNTS, interventions=PLAN, num_rollout=12, num_iters=4, tol=1e9
    ))(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), START))  # fmt: skip
    assert both.log_probs.shape == (2, 5)
    np.testing.assert_allclose(both.log_probs[0, :2], alone.log_probs, rtol=1e-9)
    np.testing.assert_array_equal(both.log_probs[:, 1:], both.log_probs[:, 1:2].repeat(4, axis=1))


def test_held_out_trials_stop_the_fit():
    """Nothing is learned from them: they may be anything."""
    held_out = np.array([False, False, True, False])
    other = COUNTS.at[2].set(COUNTS[2, ::-1] + 3)
    a, b = (fit(emissions=y, held_out=held_out) for y in (COUNTS, other))
    np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=1e-9)
    assert (a.held_out != b.held_out).all()
    c = fit(emissions=other, held_out=held_out, num_rollout=0, num_iters=30, patience=2)
    assert "stopped early" in c.reason
    assert int(c.num_iters) == int(c.best_iter) + 2 < 30
    assert c.log_probs.shape == c.held_out.shape == (int(c.num_iters) + 1,)
    best = np.max(c.held_out)
    assert c.held_out[int(c.best_iter)] == best
    again = issm.posterior(c.params, other[2], interventions=jax.tree.map(lambda leaf: leaf[2], PLAN))
    np.testing.assert_allclose(float(again.marginal_loglik) / (T * N), best, rtol=0.02)


def test_a_start_that_overflows_is_named():
    emission = issm.PoissonEmission(issm.LinearMap(1e3 * np.ones((N, D))), link="exp")
    wild = issm.SSM(issm.make_lgssm_params([2.0, 2.0], [0.0, 0.0], np.eye(2), [0.1, 0.1], np.ones((N, D)), np.ones(N)).initial,
                    LINEAR.dynamics, emission)  # fmt: skip
    result = fit(wild)
    assert result.reason.startswith("did not start")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    np.testing.assert_array_equal(result.params.emission.map.weights, 1e3)


def test_bar(capfd):
    fit(progress=True)
    assert "laplace EM" in capfd.readouterr().err


BAD = {
    "fractional counts": (lambda: fit(emissions=COUNTS + 0.5), "emissions"),
    "held-out indices": (lambda: fit(held_out=np.array([2])), "held_out"),
    "everything held out": (lambda: fit(held_out=np.ones(K, bool)), "held_out"),
    "patience without held-out trials": (lambda: fit(patience=3), "patience"),
    "no gradient steps": (lambda: fit(num_gradient_steps=0), "num_gradient_steps"),
    "a negative number of sweeps": (lambda: fit(num_iters=-1), "num_iters"),
    "unknown likelihood": (lambda: issm.initialize_ssm(KEY, COUNTS, D, likelihood="gamma"), "likelihood"),
    "no states": (lambda: issm.initialize_ssm(KEY, COUNTS, 0), "state_dim"),
    "coins and clamps": (
        lambda: issm.initialize_ssm(KEY, (COUNTS > 0).astype(float), D, likelihood="bernoulli", interventions=PLAN),
        "interventions",
    ),
    "inputs and clamps": (
        lambda: issm.initialize_ssm(KEY, COUNTS, D, interventions=PLAN, input_dim=1),
        "interventions",
    ),
    "a vector": (lambda: issm.initialize_ssm(KEY, COUNTS[0, 0], 2), "emissions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_what_is_wrong(name):
    assert_refused(*BAD[name])
