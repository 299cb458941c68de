"""How well a prediction or an estimate agrees with the truth."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from issm._check import as_float_array, common_float_dtype, fail


def r2(truth: Any, prediction: Any, *, pooled: bool = True) -> Float[Array, "*variables"]:
    r"""Share of variance explained, $R^2 = 1 - \sum (y - \hat y)^2 / \sum (y - \bar y)^2$.

    Means are taken for each variable (the last axis) over all other axes. One is perfect, zero is as good as the mean, and a
    prediction can be worse than that without bound.

    Args:
        truth: y, `(..., num_variables)`; NaN entries are left out.
        prediction: $\hat y$, same shape.
        pooled: Whether the sums run over all variables too, which weighs them by their variance.

    Returns:
        One number; `(num_variables,)` if not pooled. NaN where the truth does not vary.

    Raises:
        ValueError: If the shapes differ.

    References:
        Nejatbakhsh & Wang (2025), sec. 4.

    Examples:
        >>> from issm.metrics import r2
        >>> float(r2([[0.0], [1.0], [2.0]], [[0.0], [1.0], [1.0]]))
        0.5
    """
    dtype = common_float_dtype(truth, prediction)
    truth, prediction = as_float_array("truth", truth, dtype), as_float_array("prediction", prediction, dtype)
    if truth.shape != prediction.shape:
        fail(
            "prediction",
            got=f"shape {tuple(prediction.shape)}",
            expected=f"the shape of `truth`, {tuple(truth.shape)}",
            remedy="The last axis holds the variables.",
        )
    axes = tuple(range(truth.ndim - 1))
    seen = ~jnp.isnan(truth)
    values = jnp.where(seen, truth, 0.0)
    mean = values.sum(axes, keepdims=True) / jnp.maximum(seen.sum(axes, keepdims=True), 1).astype(dtype)
    summed = None if pooled else axes
    residual = jnp.where(seen, (values - prediction) ** 2, 0.0).sum(summed)
    total = jnp.where(seen, (values - mean) ** 2, 0.0).sum(summed)
    return jnp.where(total > 0, 1 - residual / jnp.where(total > 0, total, 1.0), jnp.nan)


def relative_error(estimate: Any, truth: Any) -> Float[Array, ""]:
    r"""Frobenius error relative to the truth, $\lVert \hat A - A \rVert_F / \lVert A \rVert_F$.

    Args:
        estimate: $\hat A$, any shape.
        truth: A, same shape, not all zero.

    Returns:
        One number, without unit; infinite where the truth is zero and the estimate is not.

    Raises:
        ValueError: If the shapes differ.

    References:
        Golub & Van Loan (2013), *Matrix Computations*, sec. 2.3.

    Examples:
        >>> from issm.metrics import relative_error
        >>> float(relative_error([[1.0, 0.0], [0.0, 0.5]], [[1.0, 0.0], [0.0, 0.0]]))
        0.5
    """
    dtype = common_float_dtype(estimate, truth)
    estimate, truth = as_float_array("estimate", estimate, dtype), as_float_array("truth", truth, dtype)
    if estimate.shape != truth.shape:
        fail(
            "estimate",
            got=f"shape {tuple(estimate.shape)}",
            expected=f"the shape of `truth`, {tuple(truth.shape)}",
            remedy="Compare like with like.",
        )
    return jnp.linalg.norm((estimate - truth).ravel()) / jnp.linalg.norm(truth.ravel())
