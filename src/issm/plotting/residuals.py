"""Whether residuals are what a model says."""

import typing
from typing import Any

import jax
import numpy as np

from issm._check import fail
from issm.plotting.axes import new_axes

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    ax = new_axes(ax)
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
