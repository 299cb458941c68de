"""Aliases shared by every floor of the library."""

from typing import Any

from jaxtyping import Array, Float, Key, UInt32

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
"""One JAX random key, new style (`jax.random.key`) or old (`jax.random.PRNGKey`)."""

Scalar = Float[Array, ""]

ArrayLike = Any
"""What users hand in: a JAX or NumPy array, a nested list or a number. `_check` turns it into an array or says why not."""
