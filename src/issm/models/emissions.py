r"""How emissions are distributed given the states: $y_{t,n} \sim p(y \mid \eta_{t,n})$ with predictor $\eta_t = f(x_t) + D u_t$.

Missing entries (NaN) add nothing to any density, score or information.
"""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from issm._check import as_float_array, check_covariance, check_variances, fail
from issm._linalg import noise_factor
from issm._types import PRNGKey

LOG_TWO_PI = math.log(2 * math.pi)


class Emission(eqx.Module):
    """What all emission models share; every array argument has leading axes of its own, usually `(num_timesteps, ...)`."""

    map: eqx.AbstractVar[Callable[[Array], Array]]
    input_weights: eqx.AbstractVar[Float[Array, "emission_dim input_dim"] | None]

    def predictors(
        self, states: Float[Array, "num_timesteps state_dim"], inputs: Float[Array, "num_timesteps input_dim"]
    ) -> Float[Array, "num_timesteps emission_dim"]:
        r"""$\eta_t = f(x_t) + D u_t$."""
        mapped = jax.vmap(self.map)(states)
        return mapped if self.input_weights is None else mapped + inputs @ self.input_weights.T

    @abc.abstractmethod
    def mean(self, predictors: Float[Array, "*axes emission_dim"]) -> Float[Array, "*axes emission_dim"]:
        r"""$E[y \mid \eta]$."""

    @abc.abstractmethod
    def log_prob(
        self, emissions: Float[Array, "*axes emission_dim"], predictors: Float[Array, "*axes emission_dim"]
    ) -> Float[Array, "*axes"]:
        r"""$\log p(y_t \mid \eta_t)$ over the observed entries."""

    @abc.abstractmethod
    def sample(
        self, key: PRNGKey, predictors: Float[Array, "*axes emission_dim"]
    ) -> Float[Array, "*axes emission_dim"]:
        r"""Draws from $p(y \mid \eta)$."""

    @abc.abstractmethod
    def local_information(
        self, emissions: Float[Array, "*axes emission_dim"], predictors: Float[Array, "*axes emission_dim"]
    ) -> tuple[Float[Array, "*axes emission_dim"], Float[Array, "..."]]:
        r"""Score $\partial \log p / \partial \eta$ and expected information, `(..., N)` if diagonal, else `(..., N, N)`."""

    def check(self, emissions: Array) -> None:
        """Refuse emissions that this model gives no probability to, where their values are known."""

    def check_sizes(self, emission_dim: int) -> None:
        """Refuse parameters that do not fit the number of emissions."""
        if self.input_weights is not None and self.input_weights.shape[:-1] != (emission_dim,):
            fail(
                "emission.input_weights",
                got=f"shape {tuple(self.input_weights.shape)}",
                expected=f"(emission_dim, input_dim) with emission_dim = {emission_dim}, what the map returns",
                remedy="One row for each emission.",
            )


class GaussianEmission(Emission):
    r"""$y_t = f(x_t) + D u_t + r_t,\ r_t \sim N(0, R)$.

    Attributes:
        map: f, from one state `(state_dim,)` to `(emission_dim,)`: `LinearMap`, `MLP` or any `equinox.Module`.
        cov: R, `(emission_dim, emission_dim)`, or its diagonal `(emission_dim,)`; positive definite.
        input_weights: D, `(emission_dim, input_dim)`; None: inputs do not reach the emissions.

    Raises:
        ValueError: If `cov` is no covariance.

    References:
        Nejatbakhsh & Wang (2025), sec. 2.

    Examples:
        >>> from issm import GaussianEmission, LinearMap
        >>> GaussianEmission(LinearMap([[1.0, 0.0], [0.0, 2.0]]), cov=[0.1, 0.1]).cov.shape
        (2,)
    """

    map: Callable[[Array], Array]
    cov: Float[Array, "emission_dim emission_dim"] | Float[Array, " emission_dim"]
    input_weights: Float[Array, "emission_dim input_dim"] | None

    def __init__(self, map: Callable[[Array], Array], cov: Any, input_weights: Any = None):
        cov = as_float_array("cov", cov)
        if cov.ndim not in (1, 2) or cov.shape != cov.shape[:1] * cov.ndim:
            fail(
                "cov",
                got=f"shape {tuple(cov.shape)}",
                expected="(emission_dim,) or (emission_dim, emission_dim)",
                remedy="Give one variance for each emission, or a full matrix.",
            )
        (check_variances if cov.ndim == 1 else check_covariance)("cov", cov, positive=True)
        self.map = map
        self.cov = cov
        self.input_weights = as_input_weights(input_weights, cov.dtype)

    def check_sizes(self, emission_dim: int) -> None:
        """Refuse parameters that do not fit the number of emissions."""
        super().check_sizes(emission_dim)
        check_length("emission.cov", self.cov, emission_dim)

    def mean(self, predictors: Float[Array, "*axes emission_dim"]) -> Float[Array, "*axes emission_dim"]:
        r"""$E[y \mid \eta] = \eta$."""
        return predictors

    def log_prob(
        self, emissions: Float[Array, "*axes emission_dim"], predictors: Float[Array, "*axes emission_dim"]
    ) -> Float[Array, "*axes"]:
        r"""$\log N(y_t; \eta_t, R)$ over the observed entries."""
        observed = ~jnp.isnan(emissions)
        residuals = jnp.where(observed, emissions - predictors, 0.0)
        count = observed.sum(axis=-1).astype(emissions.dtype)
        if self.cov.ndim == 1:
            quadratic = residuals**2 / self.cov[(None,) * (residuals.ndim - 1)]
            log_det = jnp.where(observed, jnp.log(self.cov)[(None,) * (residuals.ndim - 1)], 0.0).sum(axis=-1)
            return -(quadratic.sum(axis=-1) + log_det + count * LOG_TWO_PI) / 2
        factors = jnp.linalg.cholesky(self._observed_cov(observed))
        white = jax.scipy.linalg.solve_triangular(factors, residuals[..., None], lower=True)[..., 0]
        log_det = 2 * jnp.log(jnp.diagonal(factors, axis1=-2, axis2=-1)).sum(axis=-1)
        return -((white**2).sum(axis=-1) + log_det + count * LOG_TWO_PI) / 2

    def sample(
        self, key: PRNGKey, predictors: Float[Array, "*axes emission_dim"]
    ) -> Float[Array, "*axes emission_dim"]:
        r"""Draws from $N(\eta, R)$."""
        white = jax.random.normal(key, predictors.shape, predictors.dtype)
        return predictors + white @ noise_factor(self.cov, diagonal=self.cov.ndim == 1).T

    def local_information(
        self, emissions: Float[Array, "*axes emission_dim"], predictors: Float[Array, "*axes emission_dim"]
    ) -> tuple[Float[Array, "*axes emission_dim"], Float[Array, "..."]]:
        r"""$R^{-1} (y - \eta)$ and $R^{-1}$, over the observed entries."""
        observed = ~jnp.isnan(emissions)
        residuals = jnp.where(observed, emissions - predictors, 0.0)
        if self.cov.ndim == 1:
            precision = jnp.where(observed, 1 / self.cov[(None,) * (residuals.ndim - 1)], 0.0)
            return precision * residuals, precision
        eye = jnp.eye(residuals.shape[-1], dtype=residuals.dtype)[(None,) * (residuals.ndim - 1)]
        both = observed[..., :, None] & observed[..., None, :]
        precision = jnp.where(
            both, jnp.linalg.solve(self._observed_cov(observed), jnp.broadcast_to(eye, both.shape)), 0.0
        )
        return jnp.einsum("...ij,...j->...i", precision, residuals), precision

    def _observed_cov(self, observed: Array) -> Array:
        """A missing entry becomes an independent one of unit variance."""
        axes = (None,) * (observed.ndim - 1)
        eye = jnp.eye(self.cov.shape[-1], dtype=self.cov.dtype)
        return jnp.where(observed[..., :, None] & observed[..., None, :], self.cov[axes], eye[axes])


def as_input_weights(weights: Any, dtype: Any) -> Array | None:
    """D as an array, if there is one."""
    return None if weights is None else as_float_array("input_weights", weights, dtype)


def check_length(name: str, array: Array, emission_dim: int, *, one_for_all: bool = False) -> None:
    """Refuse a parameter that has not one entry for each emission."""
    if array.shape[-1] != emission_dim and not (one_for_all and array.shape[-1] == 1):
        fail(
            name,
            got=f"shape {tuple(array.shape)}",
            expected=f"one entry for each of the {emission_dim} emissions that the map returns",
            remedy="Change it, or the width of the map.",
        )
