"""Optional priors of `fit_em`, conjugate where they can be: the fit then maximises the posterior density."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from issm._check import as_float_array, check_finite, fail
from issm._host import is_concrete
from issm.fitting.regression import PatternStatistics, RowStatistics


class RegressionPrior(eqx.Module):
    r"""Matrix-normal prior on the coefficients of one block, and inverse-Wishart (inverse-gamma) prior on its covariance.

    $Θ \mid Σ \sim MN(M, Σ, Λ^{-1})$ and, for a full covariance, $Σ \sim IW(Ψ, ν)$; for a diagonal one each variance is
    $IG(ν/2, Ψ_{ii}/2)$. Λ counts like $\sum E[z z^\top]$ of data seen before, in the units of the regressors. The columns of Θ
    are `[weights, input_weights, bias]`; for the initial distribution there is one column, the mean.

    Attributes:
        mean: M, `(rows, columns)`, or one number.
        precision: Λ, `(columns, columns)`, its diagonal `(columns,)`, or one number for a multiple of the identity. Zero says
            nothing about a column.
        degrees: ν; None leaves the covariance without a prior.
        scale: Ψ, `(rows, rows)`, its diagonal `(rows,)`, or one number.

    References:
        Gelman et al. (2013), *Bayesian Data Analysis*, 3rd ed., sec. 3.6 and 14.2.

    Examples:
        >>> from issm import RegressionPrior
        >>> float(RegressionPrior(precision=2.0).precision)
        2.0
    """

    mean: Float[Array, "..."]
    precision: Float[Array, "..."]
    degrees: Float[Array, ""] | None
    scale: Float[Array, "..."]

    def __init__(self, mean: Any = 0.0, precision: Any = 0.0, degrees: Any = None, scale: Any = 0.0):
        self.mean = as_float_array("mean", mean)
        self.precision = as_float_array("precision", precision)
        self.degrees = None if degrees is None else as_float_array("degrees", degrees)
        self.scale = as_float_array("scale", scale)
        for name in ("mean", "precision", "scale"):
            check_finite(name, getattr(self, name))


class Priors(eqx.Module):
    r"""What `fit_em` may know before the data; None says nothing.

    Attributes:
        initial: Prior of the mean and covariance of the first state.
        dynamics: Prior of $[A, B, b]$ and Q.
        emissions: Prior of $[C, D, d]$ and R.
        input_l1: λ in the log density $-λ \sum_{ij} |B_{ij}|$, a sparsity prior on the input weights of the dynamics.

    References:
        Nejatbakhsh & Wang (2025), sec. 3, for the sparsity of B.

    Examples:
        >>> from issm import Priors, RegressionPrior
        >>> priors = Priors(dynamics=RegressionPrior(precision=1.0, degrees=4.0, scale=0.1))
        >>> priors.emissions is None
        True
    """

    initial: RegressionPrior | None = None
    dynamics: RegressionPrior | None = None
    emissions: RegressionPrior | None = None
    input_l1: float | Float[Array, ""] | None = None


class ResolvedPrior(eqx.Module):
    """A `RegressionPrior` with every array in full."""

    mean: Float[Array, "rows columns"]
    precision: Float[Array, "columns columns"]
    degrees: Float[Array, ""] | None
    scale: Float[Array, "rows rows"]

    def log_prob(self, coefficients: Array, cov: Array) -> Float[Array, ""]:
        """Log density of coefficients and covariance, up to a constant."""
        power, diagonal = self.power(cov.ndim == 1), cov.ndim == 1
        deviation = coefficients - self.mean
        second = deviation @ self.precision @ deviation.T + self.scale
        if diagonal:
            safe = jnp.where(power > 0, cov, 1.0)
            terms = power * jnp.log(safe) + jnp.where(jnp.diagonal(second) > 0, jnp.diagonal(second) / cov, 0.0)
            return -terms.sum() / 2
        factor = jnp.linalg.cholesky(cov)
        log_det = 2 * jnp.log(jnp.diagonal(factor)).sum()
        return -(power * log_det + jnp.trace(jnp.linalg.solve(cov, second))) / 2

    def add_to(
        self, stats: RowStatistics | PatternStatistics, coefficients: Array
    ) -> RowStatistics | PatternStatistics:
        """The sums with those of the data that the prior is equal to."""
        deviation = self.mean - coefficients
        cross = deviation @ self.precision
        second = cross @ deviation.T + self.scale
        count = self.power(isinstance(stats, RowStatistics))
        if isinstance(stats, RowStatistics):
            return RowStatistics(
                stats.gram + self.precision[None],
                stats.cross + cross,
                stats.second + jnp.diagonal(second),
                stats.count + count,
            )
        if stats.complete:
            return PatternStatistics(
                stats.free,
                stats.gram + self.precision[None],
                stats.cross + cross[None],
                stats.second + second[None],
                stats.count + count[None],
                complete=True,
            )
        append = lambda sums, one: jnp.concatenate([sums, one[None]])  # noqa: E731
        return PatternStatistics(
            append(stats.free, jnp.ones(stats.free.shape[1], bool)),
            append(stats.gram, self.precision),
            append(stats.cross, cross),
            append(stats.second, second),
            append(stats.count, count),
            complete=False,
        )

    def power(self, diagonal: bool) -> Float[Array, ""]:
        r"""Twice the power of $|Σ|^{-1}$ (of each variance) in the density."""
        rank = (jnp.linalg.eigvalsh(self.precision) > 0).sum().astype(self.mean.dtype)
        if self.degrees is None:
            return rank
        return rank + self.degrees + (2.0 if diagonal else self.mean.shape[0] + 1.0)


def resolve_prior(argument: str, prior: Any, rows: int, columns: int, dtype: Any) -> ResolvedPrior | None:
    """Give every array of a prior its full shape, or say what is wrong with it."""
    if prior is None:
        return None
    if not isinstance(prior, RegressionPrior):
        fail(argument, got=f"a {type(prior).__name__}", expected="a RegressionPrior or None", remedy="Build one.")
    mean = _full(f"{argument}.mean", prior.mean, (rows, columns), dtype)
    precision = _square(f"{argument}.precision", prior.precision, columns, dtype)
    scale = _square(f"{argument}.scale", prior.scale, rows, dtype)
    degrees = None if prior.degrees is None else prior.degrees.astype(dtype)
    if degrees is not None and is_concrete(degrees) and not float(degrees) >= 0:
        fail(f"{argument}.degrees", got=f"{float(degrees)}", expected="at least zero", remedy="It counts observations.")
    if degrees is None and is_concrete(scale) and np.asarray(scale).any():
        fail(
            f"{argument}.degrees",
            got="None beside a scale",
            expected="degrees of freedom of the covariance's prior",
            remedy="Pass `degrees`, or leave out `scale`.",
        )
    return ResolvedPrior(mean, precision, degrees, scale)


def _full(name: str, array: Array, shape: tuple, dtype: Any) -> Array:
    if array.ndim and array.shape != shape:
        fail(
            name, got=f"shape {tuple(array.shape)}", expected=f"{shape} or one number", remedy="See `RegressionPrior`."
        )
    return jnp.broadcast_to(array.astype(dtype), shape)


def _square(name: str, array: Array, size: int, dtype: Any) -> Array:
    if array.shape not in ((), (size,), (size, size)):
        fail(
            name,
            got=f"shape {tuple(array.shape)}",
            expected=f"({size}, {size}), ({size},) or one number",
            remedy="Columns are [weights, input_weights, bias]; the initial distribution has one.",
        )
    array = array.astype(dtype)
    matrix = array if array.ndim == 2 else jnp.diag(jnp.broadcast_to(array, (size,)))
    if is_concrete(matrix):
        values = np.asarray(matrix, dtype=np.float64)
        if np.abs(values - values.T).max() > 1e-5 * np.abs(values).max() or np.linalg.eigvalsh(
            values
        ).min() < -1e-10 * (np.abs(values).max()):
            fail(
                name,
                got="a matrix that is not symmetric and positive semidefinite",
                expected="one that is",
                remedy="Check its signs.",
            )
    return matrix
