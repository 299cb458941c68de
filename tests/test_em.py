"""EM: exact M steps, a likelihood that never goes down, frozen entries, guards."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

import helpers
import issm
from issm.fitting.mask_patterns import find_patterns
from issm.fitting.regression import PatternStatistics, regress_patterns
from issm.fitting.result import Code
from issm.fitting.statistics import expected_statistics
from issm.inference.recursions import small_moments
from issm.models.emission_sums import sum_emissions
from issm.models.trials import as_trials

FIELDS = {
    "initial": ("mean", "cov"),
    "dynamics": ("weights", "bias", "input_weights", "cov"),
    "emissions": ("weights", "bias", "input_weights", "cov"),
}

DIAGONAL = dict(initial_cov="diagonal", dynamics_cov="diagonal", emissions_cov="diagonal")
OPTIONS = {
    "rows": dict(
        num_trials=3,
        input_dim=1,
        clamps="mixed",
        shared_interventions=False,
        missing=0.2,
        missing_steps=(5,),
        **DIAGONAL,
    ),
    "correlated": dict(num_trials=3, input_dim=1, clamps="mixed", shared_interventions=False),
    "correlated-missing": dict(num_trials=2, clamps="perfect", shared_interventions=False, missing=0.3),
    "one-sequence": dict(state_dim=3, clamps="noisy", dynamics_cov="diagonal"),
    "wide": dict(
        num_timesteps=8, state_dim=3, emission_dim=1, dynamics_cov="singular", initial_cov="zero", clamps="zero"
    ),
    "time-varying": dict(
        input_dim=1,
        clamps="mixed",
        missing=0.2,
        emissions_cov="diagonal",
        time_varying=("dynamics_weights", "emissions_bias"),
    ),
}
OPTIONS["rows-priors"] = OPTIONS["rows"]
OPTIONS["correlated-priors"] = OPTIONS["correlated"]
WITH_PRIORS = ("rows-priors", "correlated-priors")
PRIORS = issm.Priors(
    initial=issm.RegressionPrior(mean=0.2, precision=0.5, degrees=4.0, scale=0.3),
    dynamics=issm.RegressionPrior(mean=0.1, precision=[2.0, 1.0, 3.0, 0.5], degrees=5.0, scale=[0.4, 0.2]),
    emissions=issm.RegressionPrior(precision=1.5, degrees=6.0, scale=0.3),
)
NUM_ITERS = 25
ONE_UPDATE = 1e9  # a tolerance that any second update falls below


def log_prior(params):
    """Log density of `PRIORS`, by scipy's distributions."""
    total = 0.0
    for block in FIELDS:
        prior, values = getattr(PRIORS, block), jax.tree.map(np.asarray, getattr(params, block))
        columns = (
            values.mean[:, None]
            if block == "initial"
            else np.column_stack([values.weights, values.input_weights, values.bias])
        )
        rows, cov = len(columns), values.cov
        precision = np.broadcast_to(prior.precision, columns.shape[1])
        scale, degrees = np.broadcast_to(prior.scale, rows), float(prior.degrees)
        mean = np.broadcast_to(prior.mean, columns.shape)
        full = np.diag(cov) if cov.ndim == 1 else cov
        total += scipy.stats.matrix_normal.logpdf(columns, mean, full, np.diag(1 / precision))
        if cov.ndim == 1:
            total += scipy.stats.invgamma.logpdf(cov, degrees / 2, scale=scale / 2).sum()
        else:
            total += scipy.stats.invwishart.logpdf(cov, degrees, np.diag(scale))
    return total


def expected_log_density(name, params, system):
    """What the M step raises: the expected log joint density, and the log density of the priors."""
    return expected_log_joint(params, system) + (log_prior(params) if name in WITH_PRIORS else 0.0)


def expected_log_joint(params, system):
    """Expected complete-data log density given the emissions, under the states' posterior at `system.params`, by loops."""
    p = jax.tree.map(np.asarray, params)
    full = lambda cov: np.diag(cov) if cov.ndim == 1 else cov  # noqa: E731
    at = lambda field, t: field.values[t] if isinstance(field, issm.TimeVarying) else field  # noqa: E731
    total = 0.0
    for k, posterior in enumerate(_posteriors(system)):
        emissions, inputs, mask, _, _ = system.trial(k)
        last = max((t for t in range(len(emissions)) if not np.isnan(emissions[t]).all()), default=-1)
        for t in range(last + 1):
            free, seen = ~mask[t], ~np.isnan(emissions[t])
            x, cov = posterior.means[t], posterior.covs[t, t]
            if t == 0:
                total += _gaussian(x - p.initial.mean, cov, full(p.initial.cov), free)
            else:
                a, b = at(p.dynamics.weights, t), at(p.dynamics.bias, t)
                residual = x - a @ posterior.means[t - 1] - at(p.dynamics.input_weights, t) @ inputs[t] - b
                step = np.concatenate([-a, np.eye(len(x))], axis=1)
                spread = step @ posterior.pair(t) @ step.T
                total += _gaussian(residual, spread, full(at(p.dynamics.cov, t)), free)
            c = at(p.emissions.weights, t)
            residual = emissions[t] - c @ x - at(p.emissions.input_weights, t) @ inputs[t] - at(p.emissions.bias, t)
            total += _gaussian(residual, c @ cov @ c.T, full(at(p.emissions.cov, t)), seen)
    return total


class _Posterior:
    def __init__(self, reference):
        steps, dim = reference.smoothed_means.shape
        self.means = reference.smoothed_means
        self.covs = reference.joint_smoothed_covariance.reshape(steps, dim, steps, dim).swapaxes(1, 2)

    def pair(self, t):
        """Covariance of (x_{t-1}, x_t)."""
        return np.block([[self.covs[t - 1, t - 1], self.covs[t - 1, t]], [self.covs[t, t - 1], self.covs[t, t]]])


_CACHE = {}


def _posteriors(system):
    if id(system) not in _CACHE:
        trials = range(system.num_trials or 1)
        _CACHE[id(system)] = (system, [_Posterior(helpers.reference(system, k)) for k in trials])
    return _CACHE[id(system)][1]


def _gaussian(mean, spread, cov, kept):
    if not kept.any():
        return 0.0
    mean, spread, cov = mean[kept], spread[np.ix_(kept, kept)], cov[np.ix_(kept, kept)]
    _, log_det = np.linalg.slogdet(2 * np.pi * cov)
    return -(log_det + mean @ np.linalg.solve(cov, mean) + np.trace(np.linalg.solve(cov, spread))) / 2


def replace(params, block, name, value):
    return eqx.tree_at(lambda p: getattr(getattr(p, block), name), params, value)


def slopes(function, value):
    """Central differences of a function of one array, in units of the array's scale."""
    value = np.asarray(value)
    size = 1e-4 * max(1.0, np.abs(value).max())
    flat = np.zeros(value.size)
    for i in range(value.size):
        step = np.zeros(value.size)
        step[i] = size
        step = step.reshape(value.shape)
        flat[i] = (function(value + step) - function(value - step)) / (2 * size)
    return flat


@pytest.fixture(scope="module")
def fits():
    """System, one update, and a function that makes all updates, for every option; compiled once each."""
    done = {}

    def fit(name):
        if name not in done:
            system = helpers.random_system(3, **OPTIONS[name])
            args, kwargs = system.data
            priors = PRIORS if name in WITH_PRIORS else None
            fit = lambda tol: issm.fit_em(system.params, *args, **kwargs, priors=priors, num_iters=NUM_ITERS, tol=tol)  # noqa: E731
            done[name] = (system, fit(ONE_UPDATE), lambda: fit(0.0))
        return done[name]

    return fit


@pytest.mark.parametrize("name", ["rows", "correlated", "time-varying", "rows-priors", "correlated-priors"])
def test_coefficients_maximise_given_the_covariances(fits, name):
    system, one, _ = fits(name)
    start = system.params
    for block, fields in FIELDS.items():
        updated = one.params
        updated = replace(updated, block, "cov", getattr(start, block).cov)
        before = expected_log_joint(start, system)
        for field in fields[:-1]:
            value = getattr(getattr(updated, block), field)
            if isinstance(value, issm.TimeVarying) or value.size == 0:
                continue
            objective = lambda v: expected_log_density(  # noqa: E731
                name,
                replace(updated, block, field, jnp.asarray(v)),  # noqa: B023
                system,
            )
            assert np.abs(slopes(objective, value)).max() < 1e-5 * max(1.0, abs(before)), (block, field)


@pytest.mark.parametrize("name", ["rows", "rows-priors"])
def test_variances_maximise_given_the_coefficients(fits, name):
    system, one, _ = fits(name)
    for block in FIELDS:
        value = np.asarray(getattr(one.params, block).cov)
        for i in range(len(value)):

            def objective(log_variance, i=i, block=block, value=value):
                changed = value.copy()
                changed[i] = np.exp(log_variance)
                return -expected_log_density(name, replace(one.params, block, "cov", jnp.asarray(changed)), system)

            if abs(objective(np.log(value[i]) + 1) - objective(np.log(value[i]))) < 1e-9:  # clamped in every trial
                assert value[i] == getattr(system.params, block).cov[i]
                continue
            best = scipy.optimize.minimize_scalar(objective, (np.log(value[i]) - 1, np.log(value[i]) + 1), tol=1e-10)
            np.testing.assert_allclose(np.exp(best.x), value[i], rtol=1e-4)


@pytest.mark.parametrize("name", ["correlated", "correlated-priors"])
def test_complete_correlated_covariances_maximise(fits, name):
    system, one, _ = fits(name)
    objective = lambda v: expected_log_density(name, replace(one.params, "emissions", "cov", jnp.asarray(v)), system)  # noqa: E731
    value = np.asarray(one.params.emissions.cov)
    best, rng = objective(value), np.random.default_rng(0)
    for _ in range(30):
        direction = rng.normal(size=value.shape)
        step = 1e-3 * value @ (direction + direction.T) @ value
        assert objective(value + step) <= best + 1e-9 * abs(best)
        assert objective(value - step) <= best + 1e-9 * abs(best)


@pytest.mark.parametrize("name", WITH_PRIORS)
def test_log_priors_are_their_density(fits, name):
    system, one, _ = fits(name)
    expected = log_prior(one.params) - log_prior(system.params)
    np.testing.assert_allclose(one.log_priors[1] - one.log_priors[0], expected, rtol=1e-9)


def test_frozen_entries_under_differing_masks():
    """The rest maximises given them: full noise, three patterns of clamps, about half of the entries frozen."""
    rng = np.random.default_rng(0)
    free = np.array([[True, True, True], [True, False, True], [False, True, True]])
    trainable = rng.random((3, 4)) < 0.5
    samples = [(rng.normal(size=(30, 4)), rng.normal(size=(30, 3)) @ rng.normal(size=(3, 3))) for _ in free]
    factor = rng.normal(size=(3, 3))
    cov = factor @ factor.T + 0.1 * np.eye(3)
    stats = PatternStatistics(
        jnp.asarray(free),
        jnp.stack([z.T @ z for z, _ in samples]),
        jnp.stack([e.T @ z for z, e in samples]),
        jnp.stack([e.T @ e for _, e in samples]),
        jnp.full(3, 30.0),
        complete=False,
    )
    start = rng.normal(size=(3, 4))
    new, _ = regress_patterns(stats, jnp.asarray(start), jnp.asarray(cov), trainable=jnp.asarray(trainable))

    def objective(entries):
        change = np.zeros((3, 4))
        change[trainable] = entries
        return sum(
            _gaussian((e - z @ change.T)[step], np.zeros((3, 3)), cov, o)
            for (z, e), o in zip(samples, free, strict=True)
            for step in range(30)
        )

    np.testing.assert_array_equal(np.asarray(new)[~trainable], start[~trainable])
    assert np.abs(slopes(objective, (np.asarray(new) - start)[trainable])).max() < 1e-6 * abs(objective(0.0))


def test_covariance_step_under_differing_masks_raises_the_expectation(fits):
    system, one, _ = fits("correlated")
    for block in ("initial", "dynamics"):
        old = replace(one.params, block, "cov", getattr(system.params, block).cov)
        assert expected_log_joint(one.params, system) >= expected_log_joint(old, system) - 1e-9


@pytest.mark.parametrize("cov", ["diagonal", "full"])
def test_sums_of_the_data_serve_as_well_as_residuals(cov):
    system = helpers.random_system(2, num_trials=2, input_dim=1, emission_dim=5, emissions_cov=cov)
    statistics = jax.jit(expected_statistics)
    log_likelihood = jax.jit(lambda params, trials: small_moments(params, trials).logliks.sum())
    arguments, keywords = system.data
    for noise in (1.0, 1e-9):  # sums, and a noise that differences of sums would lose
        params = replace(system.params, "emissions", "cov", noise * system.params.emissions.cov)
        states = np.random.default_rng(0).normal(size=(*system.emissions.shape[:2], 2))
        block = jax.tree.map(np.asarray, params.emissions)
        exact = states @ block.weights.T + np.asarray(arguments[1]) @ block.input_weights.T + block.bias
        emissions = exact + noise**0.5 * np.random.default_rng(1).normal(size=exact.shape)
        trials = as_trials(params, emissions, arguments[1], keywords["interventions"])
        sums = sum_emissions(params, trials.emissions, trials.plan.inputs)
        with_sums = eqx.tree_at(lambda t: t.sums, trials, sums, is_leaf=lambda x: x is None)
        assert helpers.relative_error(log_likelihood(params, with_sums), log_likelihood(params, trials)) < 1e-9
        patterns = find_patterns(params, trials)
        actual, expected = statistics(params, with_sums, patterns), statistics(params, trials, patterns)
        for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert helpers.relative_error(left.astype(float), right.astype(float)) < 1e-9


@pytest.mark.parametrize("name", list(OPTIONS))
def test_never_goes_down(fits, name):
    system, one, fit = fits(name)
    args, kwargs = system.data
    result = fit()
    assert Code(int(result.code)) in (Code.MAX_ITERS, Code.CONVERGED), result.reason
    assert (np.diff(result.log_probs + result.log_priors) >= 0).all()
    assert len(result.log_probs) == result.num_iters + 1
    at_start = issm.marginal_log_prob(system.params, *args, **kwargs).sum()
    at_end = issm.marginal_log_prob(result.params, *args, **kwargs).sum()
    np.testing.assert_allclose(result.log_probs[0], at_start, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(result.log_probs[1], one.log_probs[1], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(result.log_probs[-1], at_end, rtol=1e-7, atol=1e-7)


def test_traced_masks_give_the_same_fit(fits):
    system, one, _ = fits("correlated")
    args, kwargs = system.data
    fit = jax.jit(lambda y, plan: issm.fit_em(system.params, y, args[1], interventions=plan, num_iters=1, tol=0.0))
    traced = fit(args[0], kwargs["interventions"])
    for a, b in zip(jax.tree.leaves(traced.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
