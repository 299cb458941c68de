"""The axes that a figure is drawn into, and the series drawn there."""

import typing
from typing import Any

import numpy as np

from issm._check import fail

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes


def new_axes(ax: "Axes | None") -> "Axes":
    """The axes given, or those of a new figure."""
    return _pyplot().subplots(layout="constrained")[1] if ax is None else ax


def new_panels(count: int) -> "list[Axes]":
    """Axes of a new figure below one another, with one time axis."""
    size = (6.4, 2.2 * count)
    return list(_pyplot().subplots(count, 1, sharex=True, figsize=size, layout="constrained")[1])


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("issm.plotting needs Matplotlib: pip install 'issm[plot]'.") from error
    return pyplot


def as_series(argument: str, values: Any, length: int | None = None) -> np.ndarray:
    """One number for each step, as NumPy."""
    values = np.asarray(values)
    if values.ndim != 1 or length not in (None, len(values)):
        fail(
            argument,
            got=f"shape {values.shape}",
            expected="one number for each step" if length is None else f"({length},), one number for each step",
            remedy="Pick one trial and one variable first.",
        )
    return values
