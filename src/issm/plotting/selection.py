"""How many states."""

import typing
from typing import Any

import numpy as np

from issm.plotting.axes import new_axes

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_state_dim_selection(
    selection: Any,
    criterion: str | None = None,
    *,
    label: str | None = None,
    color: Any = None,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Score of each number of states, with the standard error of its distance to the best, and the choice.

    Args:
        selection: The result of `select_state_dim`.
        criterion: Which score to draw, per observed number; None: the one that chose.
        label: Name in the legend.
        color: Any colour of Matplotlib; None: the next of the cycle.
        ax: Axes to draw into; None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If the criterion was not computed.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Hastie, Tibshirani & Friedman (2009), fig. 7.9.

    Examples:
        >>> from types import SimpleNamespace
        >>> from issm.plotting import plot_state_dim_selection
        >>> selection = SimpleNamespace(
        ...     dims=(1, 2), criterion="bic", choices={"bic": 2}, score=lambda name: ([-2.0, -1.0], [0.0, 0.0])
        ... )
        >>> plot_state_dim_selection(selection).get_xlabel()
        'number of states'
    """
    name: str = selection.criterion if criterion is None else criterion
    mean, error = (np.asarray(each) for each in selection.score(name))
    ax = new_axes(ax)
    bars = ax.errorbar(selection.dims, mean, error, marker="o", markersize=4, label=label, color=color, capsize=2)
    ax.axvline(selection.choices[name], color=bars.lines[0].get_color(), linewidth=0.8, linestyle=":", zorder=0)
    ax.set_xticks(list(selection.dims))
    ax.set_xlabel("number of states")
    ax.set_ylabel(f"{name.replace('_', ' ')} (nats per number)")
    return ax
