"""Residual diagnostics against statsmodels on one series, against loops on trials with gaps, and uniform under the truth."""

import equinox as eqx
import jax
import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.diagnostic import acorr_ljungbox
from statsmodels.stats.stattools import jarque_bera
from statsmodels.tsa.statespace.structural import UnobservedComponents
from statsmodels.tsa.stattools import breakvar_heteroskedasticity_test

import issm
from helpers import joint_moments, random_system


def test_one_series_against_statsmodels():
    """A random walk seen through noise: innovations, statistics and p-values, with and without gaps."""
    rng = np.random.default_rng(0)
    series = np.cumsum(rng.normal(size=90)) + rng.standard_t(4, size=90)
    series[[20, 21, 50]] = np.nan
    peer = UnobservedComponents(series, "llevel")
    peer.initialize_known(np.zeros(1), np.full((1, 1), 4.0))
    result = peer.smooth([1.5, 0.8])  # irregular, level
    ours = issm.residual_diagnostics(issm.make_lgssm_params(0.0, 4.0, 1.0, 0.8, 1.0, 1.5), series[:, None])
    expected = np.where(np.isnan(series), np.nan, result.filter_results.standardized_forecasts_error[0])
    np.testing.assert_allclose(ours.innovations[:, 0], expected, rtol=1e-8, atol=1e-9)
    values = expected[~np.isnan(expected)]
    np.testing.assert_allclose(
        [ours.normality[0], ours.normality_p[0], ours.skewness[0], ours.kurtosis[0]], jarque_bera(values), rtol=1e-8
    )
    ratio, p = breakvar_heteroskedasticity_test(expected)
    complete = np.isnan(expected[:30]).sum() == np.isnan(expected[-30:]).sum()
    assert not complete  # statsmodels compares sums, which are not comparable with gaps on one side
    means = np.nanmean(expected[-30:] ** 2) / np.nanmean(expected[:30] ** 2)
    np.testing.assert_allclose(ours.heteroskedasticity[0], means, rtol=1e-9)
    whole = issm.residual_diagnostics(
        issm.make_lgssm_params(0.0, 4.0, 1.0, 0.8, 1.0, 1.5), series[51:, None], num_lags=7
    )
    values = np.asarray(whole.innovations[:, 0])
    box = acorr_ljungbox(values, lags=[7])
    np.testing.assert_allclose([whole.whiteness[0], whole.whiteness_p[0]], box.to_numpy()[0], rtol=1e-8)
    ratio, p = breakvar_heteroskedasticity_test(values)
    np.testing.assert_allclose([whole.heteroskedasticity[0], whole.heteroskedasticity_p[0]], [ratio, p], rtol=1e-8)
    assert "normality: rejected" in ours.summary(level=0.9999)


SYSTEM = random_system(
    5,
    num_trials=3,
    num_timesteps=5,
    emission_dim=3,
    input_dim=1,
    clamps="mixed",
    missing=0.2,
    time_varying=("emissions_weights",),
)


@pytest.mark.parametrize("decorrelate", [False, True])
def test_innovations_against_the_joint_gaussian(decorrelate):
    """Clamps, inputs, gaps, loadings that vary: each entry given the steps before, and the emissions before it if asked."""
    args, kwargs = SYSTEM.data
    found = issm.residual_diagnostics(SYSTEM.params, *args, **kwargs, decorrelate=decorrelate).innovations
    for k in range(3):
        y = SYSTEM.trial(k)[0].ravel()
        mean, cov = joint_moments(SYSTEM, k)
        mean, cov = mean[10:], cov[10:, 10:]
        seen = ~np.isnan(y)
        for i in range(15):
            past = seen & (np.arange(15) < (i if decorrelate else i // 3 * 3))
            weights = np.linalg.solve(cov[np.ix_(past, past)], cov[past, i])
            error = y[i] - mean[i] - weights @ (y - mean)[past]
            expected = error / np.sqrt(cov[i, i] - weights @ cov[past, i])
            np.testing.assert_allclose(found[k].ravel()[i], expected, rtol=1e-8)


def test_statistics_of_trials_with_gaps_against_loops():
    args, kwargs = SYSTEM.data
    found = issm.residual_diagnostics(SYSTEM.params, *args, **kwargs, num_lags=2)
    for n in range(3):
        z = np.asarray(found.innovations)[:, :, n]
        values = z[~np.isnan(z)]
        size, mean = len(values), values.mean()
        statistic = 0.0
        for lag in (1, 2):
            terms = [
                (z[k, t] - mean) * (z[k, t - lag] - mean)
                for k in range(3)
                for t in range(lag, 5)
                if not np.isnan(z[k, t] * z[k, t - lag])
            ]
            r = sum(terms) / ((values - mean) ** 2).sum()
            np.testing.assert_allclose(found.autocorrelation[lag - 1, n], r, rtol=1e-10)
            statistic += (size + 2) / size * size**2 / len(terms) * r**2
        np.testing.assert_allclose(found.whiteness[n], statistic, rtol=1e-10)
        np.testing.assert_allclose(found.whiteness_p[n], stats.chi2.sf(statistic, 2), rtol=1e-8)
        last, first = (part[~np.isnan(part)] for part in (z[:, 3:], z[:, :2]))
        ratio = (last**2).mean() / (first**2).mean()
        p = 2 * min(stats.f.cdf(ratio, len(last), len(first)), stats.f.sf(ratio, len(last), len(first)))
        np.testing.assert_allclose([found.heteroskedasticity[n], found.heteroskedasticity_p[n]], [ratio, p], rtol=1e-8)
        assert found.num_observed[n] == size


def test_p_values_are_uniform_under_the_truth_and_small_under_another_model():
    """Pooled over 60 data sets of 4 clamped trials and 3 emissions, made independent of each other by `decorrelate`. The trials are
    long because the statistic of Jarque and Bera is chi-square only slowly."""
    system = random_system(2, num_trials=4, num_timesteps=400, emission_dim=3, clamps="mixed")
    plan = system.interventions
    params = system.params
    forgetful = eqx.tree_at(lambda p: p.dynamics.weights, params, 0.3 * params.dynamics.weights)

    @jax.jit
    def p_values(key):
        _, emissions = issm.lgssm_sample(key, params, 400, interventions=plan)
        found = issm.residual_diagnostics(params, emissions, interventions=plan, decorrelate=True)
        blind = issm.residual_diagnostics(forgetful, emissions, interventions=plan)
        tests = (found.whiteness_p, found.normality_p, found.heteroskedasticity_p)
        return tests, blind.whiteness_p

    tests, blind = jax.lax.map(p_values, jax.random.split(jax.random.key(0), 60))
    for name, p in zip(("whiteness", "normality", "heteroskedasticity"), tests, strict=True):
        assert stats.kstest(np.ravel(p), "uniform").pvalue > 0.01, name
    assert np.median(np.min(blind, axis=1)) < 1e-4  # of the emission that shows it most


def test_emissions_that_cannot_be_tested():
    emissions = np.stack([np.full(8, np.nan), np.sin(np.arange(8.0))], axis=1)
    params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0], [1.0]], [0.5, 0.5])
    found = issm.residual_diagnostics(params, emissions)
    assert np.isnan(found.whiteness_p[0])
    assert np.isfinite(found.whiteness_p[1])
    assert "over 1 emissions" in found.summary()


@pytest.mark.parametrize(
    ("emissions", "num_lags", "message"),
    [
        (np.zeros((1, 3)), None, "emissions: got one step"),
        (np.zeros((4, 3)), 4, "num_lags: got 4; expected an integer from 1 to 3"),
        (np.zeros((4, 3)), 0, "num_lags: got 0"),
    ],
)
def test_bad_calls(emissions, num_lags, message):
    params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], np.ones((3, 1)), np.ones(3))
    with pytest.raises(ValueError, match=message):
        issm.residual_diagnostics(params, emissions, num_lags=num_lags)
