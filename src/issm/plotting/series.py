"""Series over time, traces of fits, and flow fields."""

import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from issm._check import fail
from issm.plotting.axes import as_series, new_axes

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
    log_probs = as_series("log_probs", log_probs)
    ax = new_axes(ax)
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
    mean = as_series("mean", mean)
    counted = time is None
    time = np.arange(len(mean)) if time is None else as_series("time", time, len(mean))
    if (lower is None) != (upper is None):
        fail("lower, upper", got="one of them", expected="both or neither", remedy="Pass both ends of the band.")
    ax = new_axes(ax)
    if emissions is not None:
        observed = as_series("emissions", emissions, len(mean))
        ax.plot(time, observed, ".", color="0.25", markersize=3.5, zorder=1)
    (line,) = ax.plot(time, mean, label=label, color=color, zorder=3)
    if lower is not None:
        ends = (as_series("lower", lower, len(mean)), as_series("upper", upper, len(mean)))
        ax.fill_between(time, *ends, color=line.get_color(), alpha=0.2, linewidth=0, zorder=2)
    if counted:
        ax.set_xlabel("step")
        ax.locator_params(axis="x", integer=True)
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
    mask = as_series("mask", mask).astype(bool)
    time = np.arange(len(mask)) if time is None else as_series("time", time, len(mask))
    half = (time[1] - time[0]) / 2 if len(time) > 1 else 0.5
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    ax = new_axes(ax)
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
    ax = new_axes(ax)
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
