"""What the starts of the fitters look at: the trials in NumPy, standardised, gaps filled."""

from typing import Any

import jax
import numpy as np

from issm._check import as_float_array, common_float_dtype, fail
from issm._host import is_concrete
from issm.models.lgssm import ParamsLGSSM, make_lgssm_params
from issm.models.trials import as_trials


class StartData:
    """The trials as NumPy arrays in float64, emissions standardised and gaps in time filled for the scores."""

    def __init__(self, emissions: Any, state_dim: int, inputs: Any, interventions: Any):
        _check_state_dim(state_dim)
        if not all(is_concrete(leaf) for leaf in jax.tree.leaves((emissions, inputs, interventions))):
            fail(
                "emissions",
                got="data that JAX traces",
                expected="concrete arrays",
                remedy="Make the start outside `jit` and `vmap`, and pass it to the fitter.",
            )
        self.dtype = common_float_dtype(emissions)
        emissions = as_float_array("emissions", emissions, self.dtype)
        emission_dim = emissions.shape[-1] if emissions.ndim else 0
        input_dim = np.shape(inputs)[-1] if inputs is not None and np.ndim(inputs) else 0
        self.trials = trials = as_trials(
            _blank(state_dim, emission_dim, input_dim, self.dtype), emissions, inputs, interventions
        )
        self.state_dim = state_dim
        raw = np.asarray(trials.emissions, np.float64)
        num_trials, num_timesteps, _ = raw.shape
        spread = lambda a: np.broadcast_to(np.asarray(a), (num_trials, num_timesteps, a.shape[-1]))  # noqa: E731
        self.inputs = spread(trials.plan.inputs).astype(np.float64)
        self.mask = spread(trials.plan.intervention.mask)
        self.value = spread(trials.plan.intervention.value).astype(np.float64)
        self.observed = ~np.isnan(raw)
        steps = int(self.observed.any(axis=2).sum())
        if steps < state_dim + 1:
            fail(
                "emissions",
                got=f"{steps} steps with an observation",
                expected=f"at least state_dim + 1 = {state_dim + 1}",
                remedy="Give more data, or fit fewer states.",
            )
        count = np.maximum(self.observed.sum(axis=(0, 1)), 1)
        self.center = np.where(self.observed, raw, 0.0).sum(axis=(0, 1)) / count
        centered = np.where(self.observed, raw - self.center, 0.0)
        # The two steps leave no trace of a large offset.
        shift = centered.sum(axis=(0, 1)) / count
        self.center, centered = self.center + shift, np.where(self.observed, centered - shift, 0.0)
        scale = np.sqrt((centered**2).sum(axis=(0, 1)) / count)
        typical = np.sqrt((scale**2).mean()) if (scale > 0).any() else 1.0
        moves = scale > 1e-12 * np.abs(np.where(self.observed, raw, 0.0)).max(axis=(0, 1))  # more than by rounding
        self.scale = np.where(moves, scale, typical)
        self.values = centered / self.scale
        self.filled = _fill_gaps(self.values, self.observed)
        # Steps past the last observation of a trial are no data.
        self.alive = np.flip(np.cumsum(np.flip(self.observed.any(axis=2), axis=1), axis=1), axis=1) > 0
        self.clamped = (self.mask & self.alive[:, :, None]).sum(axis=(0, 1)) >= 2


def _fill_gaps(values: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Straight lines between the observed steps of a channel; zero, its mean, where a trial has none."""
    filled = np.where(observed, values, 0.0)
    steps = np.arange(values.shape[1])
    for k, n in zip(*np.nonzero(~observed.all(axis=1)), strict=True):
        seen = observed[k, :, n]
        if seen.any():
            filled[k, :, n] = np.interp(steps, steps[seen], values[k, seen, n])
    return filled


def _blank(state_dim: int, emission_dim: int, input_dim: int, dtype: Any) -> ParamsLGSSM:
    """Parameters with the right shapes, for the checks at the door."""
    if emission_dim < 1:
        fail("emissions", got="no emission axis", expected="(num_timesteps, emission_dim)", remedy="Use `y[:, None]`.")
    return make_lgssm_params(
        initial_mean=np.zeros(state_dim, dtype),
        initial_cov=np.ones(state_dim, dtype),
        dynamics_weights=np.zeros((state_dim, state_dim), dtype),
        dynamics_cov=np.ones(state_dim, dtype),
        emissions_weights=np.zeros((emission_dim, state_dim), dtype),
        emissions_cov=np.ones(emission_dim, dtype),
        dynamics_input_weights=np.zeros((state_dim, input_dim), dtype),
        emissions_input_weights=np.zeros((emission_dim, input_dim), dtype),
    )


def _check_state_dim(state_dim: Any) -> None:
    if isinstance(state_dim, bool) or not isinstance(state_dim, (int, np.integer)) or state_dim < 1:
        fail("state_dim", got=repr(state_dim), expected="an integer of at least 1", remedy="Give the number of states.")
