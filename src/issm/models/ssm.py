r"""State-space models with linear Gaussian dynamics under clamps and any emissions, $y_t \sim p(y \mid f(x_t), u_t)$."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from issm._check import common_float_dtype, fail
from issm.interventions import Intervention
from issm.models.emissions import Emission, GaussianEmission
from issm.models.lgssm import (
    ParamsLGSSM,
    ParamsLGSSMDynamics,
    ParamsLGSSMEmissions,
    ParamsLGSSMInitial,
    TimeVarying,
    check_params,
)
from issm.models.maps import LinearMap
from issm.models.trials import Plan, Trials, as_plan, as_trials


class SSM(eqx.Module):
    r"""A state-space model whose emissions may follow any map and any distribution; a frozen pytree.

    $$x_0 \sim N(m, S), \quad x_t = A x_{t-1} + B u_t + b + w_t, \quad w_t \sim N(0, Q), \quad y_t \sim p(y \mid f(x_t) + D u_t)$$

    with clamps as in the linear model. All numbers take the widest floating dtype among them.

    Attributes:
        initial: Mean and covariance of the first state.
        dynamics: How one state follows from the last.
        emission: `GaussianEmission`, `PoissonEmission`, `NegativeBinomialEmission` or `BernoulliEmission` around a map: a
            `LinearMap`, an `MLP`, or any callable pytree from `(state_dim,)` to `(emission_dim,)`.

    Raises:
        ValueError: If shapes disagree, the map does not take a state, or a number is not finite.

    References:
        Nejatbakhsh & Wang (2025), sec. 2; `docs/concepts.md`, "Other emissions".

    Examples:
        >>> import jax, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> network = issm.MLP(jax.random.key(0), in_size=1, out_size=4)
        >>> model = issm.SSM(linear.initial, linear.dynamics, issm.PoissonEmission(network, exposure=0.02))
        >>> model.state_dim, model.emission_dim, model.input_dim
        (1, 4, 0)
    """

    initial: ParamsLGSSMInitial
    dynamics: ParamsLGSSMDynamics
    emission: Emission

    def __init__(self, initial: ParamsLGSSMInitial, dynamics: ParamsLGSSMDynamics, emission: Emission):
        for name, value, kind in (
            ("initial", initial, ParamsLGSSMInitial),
            ("dynamics", dynamics, ParamsLGSSMDynamics),
            ("emission", emission, Emission),
        ):
            if not isinstance(value, kind):
                fail(
                    name,
                    got=f"a {type(value).__name__}",
                    expected=f"a {kind.__name__}",
                    remedy="Take `initial` and `dynamics` from `make_lgssm_params`, and wrap a map in an emission model.",
                )
        dtype = common_float_dtype(initial, dynamics, emission)
        initial, dynamics, emission = cast_floats((initial, dynamics, emission), dtype)
        emission_dim = _mapped_size(emission.map, initial.mean.shape[-1], dtype)
        if emission.input_weights is None:
            num_inputs = _num_inputs(dynamics)
            blank = jnp.zeros((emission_dim, num_inputs), dtype)
            emission = eqx.tree_at(lambda e: e.input_weights, emission, blank, is_leaf=lambda leaf: leaf is None)
        self.initial = initial
        self.dynamics = dynamics
        self.emission = emission
        emission.check_sizes(emission_dim)
        check_params(companion(self))

    @property
    def state_dim(self) -> int:
        """Number of states D."""
        return self.initial.mean.shape[-1]

    @property
    def emission_dim(self) -> int:
        """Number of emissions N."""
        return _mapped_size(self.emission.map, self.state_dim, self.initial.mean.dtype)

    @property
    def input_dim(self) -> int:
        """Number of inputs M."""
        return _num_inputs(self.dynamics)


def ssm_from_lgssm(params: ParamsLGSSM) -> SSM:
    r"""The linear Gaussian model as an `SSM`: a `GaussianEmission` around the `LinearMap` $C x + d$.

    Args:
        params: Parameters whose emissions do not vary in time.

    Returns:
        The same model.

    Raises:
        ValueError: If a field of the emissions is `TimeVarying`, or `params` are not those of a model.

    References:
        `docs/concepts.md`, "Other emissions".

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> issm.ssm_to_lgssm(issm.ssm_from_lgssm(params)).emissions.weights.tolist()
        [[1.0]]
    """
    check_params(params)
    for name, field in vars(params.emissions).items():
        if isinstance(field, TimeVarying):
            fail(
                f"params.emissions.{name}",
                got="a TimeVarying",
                expected="a constant field",
                remedy="The emission of an `SSM` is the same at every step.",
            )
    emissions = params.emissions
    emission = GaussianEmission(LinearMap(emissions.weights, emissions.bias), emissions.cov, emissions.input_weights)
    return SSM(params.initial, params.dynamics, emission)


def ssm_to_lgssm(model: SSM) -> ParamsLGSSM:
    """The parameters of a model that is linear and Gaussian, for the exact algorithms.

    Args:
        model: A model with a `GaussianEmission` around a `LinearMap`.

    Returns:
        The same model.

    Raises:
        ValueError: If the emission is of another kind.

    References:
        `docs/concepts.md`, "Other emissions".

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> issm.ssm_to_lgssm(issm.ssm_from_lgssm(params)).dynamics.weights.tolist() == params.dynamics.weights.tolist()
        True
    """
    check_model(model)
    emission = model.emission
    if not (isinstance(emission, GaussianEmission) and isinstance(emission.map, LinearMap)):
        fail(
            "model.emission",
            got=f"a {type(emission).__name__} around a {type(emission.map).__name__}",
            expected="a GaussianEmission around a LinearMap",
            remedy='Other models have no exact algorithms: use `posterior(model, emissions, method="laplace")`.',
        )
    emissions = ParamsLGSSMEmissions(
        weights=emission.map.weights, bias=emission.map.bias, input_weights=_input_weights(model), cov=emission.cov
    )
    return ParamsLGSSM(model.initial, model.dynamics, emissions)


def check_model(model: Any) -> None:
    """Refuse what is no `SSM`, or one whose fields were edited so that they disagree."""
    if not isinstance(model, SSM):
        fail(
            "model",
            got=f"a {type(model).__name__}",
            expected="an SSM",
            remedy="Build one with `SSM(initial, dynamics, emission)`, or from a linear model with `ssm_from_lgssm`.",
        )
    model.emission.check_sizes(model.emission_dim)


def companion(model: SSM) -> ParamsLGSSM:
    """A linear Gaussian model with the same states, inputs and numbers of emissions; its emissions see nothing."""
    dtype, emission_dim = model.initial.mean.dtype, model.emission_dim
    blank = ParamsLGSSMEmissions(
        weights=jnp.zeros((emission_dim, model.state_dim), dtype),
        bias=jnp.zeros(emission_dim, dtype),
        input_weights=_input_weights(model),
        cov=jnp.ones(emission_dim, dtype),
    )
    return ParamsLGSSM(model.initial, model.dynamics, blank)


def as_model_trials(model: SSM, emissions: Any, inputs: Any, interventions: Any) -> Trials:
    """Check a model and its data, and give the data one form in the dtype of the model.

    Raises:
        ValueError: As `as_trials`, or if the emission model gives the data no probability.
    """
    check_model(model)
    trials = as_trials(companion(model), emissions, inputs, interventions)
    model.emission.check(trials.emissions)
    return trials


def as_model_plan(
    model: SSM, inputs: Any, interventions: Intervention | None, num_timesteps: int, num_trials: int | None
) -> Plan:
    """Check a model, inputs and clamps; `num_trials` None is one sequence."""
    check_model(model)
    params = companion(model)
    check_params(params)
    return as_plan(params, inputs, interventions, num_timesteps=num_timesteps, num_trials=num_trials)


def cast_floats(tree: Any, dtype: Any) -> Any:
    """Every floating-point array of a pytree in one dtype."""
    cast = lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) and leaf.dtype != dtype else leaf  # noqa: E731
    return jax.tree.map(cast, tree)


def _input_weights(model: SSM) -> Array:
    weights = model.emission.input_weights
    assert weights is not None  # a model fills them in
    return weights


def _num_inputs(dynamics: ParamsLGSSMDynamics) -> int:
    weights = dynamics.input_weights
    return (weights.values if isinstance(weights, TimeVarying) else weights).shape[-1]


def _mapped_size(map: Callable[[Array], Array], state_dim: int, dtype: Any) -> int:
    """Number of emissions: what the map returns for one state."""
    in_size = getattr(map, "in_size", state_dim)
    if in_size not in (state_dim, "scalar"):
        fail(
            "emission.map",
            got=f"a map of {in_size} numbers",
            expected=f"a map of the {state_dim} states",
            remedy="Build it with in_size = state_dim.",
        )
    try:
        mapped = jax.eval_shape(map, jax.ShapeDtypeStruct((state_dim,), dtype))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"emission.map: got a map that fails on one state, shape ({state_dim},), with: {error}. Expected a callable from"
            " (state_dim,) to (emission_dim,). Check the width of its first layer."
        ) from error
    if not isinstance(mapped, jax.ShapeDtypeStruct) or mapped.ndim != 1 or mapped.shape[0] < 1:
        fail(
            "emission.map",
            got=f"a map to {getattr(mapped, 'shape', type(mapped).__name__)}",
            expected="a map to one array (emission_dim,)",
            remedy="Return one number for each emission.",
        )
    return mapped.shape[0]
