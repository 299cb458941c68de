"""Standard errors of the few parameters that a model leaves free."""

import math
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import issm
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM

LARGEST = 60


@dataclass
class Coefficient:
    """One free number with its standard errors.

    Attributes:
        field: The parameter's name in a configuration.
        name: Name of the number.
        value: Its estimate.
        se_information: From the curvature of the log-likelihood; variances at zero are taken as known.
        se_scores: From the outer product of the per-step scores (Berndt, Hall, Hall & Hausman), all free numbers together.
    """

    field: str
    name: str
    value: float
    se_information: float
    se_scores: float


def standard_errors(
    params: ParamsLGSSM,
    free: ParamsLGSSM,
    emissions: np.ndarray,
    inputs: np.ndarray | None,
    clamps: Intervention | None,
    names: dict[str, list[str]],
) -> list[Coefficient]:
    """Estimates and standard errors of every free number.

    Raises:
        ValueError: If there are too many of them.
    """
    paths = [
        (block, name)
        for block in ("initial", "dynamics", "emissions")
        for name in vars(getattr(params, block))
        if getattr(getattr(free, block), name)
    ]
    where = lambda tree: tuple(getattr(getattr(tree, block), name) for block, name in paths)  # noqa: E731
    values, unravel = ravel_pytree(where(params))
    if len(values) > LARGEST:
        raise ValueError(f"standard_errors: got {len(values)} free numbers; expected at most {LARGEST}. Freeze some.")

    def step_log_probs(flat: jax.Array) -> jax.Array:
        model = eqx.tree_at(where, params, unravel(flat))
        return issm.lgssm_filter(model, emissions, inputs, interventions=clamps).logliks.ravel()

    scores = np.asarray(jax.jit(jax.jacfwd(step_log_probs))(values))
    information = -np.asarray(jax.jit(jax.hessian(lambda flat: step_log_probs(flat).sum()))(values))
    labels = [
        label for path in paths for label in _labels(*path, getattr(getattr(params, path[0]), path[1]).shape, names)
    ]
    inside = np.array([not (field.endswith("cov") and v == 0) for (field, _), v in zip(labels, values, strict=True)])
    se_information = np.full(len(values), math.nan)
    se_information[inside] = _root_diagonal_of_inverse(information[np.ix_(inside, inside)])
    se_scores = _root_diagonal_of_inverse(scores.T @ scores)
    return [
        Coefficient(field, name, float(value), float(a), float(b))
        for (field, name), value, a, b in zip(labels, values, se_information, se_scores, strict=True)
    ]


def _labels(block: str, name: str, shape: tuple[int, ...], names: dict[str, list[str]]) -> list[tuple[str, str]]:
    field = f"{block}_{name}"
    words: dict[str, Any] = {
        "emissions_input_weights": (names["emissions"], names["inputs"]),
        "dynamics_input_weights": ([f"state {i + 1}" for i in range(shape[0])], names["inputs"]),
    }
    if field in words:
        rows, columns = words[field]
        return [(field, f"effect of {column} on {row}") for row in rows for column in columns]
    indices = list(np.ndindex(*shape))
    return [(field, field if len(indices) == 1 else f"{field}{list(index)}") for index in indices]


def _root_diagonal_of_inverse(matrix: np.ndarray) -> np.ndarray:
    scale = 1 / np.sqrt(np.maximum(np.abs(np.diagonal(matrix)), np.finfo(float).tiny))
    try:
        inverse = np.linalg.inv(matrix * scale[:, None] * scale[None, :])
    except np.linalg.LinAlgError:
        return np.full(len(matrix), math.nan)
    variances = np.diagonal(inverse) * scale**2
    return np.where(variances > 0, np.sqrt(np.abs(variances)), math.nan)
