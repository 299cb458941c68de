"""Maps from states to the predictor of the emissions: callable pytrees, one state vector in and one vector out."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from issm._check import as_float_array, check_finite, check_key, check_shape, common_float_dtype, fail
from issm._types import PRNGKey

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


class LinearMap(eqx.Module):
    r"""$f(x) = C x + d$.

    Attributes:
        weights: C, `(out_size, in_size)`.
        bias: d, `(out_size,)`; zero if not given.

    Raises:
        ValueError: If `weights` is not a matrix, `bias` has another length, or an entry is not finite.

    References:
        Särkkä & Svensson (2023), eq. 6.17.

    Examples:
        >>> from issm import LinearMap
        >>> import jax.numpy as jnp
        >>> LinearMap([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], [0.0, 0.0, 1.0])(jnp.array([1.0, 2.0])).tolist()
        [1.0, 3.0, 5.0]
    """

    weights: Float[Array, "out_size in_size"]
    bias: Float[Array, " out_size"]

    def __init__(self, weights: Any, bias: Any = None):
        dtype = common_float_dtype(weights, bias)
        weights = as_float_array("weights", weights, dtype)
        if weights.ndim != 2 or 0 in weights.shape:
            fail(
                "weights",
                got=f"shape {tuple(weights.shape)}",
                expected="(out_size, in_size)",
                remedy="One row for each output, even if there is only one.",
            )
        bias = jnp.zeros(weights.shape[0], dtype) if bias is None else as_float_array("bias", bias, dtype)
        check_shape("bias", bias, weights.shape[:1], ("out_size",), "One number for each row of `weights`.")
        check_finite("weights", weights)
        check_finite("bias", bias)
        self.weights = weights
        self.bias = bias

    @property
    def in_size(self) -> int:
        """Length of its argument."""
        return self.weights.shape[-1]

    def __call__(self, state: Float[Array, " in_size"]) -> Float[Array, " out_size"]:
        """The map at one point."""
        return self.weights @ state + self.bias


class MLP(eqx.Module):
    r"""Multilayer perceptron beside a linear map, $f(x) = C x + W_L\,\phi(W_{L-1} \cdots \phi(W_1 x + b_1) \cdots) + b_L$.

    It starts as the linear map $C x + b_L$: the weights of the last layer are zero, those of the others are drawn from
    $N(0, 1 / \text{fan-in})$, and so are those of C.

    Args:
        key: JAX random key.
        in_size: Length of its argument, the number of states D.
        out_size: Length of its value, the number of emissions N.
        widths: Numbers of units of the hidden layers.
        activation: $\phi$: "tanh", "softplus", "relu", "leaky_relu" (piecewise linear and invertible), "gelu" or "silu".
        skip: Whether it has the linear map C. Without it the last layer is drawn like the others.
        bias: Where $b_L$ starts, `(out_size,)`: the mean of the emissions, or its logarithm for counts. None: zero.
        dtype: Of all weights. None: JAX's default.

    Attributes:
        weights: $W_1 \dots W_L$.
        biases: $b_1 \dots b_L$.
        skip: C, `(out_size, in_size)`, or None.
        activation: Name of $\phi$.

    Raises:
        ValueError: If a size is below 1, there is no hidden layer, or the activation is unknown.

    References:
        Nejatbakhsh & Wang (2025), sec. 3; He et al. (2016), for the skip connection.

    Examples:
        >>> import jax
        >>> from issm import MLP
        >>> network = MLP(jax.random.key(0), in_size=2, out_size=3, widths=(50, 50))
        >>> network(jax.numpy.ones(2)).shape
        (3,)
    """

    weights: tuple[Float[Array, "?outs ?ins"], ...]
    biases: tuple[Float[Array, " ?outs"], ...]
    skip: Float[Array, "out_size in_size"] | None
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKey,
        in_size: int,
        out_size: int,
        widths: Sequence[int] = (50, 50),
        *,
        activation: str = "tanh",
        skip: bool = True,
        bias: Any = None,
        dtype: Any = None,
    ):
        check_key(key)
        sizes = (in_size, *widths, out_size)
        if len(sizes) < 3 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in sizes):
            fail(
                "in_size, widths, out_size",
                got=f"{in_size!r}, {tuple(widths)!r}, {out_size!r}",
                expected="integers of at least 1 and at least one hidden layer",
                remedy="A map without hidden layers is a `LinearMap`.",
            )
        if activation not in ACTIVATIONS:
            fail(
                "activation",
                got=repr(activation),
                expected=" or ".join(f'"{name}"' for name in ACTIVATIONS),
                remedy="Any other is a module of your own: whatever maps one state to one predictor will do.",
            )
        dtype = jnp.result_type(float) if dtype is None else dtype
        keys = jax.random.split(key, len(sizes))
        draw = lambda k, rows, columns: jax.random.normal(k, (rows, columns), dtype) / np.sqrt(columns).astype(dtype)  # noqa: E731
        weights = [draw(k, n, m) for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=False)]
        if skip:
            weights[-1] = jnp.zeros_like(weights[-1])
        last = jnp.zeros(out_size, dtype) if bias is None else as_float_array("bias", bias, dtype)
        check_shape("bias", last, (out_size,), ("out_size",), "One number for each output.")
        self.weights = tuple(weights)
        self.biases = (*(jnp.zeros(n, dtype) for n in sizes[1:-1]), last)
        self.skip = draw(keys[-1], out_size, in_size) if skip else None
        self.activation = activation

    @property
    def in_size(self) -> int:
        """Length of its argument."""
        return self.weights[0].shape[-1]

    def __call__(self, state: Float[Array, " in_size"]) -> Float[Array, " out_size"]:
        """The map at one point."""
        hidden = state
        for weights, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = ACTIVATIONS[self.activation](weights @ hidden + bias)
        value = self.weights[-1] @ hidden + self.biases[-1]
        return value if self.skip is None else value + self.skip @ state
