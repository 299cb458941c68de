"""Whether the residuals of a model are what it says they are: standard normal, independent in time, of constant variance."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
from jax.scipy.special import betainc, gammaincc
from jaxtyping import Array, Float, Int

from issm._check import fail
from issm._compile import jit_quickly
from issm._linalg import safe_sqrt
from issm.inference.kalman import lgssm_filter
from issm.interventions import Intervention
from issm.models.fields import as_matrix, over_time
from issm.models.lgssm import ParamsLGSSM
from issm.models.sampling import emission_means
from issm.models.trials import Trials, as_trials

MOST_LAGS = 10


class ResidualDiagnostics(eqx.Module):
    r"""Standardised innovations of each emission and tests of what they should be; p-values are small where the model fails.

    Attributes:
        innovations: Standardised one-step prediction errors, with the shape of the emissions; NaN where an entry is missing.
        num_observed: Number of them for each emission, `(emission_dim,)`.
        mean: Their mean, which should be 0, `(emission_dim,)`.
        sd: Their standard deviation, which should be 1.
        autocorrelation: At lags 1, 2, ..., `(num_lags, emission_dim)`, which should be 0.
        autocorrelation_sd: Standard error of each where there is none, same shape.
        whiteness: Statistic of Ljung and Box, `(emission_dim,)`.
        whiteness_p: Its p-value (chi-square with num_lags degrees of freedom).
        skewness: Should be 0.
        kurtosis: Should be 3.
        normality: Statistic of Jarque and Bera.
        normality_p: Its p-value (chi-square with 2 degrees of freedom).
        heteroskedasticity: Mean square in the last third of the steps over that in the first, which should be 1.
        heteroskedasticity_p: Its two-sided p-value (F distribution).

    References:
        Durbin & Koopman (2012), sec. 2.12 and 7.5; Ljung & Box (1978); Jarque & Bera (1980).

    Examples:
        >>> import jax, issm
        >>> params = issm.make_lgssm_params(0.0, 1.0, 0.9, 0.1, 1.0, 0.5)
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), params, 100)
        >>> print(issm.residual_diagnostics(params, emissions).summary())
        emission  observed   mean     sd  whiteness p  normality p  heteroskedasticity p
               0       100 ...
    """

    innovations: Float[Array, "*trials num_timesteps emission_dim"]
    num_observed: Int[Array, " emission_dim"]
    mean: Float[Array, " emission_dim"]
    sd: Float[Array, " emission_dim"]
    autocorrelation: Float[Array, "num_lags emission_dim"]
    autocorrelation_sd: Float[Array, "num_lags emission_dim"]
    whiteness: Float[Array, " emission_dim"]
    whiteness_p: Float[Array, " emission_dim"]
    skewness: Float[Array, " emission_dim"]
    kurtosis: Float[Array, " emission_dim"]
    normality: Float[Array, " emission_dim"]
    normality_p: Float[Array, " emission_dim"]
    heteroskedasticity: Float[Array, " emission_dim"]
    heteroskedasticity_p: Float[Array, " emission_dim"]

    def summary(self, level: float = 0.01) -> str:
        """A table with a line for each emission, and which tests reject at `level` (Bonferroni over emissions)."""
        lines = ["emission  observed   mean     sd  whiteness p  normality p  heteroskedasticity p"]
        columns = (self.num_observed, self.mean, self.sd, self.whiteness_p, self.normality_p, self.heteroskedasticity_p)
        for n, row in enumerate(zip(*(np.asarray(column) for column in columns), strict=True)):
            lines.append("{:8d}  {:8d} {:6.3f} {:6.3f}  {:11.3g}  {:11.3g}  {:20.3g}".format(n, *row))
        for name in ("whiteness", "normality", "heteroskedasticity"):
            p = np.asarray(getattr(self, f"{name}_p"))
            tested = int(np.isfinite(p).sum())
            rejected = np.flatnonzero(p < level / max(tested, 1))
            where = f"rejected for emission {', '.join(map(str, rejected))}" if len(rejected) else "not rejected"
            lines.append(
                f"{name}: {where} (level {level:g} over {tested} emissions)" if tested else f"{name}: not tested"
            )
        return "\n".join(lines)


def residual_diagnostics(
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    num_lags: int | None = None,
    decorrelate: bool = False,
) -> ResidualDiagnostics:
    r"""Test whether the standardised innovations $e_{t,n} = (y_{t,n} - E[y_{t,n} \mid y_{0:t-1}]) / \mathrm{sd}$ are white noise.

    For each emission, over all trials and observed entries, with n of them, $p_k$ pairs at lag k and $r_k$ their
    autocorrelation (less their mean):

    $$Q = \frac{n + 2}{n} \sum_{k=1}^{h} \frac{n^2}{p_k} r_k^2, \qquad JB = \frac{n}{6} \left(s^2 + \frac{(\kappa - 3)^2}{4}\right),
    \qquad H = \frac{\overline{e^2}\ \text{in the last third of the steps}}{\overline{e^2}\ \text{in the first third}}$$

    For one complete trial Q is Ljung and Box's ($p_k = n - k$). The p-values hold for a given model; parameters that were fitted
    to the same data make them somewhat too large.

    Args:
        params: Model parameters.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or with a leading trial axis; NaN is missing and left out.
        inputs: Soft inputs, shared or one array for each trial.
        interventions: Clamps, shared or one for each trial.
        num_lags: Number h of lags, at least 1 and below num_timesteps. None: a fifth of the steps, at most 10.
        decorrelate: Whether each emission is also predicted from those before it in the same step (the whitening by a Cholesky
            factor), which makes different emissions independent. Without, each is standardised by its own variance.

    Returns:
        Innovations, statistics and p-values; NaN for an emission with too few observed entries.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, or there are fewer than two steps.

    References:
        Ljung & Box (1978); Jarque & Bera (1980); Durbin & Koopman (2012), sec. 2.12.

    Examples:
        >>> import jax, issm
        >>> params = issm.make_lgssm_params(0.0, 1.0, 0.9, 0.1, 1.0, 0.5)
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), params, 200)
        >>> bool(issm.residual_diagnostics(params, emissions).whiteness_p[0] > 0.01)
        True
    """
    trials = as_trials(params, emissions, inputs, interventions)
    num_timesteps = trials.emissions.shape[1]
    if num_timesteps < 2:
        fail("emissions", got="one step", expected="at least two", remedy="Autocorrelation needs steps that follow.")
    if num_lags is None:
        num_lags = min(MOST_LAGS, max(num_timesteps // 5, 1))
    integer = isinstance(num_lags, (int, np.integer)) and not isinstance(num_lags, bool)
    if not integer or not 1 <= num_lags < num_timesteps:
        fail(
            "num_lags",
            got=repr(num_lags),
            expected=f"an integer from 1 to {num_timesteps - 1}",
            remedy="Use fewer lags.",
        )
    posterior = lgssm_filter(params, emissions, inputs, interventions=interventions)
    means, covs = posterior.predicted_means, posterior.predicted_covariances
    if trials.one_sequence:
        means, covs = means[None], covs[None]
    innovations = _innovations(params, trials, means, covs, bool(decorrelate))
    return _diagnose(trials.like_user(innovations), int(num_lags))


@partial(jit_quickly, static_argnames="decorrelate")
def _innovations(params: ParamsLGSSM, trials: Trials, means: Array, covs: Array, decorrelate: bool) -> Array:
    """Standardised, NaN where an entry is missing, with a trial axis."""
    num_timesteps = trials.emissions.shape[1]
    seen = ~jnp.isnan(trials.emissions)
    expected = jax.vmap(emission_means, in_axes=(None, 0, trials.plan.axes.inputs))(params, means, trials.plan.inputs)
    errors = jnp.where(seen, trials.emissions - expected, 0.0)
    rows = over_time(params.emissions.weights, num_timesteps)
    noise = over_time(as_matrix(params.emissions.cov), num_timesteps)
    if decorrelate:
        spread = jnp.einsum("tni,ktij,tmj->ktnm", rows, covs, rows) + noise[None]
        both = seen[..., :, None] & seen[..., None, :]
        eye = jnp.eye(rows.shape[1], dtype=rows.dtype)
        factor = jnp.linalg.cholesky(jnp.where(both, spread, eye[None, None]))
        errors = jax.scipy.linalg.solve_triangular(factor, errors[..., None], lower=True)[..., 0]
    else:
        variances = jnp.einsum("tni,ktij,tnj->ktn", rows, covs, rows) + jnp.diagonal(noise, axis1=1, axis2=2)[None]
        errors = errors / jnp.sqrt(variances)
    return jnp.where(seen, errors, jnp.nan)


@partial(jit_quickly, static_argnames="num_lags")
def _diagnose(innovations: Float[Array, "*trials num_timesteps emission_dim"], num_lags: int) -> ResidualDiagnostics:
    values = innovations.reshape(-1, *innovations.shape[-2:])
    dtype, num_timesteps = values.dtype, values.shape[1]
    seen = ~jnp.isnan(values)
    weights, values = seen.astype(dtype), jnp.where(seen, values, 0.0)
    count = weights.sum(axis=(0, 1))
    size = jnp.maximum(count, 1)
    mean = values.sum(axis=(0, 1)) / size
    centered = weights * (values - mean[None, None])
    second, third, fourth = ((centered**power).sum(axis=(0, 1)) / size for power in (2, 3, 4))
    varies = second > 0
    scale = jnp.where(varies, second, 1.0)

    lags = range(1, num_lags + 1)
    products = jnp.stack([(centered[:, lag:] * centered[:, :-lag]).sum(axis=(0, 1)) for lag in lags])
    pairs = jnp.stack([(weights[:, lag:] * weights[:, :-lag]).sum(axis=(0, 1)) for lag in lags])
    autocorrelation = products / (size * scale)[None]
    terms = jnp.where(pairs > 0, size[None] ** 2 / jnp.maximum(pairs, 1) * autocorrelation**2, 0.0)
    whiteness = _where(varies, (size + 2) / size * terms.sum(axis=0))

    skewness, kurtosis = third / scale**1.5, fourth / scale**2
    normality = _where(varies, size / 6 * (skewness**2 + (kurtosis - 3) ** 2 / 4))

    third_of_steps = round(num_timesteps / 3)
    ends = (slice(num_timesteps - third_of_steps, None), slice(0, third_of_steps))
    counts = [weights[:, end].sum(axis=(0, 1)) for end in ends]
    squares = [(values[:, end] ** 2).sum(axis=(0, 1)) for end in ends]
    comparable = (counts[0] > 0) & (counts[1] > 0) & (squares[1] > 0)
    last, first = (
        jnp.where(comparable, square, 1.0) / jnp.maximum(n, 1) for square, n in zip(squares, counts, strict=True)
    )
    ratio = last / first
    return ResidualDiagnostics(
        innovations=innovations,
        num_observed=seen.sum(axis=(0, 1)),
        mean=_where(count > 0, mean),
        sd=_where(count > 0, safe_sqrt(second)),
        autocorrelation=_where(varies[None] & (pairs > 0), autocorrelation),
        autocorrelation_sd=_where(pairs > 0, jnp.sqrt(jnp.maximum(pairs, 1)) / size[None]),
        whiteness=whiteness,
        whiteness_p=_chi_square_tail(whiteness, num_lags),
        skewness=_where(varies, skewness),
        kurtosis=_where(varies, kurtosis),
        normality=normality,
        normality_p=_chi_square_tail(normality, 2),
        heteroskedasticity=_where(comparable, ratio),
        heteroskedasticity_p=_where(comparable, _two_sided_f(ratio, *(jnp.maximum(n, 1) for n in counts))),
    )


def _where(known: Array, values: Array) -> Array:
    return jnp.where(known, values, jnp.nan)


def _chi_square_tail(statistic: Array, degrees: int) -> Array:
    return gammaincc(jnp.full_like(statistic, degrees / 2), statistic / 2)


def _two_sided_f(ratio: Array, top: Array, bottom: Array) -> Array:
    below = betainc(top / 2, bottom / 2, top * ratio / (top * ratio + bottom))
    above = betainc(bottom / 2, top / 2, bottom / (top * ratio + bottom))
    return 2 * jnp.minimum(below, above)
