"""Connectivity with its certainty, designs of clamps, and comparisons of models."""

import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from issm._check import fail
from issm.interventions import Intervention
from issm.plotting.axes import new_axes

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes

CERTAIN = 1.96


def plot_connectivity(
    weights: Any,
    *,
    standard_errors: Any = None,
    silent: Any = None,
    labels: Sequence[str] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""A matrix of edges: colour is the weight, area its certainty, a cross an edge that the data cannot speak about.

    The area of a square grows with $|w| / s.e.$ up to 1.96, where it fills its place: from there on zero is outside the 95 %
    interval.

    Args:
        weights: Weight of the edge from j to i at (i, j), `(num_targets, num_sources)`: dynamics weights, or total effects.
        standard_errors: Same shape; None: all weights are taken as certain.
        silent: Boolean, same shape, as in `Identifiability.silent`; None: none.
        labels: A name for each state; None: their numbers.
        ax: Axes to draw into; None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If `weights` is no matrix, or another argument has another shape.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Nejatbakhsh & Wang (2025), fig. 3.

    Examples:
        >>> from issm.plotting import plot_connectivity
        >>> ax = plot_connectivity([[0.5, 0.0], [0.3, 0.8]], standard_errors=[[0.1, 0.1], [0.3, 0.1]])
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('from state', 'to state')
    """
    weights = np.asarray(weights, float)
    errors = np.zeros_like(weights) if standard_errors is None else np.asarray(standard_errors, float)
    silent = np.zeros(weights.shape, bool) if silent is None else np.asarray(silent)
    for name, array in (("standard_errors", errors), ("silent", silent)):
        if weights.ndim != 2 or array.shape != weights.shape:
            fail(
                name,
                got=f"shape {array.shape}",
                expected="a matrix of the shape of `weights`",
                remedy="One entry an edge.",
            )
    ax = new_axes(ax)
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Rectangle

    largest = np.abs(np.where(np.isfinite(weights), weights, 0.0)).max() or 1.0
    image = ax.imshow(np.zeros_like(weights), cmap="RdBu_r", vmin=-largest, vmax=largest, alpha=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        certainty = np.where(errors > 0, np.abs(weights) / errors, np.inf)
    for (i, j), weight in np.ndenumerate(weights):
        if silent[i, j] or not np.isfinite(weight):
            ax.plot(j, i, "x", color="0.6", markersize=6)
            continue
        side = float(0.94 * np.sqrt(min(certainty[i, j] / CERTAIN, 1.0))) if weight else 0.0
        corner = (j - side / 2, i - side / 2)
        ax.add_patch(Rectangle(corner, side, side, color=image.cmap(image.norm(weight)), linewidth=0))
    _label_states(ax, labels, weights.shape)
    ax.set_xlabel("from state")
    ax.set_ylabel("to state")
    shades = ScalarMappable(image.norm, image.cmap)  # the image itself is transparent
    ax.figure.colorbar(shades, ax=ax, shrink=0.8)
    return ax


def plot_design(
    plans: Any, *, labels: Sequence[str] | None = None, time: Any = None, ax: "Axes | None" = None
) -> "Axes":
    r"""Which states are clamped when, and to what: a row for each state, trials below one another; grey is free.

    Args:
        plans: An `Intervention`, `(num_timesteps, state_dim)` or with a leading trial axis, such as `Design.plans`.
        labels: A name for each state; None: their numbers.
        time: Time of the steps, `(num_timesteps,)`, evenly spaced; None: steps counted from 0.
        ax: Axes to draw into; None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If `time` has another length.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Nejatbakhsh & Wang (2025), fig. 2.

    Examples:
        >>> import issm
        >>> from issm.plotting import plot_design
        >>> plot_design(issm.do({0: 1.0}, num_timesteps=5, state_dim=2)).get_xlabel()
        'step'
    """
    if not isinstance(plans, Intervention):
        fail(
            "plans",
            got=f"a {type(plans).__name__}",
            expected="an Intervention, of one trial or with a trial axis",
            remedy="Stack plans with `jax.tree.map(lambda *leaves: jnp.stack(leaves), *plans)`.",
        )
    mask, value = (np.asarray(leaf).reshape(-1, *leaf.shape[-2:]) for leaf in (plans.mask, plans.value))
    num_trials, num_timesteps, state_dim = mask.shape
    time = np.arange(num_timesteps) if time is None else np.asarray(time)
    if time.shape != (num_timesteps,):
        fail("time", got=f"shape {time.shape}", expected=f"({num_timesteps},)", remedy="Give one time for each step.")
    rows = np.where(mask, value, np.nan).transpose(0, 2, 1).reshape(-1, num_timesteps)
    largest = np.abs(value[mask]).max(initial=0.0) or 1.0
    half = (time[1] - time[0]) / 2 if num_timesteps > 1 else 0.5
    ax = new_axes(ax)
    ax.set_facecolor("0.85")
    image = ax.imshow(
        rows, cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest",
        extent=(time[0] - half, time[-1] + half, len(rows) - 0.5, -0.5),
    )  # fmt: skip
    for trial in range(1, num_trials):
        ax.axhline(trial * state_dim - 0.5, color="0.5", linewidth=0.8)
    names = [str(i) for i in range(state_dim)] if labels is None else list(labels)
    ax.set_yticks(range(len(rows)), names * num_trials, fontsize="small" if num_trials * state_dim < 20 else 5)
    ax.set_ylabel("state" if num_trials == 1 else "state, trial by trial")
    ax.set_xlabel("step")
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label="held at")
    return ax


def plot_comparison(comparison: Any, *, of: str = "rollout_r2", ax: "Axes | None" = None) -> "Axes":
    r"""Scores of several models on held-out trials, with their intervals.

    Args:
        comparison: The result of `compare`.
        of: "log_likelihood", "one_step_r2" or "rollout_r2".
        ax: Axes to draw into; None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If `of` is none of the scores.
        ImportError: If Matplotlib is not installed (extra `plot`).

    References:
        Nejatbakhsh & Wang (2025), fig. 4.

    Examples:
        >>> import jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> from issm import Score
        >>> from issm.plotting import plot_comparison
        >>> score = Score(jnp.array([0.9, 0.5]), jnp.array([0.8, 0.4]), jnp.array([0.95, 0.6]))
        >>> plot_comparison(SimpleNamespace(rollout_r2=score, names=("iSSM", "additive SSM"))).get_xlabel()
        'rollout R²'
    """
    words = {
        "log_likelihood": "log-likelihood (nats a number)",
        "one_step_r2": "one-step R²",
        "rollout_r2": "rollout R²",
    }
    if of not in words:
        fail("of", got=repr(of), expected=", ".join(map(repr, words)), remedy="Draw one panel for each.")
    score = getattr(comparison, of)
    value, lower, upper = (np.asarray(part) for part in (score.value, score.lower, score.upper))
    ax = new_axes(ax)
    places = np.arange(len(value))
    ax.hlines(places, lower, upper, color="0.6", linewidth=2.0)
    ax.plot(value, places, "o", color="C0")
    ax.set_yticks(places, comparison.names)
    ax.set_ylim(len(value) - 0.5, -0.5)
    ax.set_xlabel(words[of])
    return ax


def _label_states(ax: "Axes", labels: Sequence[str] | None, shape: tuple[int, ...]) -> None:
    for set_ticks, size in ((ax.set_xticks, shape[1]), (ax.set_yticks, shape[0])):
        set_ticks(range(size), labels if labels is not None and len(labels) == size else [str(i) for i in range(size)])
    ax.set_xlim(-0.5, shape[1] - 0.5)
    ax.set_ylim(shape[0] - 0.5, -0.5)
