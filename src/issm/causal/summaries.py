"""What `summary()` of effects, predictions and responses prints."""

from typing import Any

import numpy as np

from issm._tables import format_table

MOST_STEPS = 12
HEADS = ["mean", "sd", "lower", "upper", "p"]


def effect_table(parts: dict[str, Any], *, title: str) -> str:
    """One row for each part, trial and output, parts being `Effect`s of shape `(num_outputs,)` or `(num_trials, num_outputs)`."""
    rows = []
    for label, effect in parts.items():
        for at in np.ndindex(*np.shape(effect.mean)):
            total = effect.total
            numbers = [
                np.asarray(part)[at] for part in (effect.mean, total.sd, total.lower, total.upper, total.p_value)
            ]
            rows.append([label, *at, *numbers])
    return format_table(["effect", *_axes(parts), *HEADS], rows, title=title)


def prediction_table(parts: dict[str, Any]) -> str:
    """Mean and sd of some steps, evenly spaced, parts being `Moments` of one trial or many."""
    first = next(iter(parts.values()))
    num_timesteps = first.mean.shape[-2]
    steps = np.unique(np.linspace(0, num_timesteps - 1, min(num_timesteps, MOST_STEPS)).round().astype(int))
    has_trials = first.mean.ndim == 3
    heads = ["step"]
    columns = []
    for name, moments in parts.items():
        mean, sd = (np.asarray(part) for part in (moments.mean, moments.sd))
        if has_trials:  # the mean over trials, and where one trial may lie
            mean, sd = mean.mean(axis=0), np.sqrt(mean.var(axis=0) + (sd**2).mean(axis=0))
        for n in range(mean.shape[-1]):
            heads.append(f"{name} {n}")
            columns.append([f"{mean[t, n]:.3g} ± {sd[t, n]:.2g}" for t in steps])
    rows = [[step, *cells] for step, *cells in zip(steps, *columns, strict=True)]
    title = "Mean ± sd over all trials" if has_trials else "Mean ± sd"
    return format_table(heads, rows, title=title)


def response_table(parts: dict[str, tuple[Any, Any]], *, rows_name: str, columns_name: str, title: str) -> str:
    """A matrix of values with their sd where there is one; parts are `(values (rows, columns), Spread or None)`."""
    heads, columns = [rows_name], []
    num_rows = 0
    for name, (values, spread) in parts.items():
        values = np.asarray(values)
        sd = None if spread is None else np.asarray(spread.sd)
        num_rows = values.shape[0]
        for n in range(values.shape[1]):
            heads.append(f"{columns_name}{name} {n}")
            columns.append(
                [f"{values[t, n]:.3g}" + ("" if sd is None else f" ± {sd[t, n]:.2g}") for t in range(num_rows)]
            )
    chosen = np.unique(np.linspace(0, num_rows - 1, min(num_rows, MOST_STEPS)).round().astype(int))
    rows = [[t, *(column[t] for column in columns)] for t in chosen]
    return format_table(heads, rows, title=title)


def _axes(parts: dict[str, Any]) -> list[str]:
    return ["trial", "output"] if np.ndim(next(iter(parts.values())).mean) == 2 else ["output"]
