"""What `learn_targets` is given, checked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from issm._check import as_array, as_float_array, check_finite, common_float_dtype, fail
from issm._host import is_concrete


def check_data(emissions: Any, amplitudes: Any, active: Any, state_dim: int) -> tuple[Array, Array, np.ndarray]:
    """Emissions, amplitudes and which channels are on, with a trial axis; amplitudes are zero where a channel is off."""
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves((emissions, amplitudes, active))):
        fail("emissions", got="data that JAX traces", expected="concrete arrays", remedy="Call it outside `jit`.")
    dtype = common_float_dtype(emissions)
    emissions = as_float_array("emissions", emissions, dtype)
    amplitudes = as_float_array("amplitudes", amplitudes, dtype)
    if (
        emissions.ndim not in (2, 3)
        or amplitudes.ndim != emissions.ndim
        or amplitudes.shape[:-1] != emissions.shape[:-1]
    ):
        fail(
            "amplitudes",
            got=f"shape {tuple(amplitudes.shape)} for emissions of shape {tuple(emissions.shape)}",
            expected="(num_timesteps, num_channels) or (num_trials, num_timesteps, num_channels), like the emissions",
            remedy="Give each trial its amplitudes.",
        )
    active = np.asarray(amplitudes != 0) if active is None else np.asarray(as_array("active", active))
    if active.dtype != bool or active.shape != amplitudes.shape:
        fail(
            "active",
            got=f"dtype {active.dtype}, shape {active.shape}",
            expected=f"Boolean, with the shape of `amplitudes`, {tuple(amplitudes.shape)}",
            remedy="Give one Boolean for each amplitude.",
        )
    check_finite("amplitudes", jnp.where(active, amplitudes, 0.0))
    if emissions.shape[-1] < state_dim:
        fail(
            "state_dim",
            got=f"{state_dim} for {emissions.shape[-1]} emissions",
            expected="no more states than emissions",
            remedy="The state at a stimulated step is read off the emissions; use fewer states.",
        )
    if not active.any():
        fail(
            "active", got="no stimulated step", expected="at least one", remedy="Pass `active` if amplitudes are zero."
        )
    amplitudes = jnp.where(active, amplitudes, 0.0)
    if emissions.ndim == 2:
        return emissions[None], amplitudes[None], active[None]
    return emissions, amplitudes, active
