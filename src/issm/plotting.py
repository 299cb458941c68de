"""Figures of fits, predictions and effects. Matplotlib is imported when a function is called, and axes come back.

Every function draws into `ax`, or into the axes of a new figure where none is given, so that panels can be combined.
"""

import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from issm._check import fail

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_log_probs(log_probs: Any, *, label: str | None = None, color: Any = None, ax: "Axes | None" = None) -> "Axes":
    r"""Trace of a fit: the log-likelihood before every update.

    Args:
        log_probs: $\log p(y)$ before each update, `(num_updates + 1,)`, as in `FitResult.log_probs`; natural logarithm.
        label: Name in the legend.
        color: Any colour of Matplotlib; None: the next of the cycle.
        ax: Axes to draw into; None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If `log_probs` is not one-dimensional.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Dempster, Laird & Rubin (1977), on the monotone trace of EM.

    Examples:
        >>> from issm.plotting import plot_log_probs
        >>> plot_log_probs([-120.0, -90.0, -85.0]).get_xlabel()
        'update'
    """
    log_probs = _as_series("log_probs", log_probs)
    ax = _axes(ax)
    ax.plot(np.arange(len(log_probs)), log_probs, label=label, color=color)
    ax.set_xlabel("update")
    ax.set_ylabel("log-likelihood (nats)")
    return ax


def plot_prediction(
    mean: Any,
    lower: Any = None,
    upper: Any = None,
    *,
    emissions: Any = None,
    time: Any = None,
    label: str | None = None,
    color: Any = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """One predicted, filtered or smoothed series with its band, and what was observed.

    Args:
        mean: The series, `(num_timesteps,)`, in the units of the data.
        lower: Lower end of the band, same shape; None: no band.
        upper: Upper end of the band, same shape.
        emissions: What was observed, same shape, drawn as points; NaN is left out.
        time: Time of each step, same shape; None: steps counted from 0.
        label: Name of the line in the legend.
        color: Any colour of Matplotlib, for line and band; None: the next of the cycle.
        ax: Axes to draw into; None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If a series is not one-dimensional, the lengths differ, or only one end of the band is given.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Durbin & Koopman (2012), fig. 2.1.

    Examples:
        >>> from issm.plotting import plot_prediction
        >>> ax = plot_prediction([1.0, 2.0], [0.5, 1.5], [1.5, 2.5], emissions=[1.1, 1.9], label="model")
        >>> len(ax.lines), len(ax.collections)
        (2, 1)
    """
    mean = _as_series("mean", mean)
    time = np.arange(len(mean)) if time is None else _as_series("time", time, len(mean))
    if (lower is None) != (upper is None):
        fail("lower, upper", got="one of them", expected="both or neither", remedy="Pass both ends of the band.")
    ax = _axes(ax)
    if emissions is not None:
        observed = _as_series("emissions", emissions, len(mean))
        ax.plot(time, observed, ".", color="0.25", markersize=3.5, zorder=1)
    (line,) = ax.plot(time, mean, label=label, color=color, zorder=3)
    if lower is not None:
        ends = (_as_series("lower", lower, len(mean)), _as_series("upper", upper, len(mean)))
        ax.fill_between(time, *ends, color=line.get_color(), alpha=0.2, linewidth=0, zorder=2)
    return ax


def plot_interventions(
    mask: Any, *, time: Any = None, color: Any = "0.88", label: str | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Shade the steps at which a clamp holds.

    Args:
        mask: True where it holds, `(num_timesteps,)`.
        time: Time of each step, same shape; None: steps counted from 0.
        color: Any colour of Matplotlib.
        label: Name in the legend.
        ax: Axes to draw into; None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If `mask` is not one-dimensional or `time` has another length.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Nejatbakhsh & Wang (2025), fig. 2.

    Examples:
        >>> from issm.plotting import plot_interventions
        >>> len(plot_interventions([False, True, True, False, True]).patches)
        2
    """
    mask = _as_series("mask", mask).astype(bool)
    time = np.arange(len(mask)) if time is None else _as_series("time", time, len(mask))
    half = (time[1] - time[0]) / 2 if len(time) > 1 else 0.5
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    ax = _axes(ax)
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        ax.axvspan(time[start] - half, time[stop - 1] + half, color=color, linewidth=0, zorder=0, label=label)
        label = None
    return ax


def plot_flow_field(
    drift: Callable,
    extent: tuple[float, float, float, float],
    *,
    states: Any = None,
    color: Any = None,
    num_points: int = 25,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Streamlines of $\dot x = f(x)$ for two states.

    Args:
        drift: f, from one state `(2,)` to its rate of change `(2,)`; a system of `issm.simulate` is one.
        extent: Smallest and largest first state, then smallest and largest second state, in the units of the states.
        states: Trajectories drawn underneath, `(num_timesteps, 2)` or `(num_trials, num_timesteps, 2)`.
        color: Any colour of Matplotlib for the streamlines.
        num_points: Grid points along each axis.
        ax: Axes to draw into; None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If the extent is empty or `drift` does not return two numbers.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Galgali, Sahani & Mante (2023), fig. 1.

    Examples:
        >>> from issm.plotting import plot_flow_field
        >>> from issm.simulate import Saddle
        >>> plot_flow_field(Saddle(), (-3.0, 3.0, -2.0, 2.0)).get_ylabel()
        'state 2'
    """
    left, right, bottom, top = extent
    if not (left < right and bottom < top):
        fail("extent", got=f"{extent}", expected="(left, right, bottom, top)", remedy="Put the smaller number first.")
    first, second = np.linspace(left, right, num_points), np.linspace(bottom, top, num_points)
    grid = np.stack(np.meshgrid(first, second), axis=-1)
    rates = np.asarray(jax.vmap(drift)(jax.numpy.asarray(grid.reshape(-1, 2))))
    if rates.shape != (num_points**2, 2):
        fail("drift", got=f"shape {rates.shape[1:]}", expected="(2,)", remedy="Flow fields are drawn for two states.")
    rates = rates.reshape(num_points, num_points, 2)
    ax = _axes(ax)
    if states is not None:
        for trial in np.atleast_3d(np.asarray(states).reshape(-1, *np.shape(states)[-2:])):
            ax.plot(trial[:, 0], trial[:, 1], color="0.75", linewidth=0.5, zorder=1)
    ax.streamplot(
        first, second, rates[..., 0], rates[..., 1],
        color=color, density=0.75, linewidth=1.0, arrowsize=0.9, zorder=2,
    )  # fmt: skip
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_xlabel("state 1")
    ax.set_ylabel("state 2")
    return ax


def plot_effect(
    effect: Any,
    index: int = 0,
    *,
    time: Any = None,
    label: str | None = None,
    color: Any = None,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Effect of a plan over time, $E[y_t \mid do(\pi_1)] - E[y_t \mid do(\pi_0)]$, with its interval and a line at zero.

    Args:
        effect: An `EffectEstimate` of one trial: `mean`, `lower` and `upper`, `(num_timesteps, num_variables)`.
        index: Which variable to draw.
        time: Time of each step, `(num_timesteps,)`; None: steps counted from 0.
        label: Name in the legend.
        color: Any colour of Matplotlib.
        ax: Axes to draw into; None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If the effect has a trial axis, or `index` is none of its variables.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Pearl (2009), sec. 3.2; Brodersen et al. (2015), fig. 1.

    Examples:
        >>> import numpy as np
        >>> from types import SimpleNamespace
        >>> from issm.plotting import plot_effect
        >>> mean = np.array([[0.0], [1.0], [0.5]])
        >>> plot_effect(SimpleNamespace(mean=mean, lower=mean - 0.2, upper=mean + 0.2)).get_ylabel()
        'effect'
    """
    mean, lower, upper = (np.asarray(part) for part in (effect.mean, effect.lower, effect.upper))
    if mean.ndim != 2 or not 0 <= index < mean.shape[-1]:
        fail(
            "effect, index",
            got=f"effects of shape {mean.shape} and index {index}",
            expected="(num_timesteps, num_variables) and the index of a variable",
            remedy="Take one trial of the effect first.",
        )
    ax = _axes(ax)
    ax.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    plot_prediction(mean[:, index], lower[:, index], upper[:, index], time=time, label=label, color=color, ax=ax)
    ax.set_ylabel("effect")
    return ax


def plot_residuals(
    diagnostics: Any, index: int = 0, *, kind: str = "autocorrelation", color: Any = None, ax: "Axes | None" = None
) -> "Axes":
    r"""One look at the standardised innovations of an emission.

    Args:
        diagnostics: The result of `residual_diagnostics`.
        index: Which emission.
        kind: "autocorrelation" (at each lag, with a band of two standard errors around zero), "quantiles" (against those of the
            standard normal, with the line they should be on) or "time" (the innovations at each step, of all trials).
        color: Any colour of Matplotlib; None: the next of the cycle.
        ax: Axes to draw into; None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If the kind is unknown or `index` is none of the emissions.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Durbin & Koopman (2012), fig. 2.7 and 2.8.

    Examples:
        >>> import jax, issm
        >>> from issm.plotting import plot_residuals
        >>> params = issm.make_lgssm_params(0.0, 1.0, 0.9, 0.1, 1.0, 0.5)
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), params, 100)
        >>> plot_residuals(issm.residual_diagnostics(params, emissions)).get_xlabel()
        'lag (steps)'
    """
    if kind not in ("autocorrelation", "quantiles", "time"):
        fail(
            "kind",
            got=repr(kind),
            expected="'autocorrelation', 'quantiles' or 'time'",
            remedy="Draw one panel for each.",
        )
    innovations = np.asarray(diagnostics.innovations)
    if not 0 <= index < innovations.shape[-1]:
        fail(
            "index",
            got=repr(index),
            expected=f"an emission, 0 to {innovations.shape[-1] - 1}",
            remedy="Draw one emission at a time.",
        )
    values = innovations[..., index].reshape(-1, innovations.shape[-2])
    ax = _axes(ax)
    if kind == "autocorrelation":
        heights, band = (
            np.asarray(field)[:, index] for field in (diagnostics.autocorrelation, 2 * diagnostics.autocorrelation_sd)
        )
        lags = np.arange(1, len(heights) + 1)
        ax.fill_between(lags, -band, band, color="0.9", linewidth=0, zorder=0)
        ax.vlines(lags, 0.0, heights, color=color)
        ax.set_xlabel("lag (steps)")
        ax.set_ylabel("autocorrelation")
    elif kind == "quantiles":
        ordered = np.sort(values[~np.isnan(values)])
        expected = np.asarray(jax.scipy.stats.norm.ppf((np.arange(len(ordered)) + 0.5) / max(len(ordered), 1)))
        ax.plot(expected, expected, color="0.6", linewidth=0.8, zorder=0)
        ax.plot(expected, ordered, ".", color=color, markersize=3.5)
        ax.set_xlabel("standard normal quantile")
        ax.set_ylabel("innovation (sd)")
    else:
        steps = np.broadcast_to(np.arange(values.shape[1]), values.shape)
        ax.plot(steps.ravel(), values.ravel(), ".", color=color, markersize=3.5)
        ax.set_xlabel("step")
        ax.set_ylabel("innovation (sd)")
    if kind != "quantiles":
        ax.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    return ax


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("issm.plotting needs Matplotlib: pip install 'issm[plot]'.") from error
    return pyplot.subplots(layout="constrained")[1]


def _as_series(argument: str, values: Any, length: int | None = None) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or length not in (None, len(values)):
        fail(
            argument,
            got=f"shape {values.shape}",
            expected="one number for each step" if length is None else f"({length},), one number for each step",
            remedy="Pick one trial and one variable first.",
        )
    return values
