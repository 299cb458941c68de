r"""Structural time series: a level, perhaps a slope, a season and regressors, as a linear Gaussian state-space model."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from issm._check import as_float_array, fail
from issm._host import is_concrete
from issm.models.lgssm import ParamsLGSSM, make_lgssm_params

START_SHARE = 0.1
"""Share of the variance from step to step that the level is given where a fit starts; the season and slope get less."""


class StructuralModel(eqx.Module):
    """Parameters to start a fit from, and which of them it may change; result of `structural_model`.

    Attributes:
        params: A model whose states are the level, the slope (with `trend`) and the season (with `seasonal`), in this order.
        trainable: True at the variances and the regression weights, False at the structure: the keyword of `fit_em`.

    References:
        Harvey (1989), *Forecasting, Structural Time Series Models and the Kalman Filter*, ch. 2.

    Examples:
        >>> import numpy as np, issm
        >>> model = issm.structural_model(np.sin(np.arange(40.0))[:, None], trend=True, seasonal=4)
        >>> model.params.state_dim, model.trainable.dynamics.cov.tolist()
        (5, [True, True, True, False, False])
    """

    params: ParamsLGSSM
    trainable: ParamsLGSSM


def structural_model(
    emissions: Any, inputs: Any = None, *, trend: bool = False, seasonal: int | None = None
) -> StructuralModel:
    r"""A structural model of one series, ready to be fitted.

    $$y_t = μ_t + γ_t + β^\top u_t + r_t, \quad μ_t = μ_{t-1} + δ_{t-1} + w^μ_t, \quad δ_t = δ_{t-1} + w^δ_t, \quad
    γ_t = -\sum_{s=1}^{S-1} γ_{t-s} + w^γ_t$$

    The variances of $w^μ, w^δ, w^γ, r$ and the weights β of the regressors are left to the fit. The first level is around the first
    observation, with the variance of the series; slope and season start around zero.

    Args:
        emissions: The series before whatever happened, `(num_timesteps, 1)`; NaN is missing.
        inputs: Regressors, `(num_timesteps, num_regressors)`: series that what happened does not touch. None: none.
        trend: Whether the level has a slope of its own.
        seasonal: Number of steps S of a season, at least 2; None: no season.

    Returns:
        The start and what is trainable: `fit_em(model.params, emissions, inputs, trainable=model.trainable)`.

    Raises:
        ValueError: If the series is not one, has fewer than three observations or is traced by JAX, the season is shorter than two
            steps, or regressors are of another length, missing or constant.

    References:
        Harvey (1989), *Forecasting, Structural Time Series Models and the Kalman Filter*, ch. 2; Brodersen et al. (2015), *Annals
        of Applied Statistics* 9, sec. 2.1.

    Examples:
        >>> import numpy as np, issm
        >>> series = np.cumsum(np.random.default_rng(0).normal(size=(60, 1)), axis=0)
        >>> model = issm.structural_model(series)
        >>> fit = issm.fit_em(model.params, series, trainable=model.trainable, num_iters=20)
        >>> bool(fit.log_probs[-1] > fit.log_probs[0])
        True
    """
    series, dtype = _as_series(emissions)
    regressors = _as_regressors(inputs, len(series))
    if seasonal is not None and (
        isinstance(seasonal, bool) or not isinstance(seasonal, (int, np.integer)) or seasonal < 2
    ):
        fail(
            "seasonal",
            got=repr(seasonal),
            expected="an integer of at least 2, or None",
            remedy="Give the steps of a season.",
        )
    seen = np.flatnonzero(~np.isnan(series))
    slopes, residuals = _regression(series, regressors, seen)
    scale = float(np.var(series[seen])) or 1.0
    steps = np.diff(residuals[seen])
    change = float(np.mean(steps**2)) or scale
    num_seasonal = 0 if seasonal is None else int(seasonal) - 1
    state_dim, season = 1 + bool(trend) + num_seasonal, 1 + bool(trend)

    weights = np.zeros((state_dim, state_dim))
    weights[0, : 1 + bool(trend)] = 1.0
    if trend:
        weights[1, 1] = 1.0
    loading, noise, moves = np.zeros((1, state_dim)), np.zeros(state_dim), np.zeros(state_dim, bool)
    loading[0, 0], noise[0], moves[: 1 + bool(trend)] = 1.0, START_SHARE * change, True
    variances = np.full(state_dim, scale)
    if trend:
        noise[1], variances[1] = START_SHARE**2 * change, change
    if num_seasonal:
        weights[season, season:] = -1.0
        weights[np.arange(season + 1, state_dim), np.arange(season, state_dim - 1)] = 1.0
        loading[0, season], noise[season], moves[season] = 1.0, START_SHARE**2 * change, True
    mean = np.zeros(state_dim)
    mean[0] = residuals[seen[0]]

    num_regressors = regressors.shape[1]
    fields = dict(
        initial_mean=mean, initial_cov=variances, dynamics_weights=weights, dynamics_cov=noise,
        emissions_weights=loading, emissions_cov=np.full(1, change / 2),
        dynamics_input_weights=np.zeros((state_dim, num_regressors)), emissions_input_weights=slopes[None],
    )  # fmt: skip
    params = make_lgssm_params(**{name: jnp.asarray(value, dtype) for name, value in fields.items()})
    everything_known = jax.tree.map(lambda _: False, params)
    where = lambda p: (p.dynamics.cov, p.emissions.cov, p.emissions.input_weights)  # noqa: E731
    return StructuralModel(params, eqx.tree_at(where, everything_known, (moves, True, num_regressors > 0)))


def _as_series(emissions: Any) -> tuple[np.ndarray, Any]:
    if not is_concrete(emissions):
        fail("emissions", got="data that JAX traces", expected="numbers", remedy="Build the model outside of `jit`.")
    array = as_float_array("emissions", emissions)
    if array.ndim != 2 or array.shape[1] != 1:
        fail(
            "emissions",
            got=f"shape {tuple(array.shape)}",
            expected="(num_timesteps, 1), one series",
            remedy="Add the emission axis with `y[:, None]`; other series that predict it are `inputs`.",
        )
    series = np.asarray(array, np.float64)[:, 0]
    if np.isinf(series).any() or (~np.isnan(series)).sum() < 3:
        fail(
            "emissions",
            got=f"{int(np.isfinite(series).sum())} finite observations of {len(series)}",
            expected="at least three, and none infinite",
            remedy="NaN means missing; give more of the past.",
        )
    return series, array.dtype


def _as_regressors(inputs: Any, num_timesteps: int) -> np.ndarray:
    if inputs is None:
        return np.zeros((num_timesteps, 0))
    regressors = np.asarray(as_float_array("inputs", inputs), np.float64)
    if regressors.ndim != 2 or len(regressors) != num_timesteps:
        fail(
            "inputs",
            got=f"shape {regressors.shape}",
            expected=f"({num_timesteps}, num_regressors), the steps of the series",
            remedy="Add the last axis with `u[:, None]` for one regressor.",
        )
    if not np.isfinite(regressors).all():
        fail(
            "inputs", got="NaN or infinity", expected="finite numbers", remedy="Fill the gaps of the regressors first."
        )
    if (np.ptp(regressors, axis=0) == 0).any():
        fail("inputs", got="a constant regressor", expected="regressors that vary", remedy="The level is the constant.")
    return regressors


def _regression(series: np.ndarray, regressors: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares with an intercept: slopes, and what they leave of the series."""
    if not regressors.shape[1]:
        return np.zeros(0), series
    center, spread = regressors[seen].mean(axis=0), regressors[seen].std(axis=0)
    columns = (regressors[seen] - center) / np.where(spread > 0, spread, 1.0)
    solution = np.linalg.lstsq(columns, series[seen] - series[seen].mean(), rcond=None)[0]
    slopes = solution / np.where(spread > 0, spread, 1.0)
    return slopes, series - regressors @ slopes
