"""Parameters of the linear Gaussian state-space model under clamps."""

from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float

from issm._check import (
    as_float_array,
    as_floats,
    check_covariance,
    check_finite,
    check_variances,
    common_float_dtype,
    fail,
)
from issm._host import to_device
from issm._once import look_once
from issm.models.fields import TimeVarying, is_diagonal, values_of


class ParamsLGSSMInitial(eqx.Module):
    r"""Initial distribution $x_0 \sim N(m, S)$.

    Attributes:
        mean: m, `(state_dim,)`.
        cov: S, `(state_dim, state_dim)`, or its diagonal `(state_dim,)`; may be singular.

    References:
        Särkkä & Svensson (2023), eq. 6.17.

    Examples:
        >>> import jax.numpy as jnp
        >>> from issm import ParamsLGSSMInitial
        >>> ParamsLGSSMInitial(jnp.zeros(2), jnp.ones(2)).mean.shape
        (2,)
    """

    mean: Float[Array, " state_dim"]
    cov: Float[Array, "state_dim state_dim"] | Float[Array, " state_dim"]


class ParamsLGSSMDynamics(eqx.Module):
    r"""Linear dynamics $x_t = A x_{t-1} + B u_t + b + w_t,\ w_t \sim N(0, Q)$.

    Attributes:
        weights: A, `(state_dim, state_dim)`.
        bias: b, `(state_dim,)`.
        input_weights: B, `(state_dim, input_dim)`.
        cov: Q, `(state_dim, state_dim)`, or its diagonal `(state_dim,)`; may be singular.

    References:
        Nejatbakhsh & Wang (2025), sec. 2; Särkkä & Svensson (2023), eq. 6.17.

    Examples:
        >>> import jax.numpy as jnp
        >>> from issm import ParamsLGSSMDynamics
        >>> ParamsLGSSMDynamics(0.9 * jnp.eye(2), jnp.zeros(2), jnp.zeros((2, 0)), jnp.ones(2)).cov.shape
        (2,)
    """

    weights: Float[Array, "state_dim state_dim"] | TimeVarying
    bias: Float[Array, " state_dim"] | TimeVarying
    input_weights: Float[Array, "state_dim input_dim"] | TimeVarying
    cov: Float[Array, "state_dim state_dim"] | Float[Array, " state_dim"] | TimeVarying


class ParamsLGSSMEmissions(eqx.Module):
    r"""Linear Gaussian emissions $y_t = C x_t + D u_t + d + r_t,\ r_t \sim N(0, R)$.

    Attributes:
        weights: C, `(emission_dim, state_dim)`.
        bias: d, `(emission_dim,)`.
        input_weights: D, `(emission_dim, input_dim)`.
        cov: R, `(emission_dim, emission_dim)`, or its diagonal `(emission_dim,)`; positive definite.

    References:
        Särkkä & Svensson (2023), eq. 6.17.

    Examples:
        >>> import jax.numpy as jnp
        >>> from issm import ParamsLGSSMEmissions
        >>> ParamsLGSSMEmissions(jnp.ones((3, 2)), jnp.zeros(3), jnp.zeros((3, 0)), jnp.ones(3)).weights.shape
        (3, 2)
    """

    weights: Float[Array, "emission_dim state_dim"] | TimeVarying
    bias: Float[Array, " emission_dim"] | TimeVarying
    input_weights: Float[Array, "emission_dim input_dim"] | TimeVarying
    cov: Float[Array, "emission_dim emission_dim"] | Float[Array, " emission_dim"] | TimeVarying


class ParamsLGSSM(eqx.Module):
    r"""Parameters of a linear Gaussian state-space model; a frozen pytree.

    A `cov` field with one axis is a diagonal, with two a full matrix (one axis more inside `TimeVarying`).
    `make_lgssm_params` builds one from arrays and checks it.

    Attributes:
        initial: Mean and covariance of the first state.
        dynamics: How one state follows from the last.
        emissions: How the emissions follow from the state.

    References:
        Nejatbakhsh & Wang (2025), sec. 2; `docs/concepts.md`.

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0], [2.0]], [0.5, 0.5])
        >>> params.state_dim, params.emission_dim, params.input_dim
        (1, 2, 0)
    """

    initial: ParamsLGSSMInitial
    dynamics: ParamsLGSSMDynamics
    emissions: ParamsLGSSMEmissions

    @property
    def state_dim(self) -> int:
        """Number of states D."""
        return self.initial.mean.shape[-1]

    @property
    def emission_dim(self) -> int:
        """Number of emissions N."""
        return values_of(self.emissions.weights).shape[-2]

    @property
    def input_dim(self) -> int:
        """Number of inputs M."""
        return values_of(self.dynamics.input_weights).shape[-1]


def make_lgssm_params(
    initial_mean: Any,
    initial_cov: Any,
    dynamics_weights: Any,
    dynamics_cov: Any,
    emissions_weights: Any,
    emissions_cov: Any,
    dynamics_bias: Any = None,
    dynamics_input_weights: Any = None,
    emissions_bias: Any = None,
    emissions_input_weights: Any = None,
) -> ParamsLGSSM:
    r"""Build and check the parameters of $x_t = A x_{t-1} + B u_t + b + w_t,\ y_t = C x_t + D u_t + d + r_t$.

    Arrays, nested lists and, for one state or one emission, plain numbers are accepted. All fields take the widest
    floating dtype among the JAX arrays given (among the NumPy arrays, if there is no JAX array).

    Args:
        initial_mean: m, `(state_dim,)`.
        initial_cov: S, `(state_dim, state_dim)` or a diagonal `(state_dim,)`; may be singular.
        dynamics_weights: A, `(state_dim, state_dim)`.
        dynamics_cov: Q, `(state_dim, state_dim)` or a diagonal `(state_dim,)`; may be singular.
        emissions_weights: C, `(emission_dim, state_dim)`.
        emissions_cov: R, `(emission_dim, emission_dim)` or a diagonal `(emission_dim,)`; positive definite.
        dynamics_bias: b, `(state_dim,)`; None is zero.
        dynamics_input_weights: B, `(state_dim, input_dim)`; None is zero.
        emissions_bias: d, `(emission_dim,)`; None is zero.
        emissions_input_weights: D, `(emission_dim, input_dim)`; None is zero.
            Each dynamics and emissions field may be a `TimeVarying`.

    Returns:
        The parameters.

    Raises:
        ValueError: If shapes disagree, an entry is NaN or infinite, or a covariance is asymmetric or indefinite.

    References:
        Särkkä & Svensson (2023), eq. 6.17; the argument names are dynamax's.

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params(
        ...     initial_mean=[0.0, 0.0], initial_cov=[1.0, 1.0],
        ...     dynamics_weights=[[0.9, 0.1], [0.0, 0.8]], dynamics_cov=[0.1, 0.1],
        ...     emissions_weights=[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], emissions_cov=[0.5, 0.5, 0.5],
        ... )
        >>> params.emissions.bias.tolist()
        [0.0, 0.0, 0.0]
    """
    given = {
        "initial_mean": initial_mean,
        "initial_cov": initial_cov,
        "dynamics_weights": dynamics_weights,
        "dynamics_bias": dynamics_bias,
        "dynamics_input_weights": dynamics_input_weights,
        "dynamics_cov": dynamics_cov,
        "emissions_weights": emissions_weights,
        "emissions_bias": emissions_bias,
        "emissions_input_weights": emissions_input_weights,
        "emissions_cov": emissions_cov,
    }
    dtype = common_float_dtype(given)
    fields = {
        name: _as_field(name, value, dtype)
        for name, value in given.items()
        if value is not None or not name.endswith(("bias", "input_weights"))
    }
    state_dim = _last_axis(fields["initial_mean"])
    emission_dim = _last_axis(fields["emissions_weights"], axis=-2)
    input_dim = next((_last_axis(fields[name]) for name in _INPUT_WEIGHTS if name in fields), 0)
    fields.setdefault("dynamics_bias", to_device(np.zeros(state_dim, dtype)))
    fields.setdefault("dynamics_input_weights", to_device(np.zeros((state_dim, input_dim), dtype)))
    fields.setdefault("emissions_bias", to_device(np.zeros(emission_dim, dtype)))
    fields.setdefault("emissions_input_weights", to_device(np.zeros((emission_dim, input_dim), dtype)))
    _check_fields(fields)
    return ParamsLGSSM(
        ParamsLGSSMInitial(*(values_of(fields[f"initial_{name}"]) for name in ("mean", "cov"))),
        ParamsLGSSMDynamics(*(fields[f"dynamics_{name}"] for name in ("weights", "bias", "input_weights", "cov"))),
        ParamsLGSSMEmissions(*(fields[f"emissions_{name}"] for name in ("weights", "bias", "input_weights", "cov"))),
    )


def check_params(params: ParamsLGSSM) -> None:
    """Refuse parameters whose shapes disagree, or, where values are known, that no model can have.

    `make_lgssm_params` has done this already; parameters that were edited field by field are seen here for the first time.
    """
    if not isinstance(params, ParamsLGSSM):
        fail(
            "params",
            got=f"a {type(params).__name__}",
            expected="a ParamsLGSSM",
            remedy="Build one with `make_lgssm_params`.",
        )
    _check_once(params)


@look_once
def _check_once(params: ParamsLGSSM) -> None:
    _check_fields({f"params.{block}.{name}": getattr(getattr(params, block), name) for block, name in _FIELDS})


_FIELDS = {
    ("initial", "mean"): ("state_dim",),
    ("initial", "cov"): ("state_dim", "state_dim"),
    ("dynamics", "weights"): ("state_dim", "state_dim"),
    ("dynamics", "bias"): ("state_dim",),
    ("dynamics", "input_weights"): ("state_dim", "input_dim"),
    ("dynamics", "cov"): ("state_dim", "state_dim"),
    ("emissions", "weights"): ("emission_dim", "state_dim"),
    ("emissions", "bias"): ("emission_dim",),
    ("emissions", "input_weights"): ("emission_dim", "input_dim"),
    ("emissions", "cov"): ("emission_dim", "emission_dim"),
}
_INPUT_WEIGHTS = ("dynamics_input_weights", "emissions_input_weights")
_NUMBERS_OF_AXES = {f"{block}_{name}": len(axes) for (block, name), axes in _FIELDS.items()}


def _as_field(name: str, value: Any, dtype: Any) -> Array | TimeVarying:
    if isinstance(value, TimeVarying):
        return TimeVarying(as_float_array(name, value.values, dtype))
    array = as_floats(name, value, dtype)
    if array.ndim == 0:  # one state or one emission, given as a number
        array = array.reshape((1,) if name.endswith("cov") else (1,) * _NUMBERS_OF_AXES[name])
    return to_device(array)


def _last_axis(field: Array | TimeVarying, axis: int = -1) -> int:
    shape = values_of(field).shape
    return shape[axis] if len(shape) >= -axis else 0


def _check_fields(fields: dict[str, Any]) -> None:
    """`fields` are those of `_FIELDS` in their order of axes, under the names that the user knows them by."""
    names = {key: next(name for name in fields if name.replace(".", "_").endswith("_".join(key))) for key in _FIELDS}
    sizes = {
        "state_dim": _last_axis(fields[names["initial", "mean"]]),
        "emission_dim": _last_axis(fields[names["emissions", "weights"]], axis=-2),
        "input_dim": _last_axis(fields[names["dynamics", "input_weights"]]),
    }
    num_timesteps = next(
        (f.values.shape[0] for f in fields.values() if isinstance(f, TimeVarying) and f.values.ndim), None
    )
    for key, axes in _FIELDS.items():
        _check_field(names[key], fields[names[key]], axes, sizes, num_timesteps, diagonal_allowed=key[1] == "cov")
    for key in _FIELDS:
        name, field = names[key], fields[names[key]]
        if key[1] != "cov":
            check_finite(name, values_of(field))
        elif is_diagonal(field):
            check_variances(name, values_of(field), positive=key[0] == "emissions")
        else:
            check_covariance(name, values_of(field), positive=key[0] == "emissions")


def _check_field(
    name: str, field: Any, axes: tuple, sizes: dict, num_timesteps: int | None, diagonal_allowed: bool
) -> None:
    varies = isinstance(field, TimeVarying)
    if varies and name.split(".")[-2 if "." in name else 0].startswith("initial"):
        fail(name, got="a TimeVarying", expected="an array", remedy="The initial distribution belongs to one step.")
    shape = tuple(values_of(field).shape)
    time_axis, time_size = (("num_timesteps",), (num_timesteps,)) if varies else ((), ())
    allowed = [axes, axes[:1]] if diagonal_allowed else [axes]
    shapes = [(*time_size, *(sizes[axis] for axis in option)) for option in allowed]
    if shape not in shapes or 0 in shape[: len(shape) - (axes[-1] == "input_dim")]:
        words = " or ".join(
            f"({', '.join((*time_axis, *option))}) = {wanted}" for option, wanted in zip(allowed, shapes, strict=True)
        )
        fail(
            name,
            got=f"shape {shape}",
            expected=words,
            remedy="state_dim is read from the initial mean, emission_dim from the rows of the emission weights, input_dim from the"
            " columns of the dynamics input weights; only `TimeVarying` fields have a time axis.",
        )
