r"""Emissions that are counts or events: $y_{t,n} \sim p(y \mid \eta_{t,n})$, independent given the predictor $\eta_t = f(x_t) + D u_t$."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array, Float

from issm._check import as_float_array, fail
from issm._host import is_concrete
from issm._types import PRNGKey
from issm.models.emissions import Emission, as_input_weights, check_length

FAR_BELOW_ZERO = -15.0  # below it, the softplus is the exponential to single precision and better


class CountEmission(Emission):
    r"""What models of counts with mean $\mu = \Delta\,\rho(\eta)$ share."""

    exposure: eqx.AbstractVar[Float[Array, " #emission_dim"]]
    link: eqx.AbstractVar[str]

    def check(self, emissions: Array) -> None:
        """Refuse what is no count."""
        _check_counts(emissions)

    def check_sizes(self, emission_dim: int) -> None:
        """Refuse parameters that do not fit the number of emissions."""
        super().check_sizes(emission_dim)
        check_length("emission.exposure", self.exposure, emission_dim, one_for_all=True)

    def mean(self, predictors: Float[Array, "*axes emission_dim"]) -> Float[Array, "*axes emission_dim"]:
        r"""$\mu = \Delta\,\rho(\eta)$."""
        return jnp.exp(self._log_mean(predictors))

    def _log_mean(self, predictors: Array) -> Array:
        return _log_link(self.link, predictors) + jnp.log(self.exposure)[(None,) * (predictors.ndim - 1)]


class PoissonEmission(CountEmission):
    r"""Counts $y_{t,n} \sim \mathrm{Poisson}(\Delta_n\,\rho(\eta_{t,n}))$ with a rate $\rho$ above zero.

    Attributes:
        map: f, from one state `(state_dim,)` to `(emission_dim,)`.
        exposure: $\Delta$, the bin width, or any number that rates are multiplied with: one for all or `(emission_dim,)`; it is
            never trained.
        input_weights: D, `(emission_dim, input_dim)`; None: inputs do not reach the emissions.
        link: $\rho$: "softplus" or "exp".

    Raises:
        ValueError: If an exposure is not positive or the link is unknown.

    References:
        McCullagh & Nelder (1989), ch. 6; Nejatbakhsh & Wang (2025), sec. 3.

    Examples:
        >>> import jax.numpy as jnp
        >>> from issm import LinearMap, PoissonEmission
        >>> spikes = PoissonEmission(LinearMap([[1.0]]), exposure=0.01, link="exp")
        >>> round(float(spikes.mean(jnp.zeros(1))[0]), 6)
        0.01
    """

    map: Callable[[Array], Array]
    exposure: Float[Array, " #emission_dim"]
    input_weights: Float[Array, "emission_dim input_dim"] | None
    link: str = eqx.field(static=True)

    def __init__(
        self, map: Callable[[Array], Array], exposure: Any = 1.0, *, link: str = "softplus", input_weights: Any = None
    ):
        self.map = map
        self.exposure = _as_positive("exposure", exposure)
        self.input_weights = as_input_weights(input_weights, self.exposure.dtype)
        self.link = _as_link(link)

    def log_prob(
        self, emissions: Float[Array, "*axes emission_dim"], predictors: Float[Array, "*axes emission_dim"]
    ) -> Float[Array, "*axes"]:
        r"""$\sum_n y \log \mu - \mu - \log y!$ over the observed entries."""
        observed = ~jnp.isnan(emissions)
        counts, log_mean = jnp.where(observed, emissions, 0.0), self._log_mean(predictors)
        return jnp.where(observed, counts * log_mean - jnp.exp(log_mean) - gammaln(counts + 1), 0.0).sum(axis=-1)

    def sample(
        self, key: PRNGKey, predictors: Float[Array, "*axes emission_dim"]
    ) -> Float[Array, "*axes emission_dim"]:
        """Counts, as floating-point numbers."""
        return _sample_poisson(key, self.mean(predictors))

    def local_information(
        self, emissions: Float[Array, "*axes emission_dim"], predictors: Float[Array, "*axes emission_dim"]
    ) -> tuple[Float[Array, "*axes emission_dim"], Float[Array, "..."]]:
        r"""$(y - \mu)\,\kappa$ and $\mu \kappa^2$ with $\kappa = \partial \log \mu / \partial \eta$."""
        observed = ~jnp.isnan(emissions)
        mean, slope = self.mean(predictors), _log_link_slope(self.link, predictors)
        score = jnp.where(observed, emissions - mean, 0.0) * slope
        return score, jnp.where(observed, mean * slope**2, 0.0)


class NegativeBinomialEmission(CountEmission):
    r"""Counts with mean $\mu = \Delta\,\rho(\eta)$ and variance $\mu + \mu^2 / r$: a Poisson whose rate is drawn from a gamma.

    Attributes:
        map: f, from one state `(state_dim,)` to `(emission_dim,)`.
        concentration: r, `(emission_dim,)`; the larger, the closer to a Poisson.
        exposure: $\Delta$, as in `PoissonEmission`; never trained.
        input_weights: D, `(emission_dim, input_dim)`; None: inputs do not reach the emissions.
        link: $\rho$: "softplus" or "exp".

    Raises:
        ValueError: If a concentration or an exposure is not positive or the link is unknown.

    References:
        McCullagh & Nelder (1989), sec. 6.2.3.

    Examples:
        >>> from issm import LinearMap, NegativeBinomialEmission
        >>> NegativeBinomialEmission(LinearMap([[1.0], [2.0]]), concentration=[5.0, 5.0]).link
        'softplus'
    """

    map: Callable[[Array], Array]
    concentration: Float[Array, " emission_dim"]
    exposure: Float[Array, " #emission_dim"]
    input_weights: Float[Array, "emission_dim input_dim"] | None
    link: str = eqx.field(static=True)

    def __init__(
        self,
        map: Callable[[Array], Array],
        concentration: Any,
        exposure: Any = 1.0,
        *,
        link: str = "softplus",
        input_weights: Any = None,
    ):
        self.map = map
        self.concentration = _as_positive("concentration", concentration)
        self.exposure = _as_positive("exposure", exposure, self.concentration.dtype)
        self.input_weights = as_input_weights(input_weights, self.concentration.dtype)
        self.link = _as_link(link)

    def check_sizes(self, emission_dim: int) -> None:
        """Refuse parameters that do not fit the number of emissions."""
        super().check_sizes(emission_dim)
        check_length("emission.concentration", self.concentration, emission_dim)

    def log_prob(
        self, emissions: Float[Array, "*axes emission_dim"], predictors: Float[Array, "*axes emission_dim"]
    ) -> Float[Array, "*axes"]:
        r"""$\log \Gamma(y+r) - \log \Gamma(r) - \log y! + y \log\frac{\mu}{\mu + r} - r \log(1 + \mu/r)$, summed."""
        observed = ~jnp.isnan(emissions)
        counts, log_mean = jnp.where(observed, emissions, 0.0), self._log_mean(predictors)
        r = self.concentration[(None,) * (predictors.ndim - 1)]
        log_odds = log_mean - jnp.log(r)  # log mu / r
        combinations = gammaln(counts + r) - gammaln(r) - gammaln(counts + 1)
        value = combinations - counts * jax.nn.softplus(-log_odds) - r * jax.nn.softplus(log_odds)
        return jnp.where(observed, value, 0.0).sum(axis=-1)

    def sample(
        self, key: PRNGKey, predictors: Float[Array, "*axes emission_dim"]
    ) -> Float[Array, "*axes emission_dim"]:
        """Counts, as floating-point numbers."""
        gamma_key, poisson_key = jax.random.split(key)
        r = jnp.broadcast_to(self.concentration[(None,) * (predictors.ndim - 1)], predictors.shape)
        return _sample_poisson(poisson_key, self.mean(predictors) * jax.random.gamma(gamma_key, r) / r)

    def local_information(
        self, emissions: Float[Array, "*axes emission_dim"], predictors: Float[Array, "*axes emission_dim"]
    ) -> tuple[Float[Array, "*axes emission_dim"], Float[Array, "..."]]:
        r"""$(y - \mu)\,\kappa / (1 + \mu/r)$ and $\mu \kappa^2 / (1 + \mu/r)$ with $\kappa = \partial \log \mu / \partial \eta$."""
        observed = ~jnp.isnan(emissions)
        mean, slope = self.mean(predictors), _log_link_slope(self.link, predictors)
        share = 1 / (1 + mean / self.concentration[(None,) * (predictors.ndim - 1)])
        score = jnp.where(observed, emissions - mean, 0.0) * slope * share
        return score, jnp.where(observed, mean * slope**2 * share, 0.0)


class BernoulliEmission(Emission):
    r"""Binary emissions, $P(y_{t,n} = 1) = 1 / (1 + e^{-\eta_{t,n}})$.

    Attributes:
        map: f, from one state `(state_dim,)` to log odds `(emission_dim,)`.
        input_weights: D, `(emission_dim, input_dim)`; None: inputs do not reach the emissions.

    References:
        McCullagh & Nelder (1989), ch. 4.

    Examples:
        >>> import jax.numpy as jnp
        >>> from issm import BernoulliEmission, LinearMap
        >>> BernoulliEmission(LinearMap([[1.0]])).mean(jnp.zeros(1)).tolist()
        [0.5]
    """

    map: Callable[[Array], Array]
    input_weights: Float[Array, "emission_dim input_dim"] | None

    def __init__(self, map: Callable[[Array], Array], input_weights: Any = None):
        self.map = map
        self.input_weights = as_input_weights(input_weights, None)

    def check(self, emissions: Array) -> None:
        """Refuse what is neither zero nor one."""
        _refuse(emissions, lambda y: (y != 0) & (y != 1), "neither 0 nor 1", "0, 1, or NaN where missing")

    def mean(self, predictors: Float[Array, "*axes emission_dim"]) -> Float[Array, "*axes emission_dim"]:
        r"""$P(y = 1)$."""
        return jax.nn.sigmoid(predictors)

    def log_prob(
        self, emissions: Float[Array, "*axes emission_dim"], predictors: Float[Array, "*axes emission_dim"]
    ) -> Float[Array, "*axes"]:
        r"""$\sum_n y \eta - \log(1 + e^\eta)$ over the observed entries."""
        observed = ~jnp.isnan(emissions)
        ones = jnp.where(observed, emissions, 0.0)
        return jnp.where(observed, ones * predictors - jax.nn.softplus(predictors), 0.0).sum(axis=-1)

    def sample(
        self, key: PRNGKey, predictors: Float[Array, "*axes emission_dim"]
    ) -> Float[Array, "*axes emission_dim"]:
        """Zeros and ones, as floating-point numbers."""
        return jax.random.bernoulli(key, self.mean(predictors)).astype(predictors.dtype)

    def local_information(
        self, emissions: Float[Array, "*axes emission_dim"], predictors: Float[Array, "*axes emission_dim"]
    ) -> tuple[Float[Array, "*axes emission_dim"], Float[Array, "..."]]:
        r"""$y - p$ and $p (1 - p)$."""
        observed = ~jnp.isnan(emissions)
        mean = self.mean(predictors)
        score = jnp.where(observed, emissions - mean, 0.0)
        return score, jnp.where(observed, mean * jax.nn.sigmoid(-predictors), 0.0)


def _log_link(link: str, predictors: Array) -> Array:
    r"""$\log \rho(\eta)$; the softplus does not underflow."""
    if link == "exp":
        return predictors
    low = predictors < FAR_BELOW_ZERO
    return jnp.where(low, predictors, jnp.log(jax.nn.softplus(jnp.where(low, 0.0, predictors))))


def _log_link_slope(link: str, predictors: Array) -> Array:
    r"""$\partial \log \rho / \partial \eta$."""
    if link == "exp":
        return jnp.ones_like(predictors)
    low = predictors < FAR_BELOW_ZERO
    safe = jnp.where(low, 0.0, predictors)
    return jnp.where(low, 1.0, jax.nn.sigmoid(safe) / jax.nn.softplus(safe))


def _sample_poisson(key: PRNGKey, mean: Array) -> Array:
    return jax.random.poisson(key, jax.lax.stop_gradient(mean)).astype(mean.dtype)


def _as_link(link: str) -> str:
    if link not in ("softplus", "exp"):
        fail("link", got=repr(link), expected='"softplus" or "exp"', remedy="Both keep rates above zero.")
    return link


def _as_positive(argument: str, value: Any, dtype: Any = None) -> Array:
    array = jnp.atleast_1d(as_float_array(argument, value, dtype))
    if is_concrete(array) and not (np.isfinite(np.asarray(array)) & (np.asarray(array) > 0)).all():
        fail(argument, got="a number that is not positive", expected="positive numbers", remedy="Check its units.")
    return array


def _check_counts(emissions: Array) -> None:
    wanted = "counts 0, 1, 2, ..., or NaN where missing"
    _refuse(emissions, lambda y: y < 0, "below zero", wanted)
    _refuse(emissions, lambda y: y != np.round(y), "not whole", wanted)


def _refuse(emissions: Array, bad: Callable[[np.ndarray], np.ndarray], what: str, expected: str) -> None:
    if not is_concrete(emissions):
        return
    values = np.asarray(emissions)
    values = values[~np.isnan(values)]
    wrong = values[bad(values)]
    if wrong.size:
        fail(
            "emissions",
            got=f"{wrong.size} entries that are {what}, the first {wrong[0]:.6g}",
            expected=expected,
            remedy="Pass raw counts, not rates or smoothed counts; or use `GaussianEmission`.",
        )
