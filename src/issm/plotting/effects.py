"""Effects over time: of plans, of what happened to a series, and responses to pulses."""

import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from issm._check import fail
from issm.plotting.axes import new_axes, new_panels
from issm.plotting.series import plot_prediction

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    ax = new_axes(ax)
    ax.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    plot_prediction(mean[:, index], lower[:, index], upper[:, index], time=time, label=label, color=color, ax=ax)
    ax.set_ylabel("effect")
    return ax


def plot_series_effect(
    effect: Any, index: int = 0, *, time: Any = None, axes: "Sequence[Axes] | None" = None
) -> "Sequence[Axes]":
    r"""What happened to a series, in three panels: the series with its forecast, their difference, and its sum.

    Args:
        effect: The result of `observed_effect`.
        index: Which emission.
        time: Time of each step, `(num_timesteps,)`; None: steps counted from 0.
        axes: Three axes to draw into, top down; None: those of a new figure.

    Returns:
        The three axes.

    Raises:
        ValueError: If `index` is none of the emissions, `time` has another length, or there are not three axes.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Brodersen et al. (2015), fig. 1.

    Examples:
        >>> import numpy as np, issm
        >>> from issm.plotting import plot_series_effect
        >>> params = issm.make_lgssm_params(0.0, 1.0, 1.0, 0.1, 1.0, 1.0)
        >>> effect = issm.observed_effect(params, np.zeros((20, 1)), start=15)
        >>> [ax.get_ylabel() for ax in plot_series_effect(effect)]
        ['observed', 'effect', 'summed up']
    """
    emissions = np.asarray(effect.emissions)
    num_timesteps, emission_dim = emissions.shape
    if not 0 <= index < emission_dim:
        fail("index", got=repr(index), expected=f"0 ... {emission_dim - 1}", remedy="Draw one emission at a time.")
    counted = time is None
    time = np.arange(num_timesteps) if time is None else np.asarray(time)
    if time.shape != (num_timesteps,):
        fail("time", got=f"shape {time.shape}", expected=f"({num_timesteps},)", remedy="Give one time for each step.")
    axes = new_panels(3) if axes is None else axes
    if len(axes) != 3:
        fail("axes", got=f"{len(axes)}", expected="three", remedy="Make them with `subplots(3, 1, sharex=True)`.")
    after = slice(effect.start, None)
    lower, upper = (np.asarray(end) for end in effect.expected.interval(effect.level))
    # The first forecasts come from the prior of the first state and would set the scale of the panel.
    burn = min(effect.start - 1, max(1, effect.start // 20))
    shown = slice(burn, None)
    mean = np.asarray(effect.expected.mean)
    top, middle, bottom = axes
    plot_prediction(
        mean[shown, index],
        lower[shown, index],
        upper[shown, index],
        time=time[shown],
        label="expected",
        color="C0",
        ax=top,
    )
    top.plot(time, emissions[:, index], color="0.15", linewidth=1.0, label="observed", zorder=4)
    top.set_ylabel("observed")
    top.legend(loc="best", frameon=False, fontsize="small")
    for ax, each, word in ((middle, effect.per_step, "effect"), (bottom, effect.cumulative, "summed up")):
        parts = (np.asarray(part)[:, index] for part in (each.mean, each.lower, each.upper))
        ax.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
        plot_prediction(*parts, time=time[after], color="C1", ax=ax)
        ax.set_ylabel(word)
    for ax in axes:
        ax.axvline(time[effect.start], color="0.5", linewidth=0.8, linestyle=":")
    if counted:
        bottom.set_xlabel("step")
    return axes


def plot_response(
    response: Any, *, of: str = "states", labels: Sequence[str] | None = None, ax: "Axes | None" = None
) -> "Axes":
    r"""Responses to a pulse or to a clamp over the steps after it, a line each, with bands where parameters are uncertain.

    Args:
        response: The result of `impulse_response`, or that of `total_effects` or `controlled_direct_effect` with one source and
            `num_steps`.
        of: "states" or "emissions".
        labels: A name for each of them; None: their numbers.
        ax: Axes to draw into; None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If `of` is neither, there are no steps, or there are several sources.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Lütkepohl (2005), *New Introduction to Multiple Time Series Analysis*, fig. 2.5.

    Examples:
        >>> import issm
        >>> from issm.plotting import plot_response
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[2.0]], [0.5])
        >>> plot_response(issm.impulse_response(params, 5, source=0)).get_xlabel()
        'steps after the clamp'
    """
    if of not in ("states", "emissions"):
        fail("of", got=repr(of), expected="'states' or 'emissions'", remedy="Draw one panel for each.")
    course: Any = getattr(response, "per_step", response)  # the whole result, or its steps
    if course is None or np.ndim(getattr(course, of, ())) != 2:
        fail(
            "response",
            got="no steps"
            if course is None
            else f"shape {np.shape(getattr(course, of, ()))} of a {type(course).__name__}",
            expected="responses (num_steps + 1, num_variables) to one source",
            remedy="Ask for `num_steps`, and for one source with `controlled_direct_effect(..., mediators=[])`.",
        )
    values, spread = np.asarray(getattr(course, of)), getattr(course, f"{of}_spread")
    names = [f"{of[:-1]} {i}" for i in range(values.shape[1])] if labels is None else labels
    ax = new_axes(ax)
    ax.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    for i, name in enumerate(names):
        ends = (None, None) if spread is None else (np.asarray(spread.lower)[:, i], np.asarray(spread.upper)[:, i])
        plot_prediction(values[:, i], *ends, label=name, color=f"C{i}", ax=ax)
    ax.set_xlabel("steps after the clamp")
    ax.set_ylabel("response")
    ax.legend(frameon=False, fontsize="small")
    return ax
