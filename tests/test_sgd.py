"""`fit_sgd`: maxima known in closed form or found by SciPy, batches that visit every trial once, guards and early stops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

import issm
from issm._constraints import constrain, unconstrain
from issm.fitting import descent, progress
from issm.fitting.line_search import CURVATURE, MOST_TRIALS, SUFFICIENT, Lengths
from issm.inference.methods import choose_method

SGD, ADAM = optax.sgd(1.0), optax.adam(0.05)
TRUTH = issm.make_lgssm_params(0.5, 1.0, 0.8, 0.5, [[1.0], [-0.5]], [0.3, 0.2], dynamics_bias=[0.2])
PLAN = issm.do({0: 2.0}, num_timesteps=12, state_dim=1, start=4, stop=7)


def draw(num_trials, seed=0):
    sample = lambda key: issm.lgssm_sample(key, TRUTH, 12, interventions=PLAN)[1]  # noqa: E731
    emissions = np.array(jax.vmap(sample)(jax.random.split(jax.random.key(seed), num_trials)))
    emissions[0, 2, 1] = emissions[1, 5] = np.nan
    return emissions


def by_loops(theta, emissions):
    """Minus the log density of the trials by the scalar Kalman filter; theta: weight, log Q, log R."""
    a, q, r = theta[0], np.exp(theta[1]), np.exp(theta[2:])
    c, total = np.array([1.0, -0.5]), 0.0
    for trial in emissions:
        for t, y in enumerate(trial):
            mean, var = (0.5, 1.0) if t == 0 else (a * mean + 0.2, a * a * var + q)
            if 4 <= t < 7:
                mean, var = 2.0, 0.0
            for n in np.flatnonzero(~np.isnan(y)):
                spread = c[n] ** 2 * var + r[n]
                error = y[n] - c[n] * mean
                total += (np.log(2 * np.pi * spread) + error**2 / spread) / 2
                mean, var = mean + var * c[n] * error / spread, var - (var * c[n]) ** 2 / spread
    return total


FREE = eqx.tree_at(
    lambda p: (p.dynamics.weights, p.dynamics.cov, p.emissions.cov),
    jax.tree.map(lambda _: False, TRUTH),
    (True, True, True),
)


def test_lbfgs_finds_the_maximum_that_scipy_finds():
    emissions = draw(6)
    fit = issm.fit_sgd(TRUTH, emissions, interventions=PLAN, trainable=FREE, num_epochs=60, tol=1e-10)
    best = minimize(by_loops, [0.8, np.log(0.5), np.log(0.3), np.log(0.2)], args=(emissions,), method="BFGS")
    assert fit.converged
    assert fit.reason.startswith("converged")
    np.testing.assert_allclose(fit.log_probs[fit.best_epoch], -best.fun, rtol=1e-8)
    found = [fit.params.dynamics.weights[0, 0], *np.log([fit.params.dynamics.cov[0], *fit.params.emissions.cov])]
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    for name in ("initial", "dynamics", "emissions"):  # what is frozen keeps every bit
        for field in ("mean", "bias"):
            if hasattr(getattr(TRUTH, name), field):
                np.testing.assert_array_equal(
                    getattr(getattr(fit.params, name), field), getattr(getattr(TRUTH, name), field)
                )
    np.testing.assert_array_equal(fit.params.initial.cov, TRUTH.initial.cov)


def search(function, length=1.0):
    """The lengths that a search tries until it takes one."""
    value_and_slope = jax.jit(jax.value_and_grad(function))
    zero = jnp.zeros(())
    value, slope = value_and_slope(zero)
    lengths = Lengths(value, slope, zero + length, zero, zero + jnp.inf, jnp.int32(0))
    tried, taken = [], False
    while not taken:
        tried.append(float(lengths.length))
        taken, lengths = jax.jit(Lengths.weigh)(lengths, *value_and_slope(lengths.length))
    return tried


@pytest.mark.parametrize(
    "function",
    [
        lambda t: (t - 50.0) ** 2,
        lambda t: (t - 1e-3) ** 2 + 0.1 * (t - 1e-3) ** 4,
        lambda t: jnp.where(t < 0.3, -jnp.log(0.3 - t) - 20 * t, jnp.nan),
        lambda t: -t / (1 + t**2) + 0.01 * jnp.sin(30 * t),
    ],
    ids=["far", "near", "wall", "waves"],
)
def test_a_length_meets_the_conditions_of_wolfe(function):
    taken = search(function)[-1]
    assert function(taken) <= function(0.0) + SUFFICIENT * taken * jax.grad(function)(0.0)
    assert jax.grad(function)(taken) >= CURVATURE * jax.grad(function)(0.0)


def test_a_search_that_cannot_end_well_takes_the_longest_length_that_falls():
    tried = search(lambda t: -t)  # falls for ever
    assert tried[-1] == max(tried[:-1]) == 2.0 ** (MOST_TRIALS - 1)
    tried = search(lambda t: jnp.where(t > 0, jnp.nan, -t))  # ends at once
    assert tried[-1] == 0
    assert len(tried) == MOST_TRIALS + 1


def valley(params, emissions, inputs, interventions):
    """Rosenbrock's function around the emissions."""
    x, y = params["at"] - emissions.mean(axis=(0, 1))
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def test_a_narrow_valley_for_one_start_or_many():
    emissions = np.ones((2, 3, 2))
    fit = lambda at: issm.fit_sgd({"at": at}, emissions, loss=valley, num_epochs=100, tol=1e-16)  # noqa: E731
    starts = jnp.array([[-0.2, 2.0], [3.0, -1.0]])
    fits = jax.vmap(fit)(starts)
    np.testing.assert_allclose(fits.params["at"], 2.0, atol=1e-7)  # where the gradient is below its rounding
    peer = lambda at: minimize(lambda p: float(valley({"at": p}, emissions, None, None)), at, method="L-BFGS-B").nit  # noqa: E731
    scipy = [peer(at) for at in starts]
    assert (np.asarray(fits.best_epoch) <= 2 * np.array(scipy)).all()
    np.testing.assert_allclose(fit(starts[1]).log_probs[-1], fits.log_probs[1, -1], atol=1e-12)


def test_single_precision_changes_form_where_the_parameters_ask_for_it(monkeypatch):
    """A program for each form, one after the other, does what one program of both does."""
    emissions = draw(6).astype(np.float32)
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), TRUTH)
    start = eqx.tree_at(lambda p: p.emissions.cov, single, jnp.full(2, 3e-4, jnp.float32))
    fit = lambda params: issm.fit_sgd(  # noqa: E731
        params, emissions, interventions=PLAN, trainable=FREE, num_epochs=15, held_out=[5], patience=15
    )
    chosen = []

    def choose(*args):
        chosen.append(choose_method(*args))
        return chosen[-1]

    monkeypatch.setattr(descent, "choose_method", choose)
    result = fit(start)
    assert chosen == ["sqrt", "sequential"]
    both = jax.jit(lambda params: fit(params).log_probs)(start)
    np.testing.assert_allclose(result.log_probs[:5], both[:5], rtol=1e-4)
    assert result.log_probs[-1] > result.log_probs[0] + 1000
    monkeypatch.setattr(descent, "choose_method", lambda *_: "sqrt")
    against_the_verdict = fit(start)  # ends all the same
    np.testing.assert_allclose(against_the_verdict.log_probs[:5], both[:5], rtol=1e-4)


def test_batches_of_the_likelihood():
    """They climb, and those of the last epoch, which updates nothing, add up to the log-likelihood."""
    emissions = draw(6)
    start = eqx.tree_at(lambda p: p.dynamics.weights, TRUTH, jnp.array([[0.1]]))
    fit = issm.fit_sgd(
        start, emissions, interventions=PLAN, optimizer=ADAM, batch_size=3, num_epochs=20, key=jax.random.key(0)
    )
    assert fit.best_epoch == fit.num_epochs == 20
    assert fit.reason == "stopped after num_epochs epochs"
    np.testing.assert_allclose(
        fit.log_probs[-1], issm.marginal_log_prob(fit.params, emissions, interventions=PLAN).sum(), rtol=1e-9
    )
    assert fit.log_probs[-1] > fit.log_probs[0] + 5


def visits(params, emissions, inputs, interventions):
    """Its gradient counts, trial by trial, and writes down when: plain steps of size one leave the number of visits."""
    return -(emissions[:, 0] @ params["visits"]).sum()


@pytest.mark.parametrize("batch_size", [3, None])
def test_every_trial_is_visited_once_an_epoch(batch_size):
    identity = np.eye(7)[:, None, :]
    options = {"loss": visits, "optimizer": SGD, "batch_size": batch_size, "key": jax.random.key(1), "tol": 0.0}
    start = {"visits": jnp.zeros(7)}
    for num_epochs in (1, 5):
        fit = issm.fit_sgd(start, identity, num_epochs=num_epochs, **options)
        np.testing.assert_array_equal(fit.params["visits"], num_epochs)
    fit = issm.fit_sgd(start, identity, num_epochs=3, held_out=[2, 5], **options, patience=10)
    assert fit.held_out_log_probs.shape == (4,)
    np.testing.assert_array_equal(fit.held_out_log_probs, 0.0)
    assert fit.best_epoch == 0  # nothing got better for the held-out trials
    np.testing.assert_array_equal(fit.params["visits"], 0.0)


def last_seen(params, emissions, inputs, interventions):
    """With steps of size one, `order` becomes the number of trials seen until then."""
    seen = jax.lax.stop_gradient(params["count"] + 1 - params["order"])
    return -(params["order"] * emissions[0, 0] * seen).sum() - params["count"]


def test_the_order_is_drawn_anew_every_epoch():
    options = {"loss": last_seen, "optimizer": SGD, "batch_size": 1, "key": jax.random.key(1)}
    start = {"order": jnp.zeros(7), "count": jnp.zeros(())}
    orders = [
        np.asarray(issm.fit_sgd(start, np.eye(7)[:, None, :], num_epochs=n, **options).params["order"]) for n in (1, 2)
    ]
    np.testing.assert_array_equal(np.sort(orders[0]), np.arange(1, 8))
    np.testing.assert_array_equal(np.sort(orders[1]), np.arange(8, 15))
    assert (orders[1] - 7 != orders[0]).any()


def gaussian(params, emissions, inputs, interventions):
    """Independent normal vectors; `shape` is a leaf that is no array."""
    residuals = params["shape"](emissions - params["mean"][None])
    log_det = jnp.linalg.slogdet(params["cov"])[1]
    return (log_det + (residuals * jnp.linalg.solve(params["cov"], residuals.T).T).sum(axis=1).mean()) / 2


def test_any_pytree_with_a_covariance_reaches_the_sample_moments():
    emissions = np.random.default_rng(0).normal(size=(40, 3)) @ np.array(
        [[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.3, 0.5]]
    )
    start = {"mean": jnp.zeros(3), "cov": jnp.eye(3), "shape": jnp.asarray, "name": "normal"}
    everything = jax.tree.map(lambda _: True, start)
    fit = issm.fit_sgd(start, emissions, loss=gaussian, trainable=everything, num_epochs=100, tol=1e-12)
    assert fit.converged
    np.testing.assert_allclose(fit.params["mean"], emissions.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(fit.params["cov"], np.cov(emissions.T, bias=True), atol=1e-5)
    assert fit.params["name"] == "normal"


def test_coordinates_and_back():
    params = issm.make_lgssm_params([0.0, 1.0], [[1.0, 0.3], [0.3, 2.0]], np.eye(2), [0.1, 0.2], np.eye(2), [0.3, 0.4])
    there = unconstrain(params)
    np.testing.assert_allclose(there.dynamics.cov, np.log([0.1, 0.2]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), constrain(there), params)


def squares(params, emissions, inputs, interventions):
    """Its curvature is small, so that a step of size one goes a tenth of the way."""
    return 0.05 * ((emissions - params["mean"]) ** 2).mean()


def test_early_stop_returns_the_best_for_the_held_out_trials():
    """The mean walks from zero to one past the held-out trials at a half."""
    emissions = np.ones((6, 2, 1))
    emissions[[1, 4]] = 0.5
    fit = issm.fit_sgd(
        {"mean": jnp.zeros(())}, emissions, loss=squares, optimizer=SGD, held_out=[1, 4], num_epochs=50, patience=3
    )
    path = 1 - 0.9 ** np.arange(50)
    best = np.argmin((path - 0.5) ** 2)
    assert fit.best_epoch == best
    assert fit.num_epochs == best + 3
    assert fit.converged
    np.testing.assert_allclose(fit.params["mean"], path[best], rtol=1e-12)
    np.testing.assert_allclose(fit.held_out_log_probs, -0.05 * (path[: best + 4] - 0.5) ** 2, atol=1e-15)


def cliff(params, emissions, inputs, interventions):
    """Finite up to 0.5, then its value is not; the other parameter's derivative is not, where it is zero."""
    walk = squares(params, emissions, inputs, interventions) + jnp.sqrt(params["root"])
    return jnp.where(params["mean"] > 0.5, jnp.nan, 1.0) * walk


def test_what_is_not_finite_is_named_and_never_returned():
    emissions = np.ones((3, 2, 1))
    only_mean = {"mean": True, "root": False}
    options = {"loss": cliff, "optimizer": SGD, "num_epochs": 50}
    start = {"mean": jnp.zeros(()), "root": jnp.ones(())}
    fit = issm.fit_sgd(start, emissions, trainable=only_mean, **options)
    assert fit.reason.startswith("stopped because the loss after an update was not finite")
    assert not fit.converged
    np.testing.assert_allclose(fit.params["mean"], 1 - 0.9**6, rtol=1e-12)
    fit = issm.fit_sgd({"mean": jnp.ones(()), "root": jnp.ones(())}, emissions, trainable=only_mean, **options)
    assert fit.reason.startswith("did not start")
    assert float(fit.params["mean"]) == 1.0
    fit = issm.fit_sgd({"mean": jnp.zeros(()), "root": jnp.zeros(())}, emissions, **options)
    assert fit.reason.startswith("stopped because a gradient was not finite")
    assert "root" in fit.reason
    assert float(fit.params["root"]) == 0.0


def test_a_second_fit_is_not_compiled():
    count = []

    def counted(params, emissions, inputs, interventions):
        count.append(1)
        return squares(params, emissions, inputs, interventions)

    fits = [
        issm.fit_sgd({"mean": jnp.zeros(())}, k * np.ones((4, 2, 1)), loss=counted, num_epochs=5, tol=tol)
        for k, tol in ((1.0, 1e-6), (2.0, 1e-7))
    ]
    traced = len(count)
    fits.append(issm.fit_sgd({"mean": jnp.ones(())}, 3 * np.ones((4, 2, 1)), loss=counted, num_epochs=5))
    assert len(count) == traced
    np.testing.assert_allclose([fit.params["mean"] for fit in fits], [1, 2, 3], rtol=1e-6)


def test_an_interrupt_returns_the_best_so_far(monkeypatch, capsys):
    options = {"loss": squares, "optimizer": SGD, "num_epochs": 30, "tol": 0.0, "progress": True}
    start, emissions = {"mean": jnp.zeros(())}, np.ones((3, 2, 1))
    issm.fit_sgd(start, emissions, **options)
    assert "30/30" in capsys.readouterr().err
    draws = []

    def interrupt(self, done, objective):
        draws.append(done)
        if len(draws) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.ProgressBar, "draw", interrupt)
    fit = issm.fit_sgd(start, emissions, **options)
    assert fit.reason.startswith("interrupted")
    assert fit.num_epochs == draws[-1]
    np.testing.assert_allclose(fit.params["mean"], 1 - 0.9**fit.best_epoch, rtol=1e-12)


def test_bad_input():
    emissions = draw(3)
    call = lambda **options: issm.fit_sgd(TRUTH, emissions, **options)  # noqa: E731
    for options, message in (
        ({"batch_size": 2}, "key: got None"),
        ({"batch_size": 0, "key": jax.random.key(0)}, "batch_size: got 0"),
        ({"num_epochs": 0}, "num_epochs: got 0"),
        ({"held_out": [0, 1, 2]}, "held_out: got .* expected indices of some, not all"),
        ({"held_out": [3]}, "held_out: got"),
        ({"loss": 3.0}, "loss: got a float"),
        ({"tol": -1.0}, "tol: got -1.0"),
        ({"interventions": issm.no_intervention(5, 1)}, "interventions: got shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**options)
    with pytest.raises(ValueError, match=r"params.dynamics.cov: got a smallest entry of 0"):
        issm.fit_sgd(eqx.tree_at(lambda p: p.dynamics.cov, TRUTH, jnp.zeros(1)), emissions)
    with pytest.raises(ValueError, match="loss: got None for parameters of type dict"):
        issm.fit_sgd({"mean": jnp.zeros(())}, emissions)
    with pytest.raises(ValueError, match=r"loss: got a function whose value has shape \(3, 12, 2\)"):
        issm.fit_sgd({"mean": jnp.zeros(())}, emissions, loss=lambda p, y, u, plan: y - p["mean"])
    with pytest.raises(ValueError, match="params: got no floating-point"):
        issm.fit_sgd({"mean": 1}, emissions, loss=squares)
