"""Which states are clamped at which steps: where noise is correlated, rows are learned by pattern of their masks."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from issm._host import is_concrete, on_host, to_device
from issm.models.fields import is_diagonal
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials


class MaskPatterns(eqx.Module):
    """The different clamp masks of the data, and which of them holds at each step.

    Attributes:
        free: The unclamped states of each pattern, `(patterns, state_dim)`.
        index: Pattern at each step, `(*trials, num_timesteps)`, or at the first step alone, `(*trials,)`.
        unclamped: Whether no state is clamped anywhere.
    """

    free: Bool[Array, "patterns state_dim"]
    index: Int[Array, "*steps"]
    unclamped: bool = eqx.field(static=True)


class Patterns(eqx.Module):
    """Mask patterns of the first step and of all later ones."""

    initial: MaskPatterns
    dynamics: MaskPatterns


def find_patterns(params: ParamsLGSSM, trials: Trials) -> Patterns:
    """Group the steps by their clamp mask, where the noise is correlated; elsewhere rows are learned one by one."""
    _, (mask,) = on_host(trials.plan.intervention.mask)
    full_initial, full_dynamics = not is_diagonal(params.initial.cov), not is_diagonal(params.dynamics.cov)
    return Patterns(_group(mask[..., 0, :], full_initial), _group(mask, full_dynamics))


def _group(mask: Bool[Array | np.ndarray, "*steps state_dim"], correlated: bool) -> MaskPatterns:
    state_dim, steps = mask.shape[-1], mask.shape[:-1]
    unclamped = is_concrete(mask) and not mask.any()
    if unclamped or not correlated:
        free, index = np.ones((1, state_dim), bool), np.zeros(steps, np.int32)
        return MaskPatterns(to_device(free), to_device(index), unclamped)
    if is_concrete(mask):
        table, index = np.unique(mask.reshape(-1, state_dim), axis=0, return_inverse=True)
        return MaskPatterns(to_device(~table), to_device(index.reshape(steps), np.int32), False)
    mask, num_steps = jnp.asarray(mask), int(np.prod(steps))
    if 2**state_dim <= num_steps:  # every subset has a place in the table
        places = 2 ** np.arange(state_dim)
        table = (np.arange(2**state_dim)[:, None] & places[None]) > 0
        index = mask.astype(jnp.int32) @ jnp.asarray(places, jnp.int32)
        return MaskPatterns(jnp.asarray(~table), index, False)
    return MaskPatterns(~mask.reshape(-1, state_dim), jnp.arange(num_steps, dtype=jnp.int32).reshape(steps), False)
