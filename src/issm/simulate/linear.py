"""Random linear Gaussian systems that stay stable whichever of their states are clamped."""

from typing import Any

import jax
import jax.numpy as jnp

from issm._check import as_float_array, fail
from issm._host import is_concrete
from issm._types import PRNGKey
from issm.models.lgssm import ParamsLGSSM, make_lgssm_params
from issm.simulate.systems import orthogonal_lift


def random_clamped_lgssm(
    key: PRNGKey,
    state_dim: int,
    emission_dim: int,
    *,
    norm: Any = 0.95,
    process_scale: float = 0.1,
    emission_scale: float = 0.1,
) -> ParamsLGSSM:
    r"""A random linear Gaussian system that is stable under every clamp.

    $A = U\,\mathrm{diag}(\sigma) V^\top$ with U and V random orthogonal and singular values $\sigma$ drawn between half of
    `norm` and `norm`, the largest being `norm`. Clamping some states leaves a principal submatrix of A, whose spectral radius
    is at most its largest singular value and so at most `norm`.

    Args:
        key: JAX random key.
        state_dim: Number of states D, at least 1.
        emission_dim: Number of emissions N, at least 1.
        norm: Bound below one on the spectral radius of A and of all its clamped subsystems.
        process_scale: Standard deviation of the process noise, in the units of the states.
        emission_scale: Standard deviation of the emission noise, in the units of the emissions.

    Returns:
        Parameters with a standard normal initial distribution, no biases, no inputs, and diagonal covariances. The emission
        weights are standard normal, divided by $\sqrt{D}$.

    Raises:
        ValueError: If a size is below 1 or `norm` is not between zero and one.

    References:
        Horn & Johnson (2013), *Matrix Analysis*, thms. 5.6.9 and 7.3.9 (interlacing of singular values).

    Examples:
        >>> import jax
        >>> from issm.simulate import random_clamped_lgssm
        >>> params = random_clamped_lgssm(jax.random.key(0), 3, 10)
        >>> params.state_dim, params.emission_dim
        (3, 10)
    """
    norm = as_float_array("norm", norm)
    if is_concrete(norm) and not 0 < float(norm) < 1:
        fail("norm", got=f"{float(norm):.6g}", expected="a number between 0 and 1", remedy="At 1 states do not settle.")
    if state_dim < 1 or emission_dim < 1:
        fail(
            "state_dim, emission_dim",
            got=f"{state_dim} and {emission_dim}",
            expected="integers of at least 1",
            remedy="Sizes are counts.",
        )
    left_key, right_key, value_key, emission_key = jax.random.split(key, 4)
    values = jax.random.uniform(value_key, (state_dim,), norm.dtype, 0.5, 1.0).at[0].set(1.0) * norm
    left, right = (orthogonal_lift(k, state_dim, state_dim).astype(norm.dtype) for k in (left_key, right_key))
    scale = jnp.sqrt(jnp.asarray(state_dim, norm.dtype))
    return make_lgssm_params(
        initial_mean=jnp.zeros(state_dim, norm.dtype),
        initial_cov=jnp.ones(state_dim, norm.dtype),
        dynamics_weights=left * values[None, :] @ right.T,
        dynamics_cov=jnp.full(state_dim, process_scale**2, norm.dtype),
        emissions_weights=jax.random.normal(emission_key, (emission_dim, state_dim), norm.dtype) / scale,
        emissions_cov=jnp.full(emission_dim, emission_scale**2, norm.dtype),
    )
