r"""Whether Markov chains have mixed, and how many independent draws they are worth.

With n draws in each of m chains (halves of those that were run), W the mean variance within and B/n the variance of the chain
means, $\widehat{var}^+ = \frac{n-1}{n} W + \frac{B}{n}$,

$$\hat R = \sqrt{\widehat{var}^+ / W}, \qquad n_{eff} = \frac{m n}{1 + 2 \sum_t \hat ρ_t}, \qquad
\hat ρ_t = 1 - \frac{W - \overline{acov}_t}{\widehat{var}^+}.$$
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def split_r_hat(chains: Float[Array, "num_chains num_samples *shape"]) -> Float[Array, "*shape"]:
    """Split R-hat of every entry; one for an entry that never moves."""
    within, total = _variances(_halves(chains))
    return jnp.where(total == 0, 1.0, jnp.sqrt(total / within))


def effective_sample_size(chains: Float[Array, "num_chains num_samples *shape"]) -> Float[Array, "*shape"]:
    """Number of independent draws that tell as much about the mean of every entry; all, for one that never moves.

    The autocorrelations are summed in pairs, as long as these are positive, each pair being at most the one before.
    """
    halves = _halves(chains)
    num_chains, length = halves.shape[:2]
    within, total = _variances(halves)
    still = total == 0
    centered = halves - halves.mean(axis=1, keepdims=True)
    spectrum = jnp.fft.rfft(centered, n=2 * length, axis=1)
    covariances = jnp.fft.irfft(jnp.abs(spectrum) ** 2, n=2 * length, axis=1)[:, :length] / length
    rho = 1 - (within[None] - covariances.mean(axis=0)) / jnp.where(still, 1.0, total)[None]
    rho = rho.at[0].set(1.0)
    pairs = rho[: length - length % 2].reshape(length // 2, 2, *rho.shape[1:]).sum(axis=1)
    positive = jnp.cumprod((pairs > 0).astype(pairs.dtype), axis=0)
    time = 2 * (jax.lax.cummin(pairs, axis=0) * positive).sum(axis=0) - 1
    size = num_chains * length
    return jnp.where(still, size, size / jnp.maximum(time, 1 / jnp.log10(jnp.asarray(size, time.dtype))))


def _halves(chains: Any) -> Array:
    chains = chains - chains[:1, :1]  # an entry that never moves is then exactly zero
    half = chains.shape[1] // 2
    return jnp.concatenate([chains[:, :half], chains[:, -half:]])


def _variances(chains: Array) -> tuple[Array, Array]:
    """W and the estimate of the variance that also counts the spread of the means."""
    length = chains.shape[1]
    within = chains.var(axis=1, ddof=1).mean(axis=0)
    return within, within * (length - 1) / length + chains.mean(axis=1).var(axis=0, ddof=1)
