r"""The twin network: one trial in two worlds that share every draw of noise and differ only in their clamps.

The second world is carried as its difference $\delta_t = x'_t - x_t$ from the first. What the worlds have in common then
cancels before it is computed: equal plans give a difference of exactly zero.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from issm._linalg import safe_sqrt
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import Transitions, free_transitions


def twin_transitions(
    params: ParamsLGSSM,
    inputs: Float[Array, "num_timesteps input_dim"],
    plan: Intervention,
    other: Intervention,
) -> Transitions:
    r"""The transitions of $[x; \delta]$, where x moves under `plan` and $x' = x + \delta$ under `other` (model.md, section 5).

    With the free dynamics $f_t = A x_{t-1} + a_t + w_t$, $M = \mathrm{diag}(1 - c)$ and $M' = \mathrm{diag}(1 - c')$:
    $x_t = M f_t + c \odot (v + \sqrt s \varepsilon_t)$ and
    $\delta_t = M' A \delta_{t-1} + (M' - M) f_t + (c' \odot v' - c \odot v) + (c' \sqrt{s'} - c \sqrt s) \odot \varepsilon_t$.
    """
    free = free_transitions(params, inputs)
    dtype = free.shift.dtype
    kept, other_kept = (~plan.mask).astype(dtype), (~other.mask).astype(dtype)
    released = other_kept - kept  # +1: freed in the other world, -1: clamped there only
    rows = jnp.concatenate([kept, released], axis=1)
    clamp_noise, other_noise = safe_sqrt(plan.variance), safe_sqrt(other.variance)
    noise_rows = jnp.concatenate([clamp_noise, other_noise - clamp_noise], axis=1)
    state_dim = kept.shape[1]
    same_state = jnp.tile(jnp.eye(state_dim, dtype=dtype), (2, 2))[None]
    return Transitions(
        weights=jnp.concatenate(
            [
                jnp.concatenate([kept[:, :, None] * free.weights, jnp.zeros_like(free.weights)], axis=2),
                jnp.concatenate([released[:, :, None] * free.weights, other_kept[:, :, None] * free.weights], axis=2),
            ],
            axis=1,
        ),
        shift=jnp.concatenate(
            [kept * free.shift + plan.value, released * free.shift + other.value - plan.value], axis=1
        ),
        cov=rows[:, :, None] * rows[:, None, :] * jnp.tile(free.cov, (1, 2, 2))
        + noise_rows[:, :, None] * noise_rows[:, None, :] * same_state,
    )
