"""Trials of unequal length, padded to one array."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from issm._check import as_float_array, common_float_dtype, fail


def pad_trials(
    trials: Sequence[Any], fill: float = float("nan")
) -> tuple[Shaped[Array, "num_trials num_timesteps features"], Int[np.ndarray, " num_trials"]]:
    """Stack trials of unequal length, filling their ends.

    A step past the end of a trial, where every emission is NaN, adds nothing to the likelihood, and `fit_em` does not learn
    from it.

    Args:
        trials: One array `(length, features)` for each trial: emissions, inputs, clamp values, or Boolean masks.
        fill: What stands past the end: NaN for emissions, 0.0 for inputs and clamp values. Boolean trials are always filled
            with False.

    Returns:
        The stacked trials `(num_trials, num_timesteps, features)` and their lengths `(num_trials,)`.

    Raises:
        ValueError: If there is no trial, a trial is empty or has no feature axis, or trials differ in their features.

    References:
        `docs/how-to/ragged-trials.md`.

    Examples:
        >>> import numpy as np
        >>> from issm import pad_trials
        >>> emissions, lengths = pad_trials([np.ones((3, 2)), np.ones((5, 2))])
        >>> emissions.shape, lengths.tolist()
        ((2, 5, 2), [3, 5])
    """
    if not isinstance(trials, (list, tuple)) or len(trials) == 0:
        fail(
            "trials",
            got=f"a {type(trials).__name__}" + (" with nothing in it" if isinstance(trials, (list, tuple)) else ""),
            expected="a list of at least one array (length, features)",
            remedy="Trials of equal length need no padding: stack them.",
        )
    boolean = all(np.dtype(getattr(trial, "dtype", float)).kind == "b" for trial in trials)
    dtype = common_float_dtype(*trials)
    arrays = [
        jnp.asarray(trial) if boolean else as_float_array(f"trials[{k}]", trial, dtype)
        for k, trial in enumerate(trials)
    ]
    for k, array in enumerate(arrays):
        if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] != arrays[0].shape[-1]:
            fail(
                f"trials[{k}]",
                got=f"shape {tuple(array.shape)}",
                expected=f"(length, features) with at least one step and {arrays[0].shape[-1]} features, those of trials[0]",
                remedy="Add the feature axis with `y[:, None]`; leave out empty trials.",
            )
    lengths = np.array([array.shape[0] for array in arrays])
    longest = int(lengths.max())
    value = False if boolean else fill
    padded = [jnp.pad(a, ((0, longest - a.shape[0]), (0, 0)), constant_values=value) for a in arrays]
    return jnp.stack(padded), lengths
