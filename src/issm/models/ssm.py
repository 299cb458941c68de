r"""State-space models under clamps with any emissions, $y_t \sim p(y \mid f(x_t), u_t)$, and linear or nonlinear dynamics."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from issm._check import check_key, common_float_dtype, fail
from issm._types import PRNGKey
from issm.interventions import Intervention
from issm.models.emissions import Emission, GaussianEmission
from issm.models.fields import TimeVarying, values_of
from issm.models.lgssm import ParamsLGSSM, ParamsLGSSMDynamics, ParamsLGSSMEmissions, ParamsLGSSMInitial, check_params
from issm.models.maps import MLP, LinearMap
from issm.models.nonlinear import NonlinearDynamics, transitions_around
from issm.models.transitions import Transitions, lgssm_transitions
from issm.models.trials import Plan, Trials, as_plan, as_trials


class SSM(eqx.Module):
    r"""A state-space model whose emissions may follow any map and any distribution; a frozen pytree.

    $$x_0 \sim N(m, S), \quad x_t = A x_{t-1} + B u_t + b + w_t, \quad w_t \sim N(0, Q), \quad y_t \sim p(y \mid f(x_t) + D u_t)$$

    with clamps as in the linear model;
    `NonlinearDynamics` put a map of their own in the place of $A x_{t-1} + b$. All numbers take the widest floating dtype among them.

    Attributes:
        initial: Mean and covariance of the first state.
        dynamics: How one state follows from the last: `ParamsLGSSMDynamics`, or `NonlinearDynamics`.
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
    dynamics: ParamsLGSSMDynamics | NonlinearDynamics
    emission: Emission

    def __init__(
        self, initial: ParamsLGSSMInitial, dynamics: ParamsLGSSMDynamics | NonlinearDynamics, emission: Emission
    ):
        for name, value, kinds in (
            ("initial", initial, (ParamsLGSSMInitial,)),
            ("dynamics", dynamics, (ParamsLGSSMDynamics, NonlinearDynamics)),
            ("emission", emission, (Emission,)),
        ):
            if not isinstance(value, kinds):
                fail(
                    name,
                    got=f"a {type(value).__name__}",
                    expected=" or ".join(f"a {kind.__name__}" for kind in kinds),
                    remedy="Take `initial` and `dynamics` from `make_lgssm_params`, and wrap a map in an emission model.",
                )
        dtype = common_float_dtype(initial, dynamics, emission)
        initial, dynamics, emission = cast_floats((initial, dynamics, emission), dtype)
        state_dim = initial.mean.shape[-1]
        emission_dim = mapped_size("emission.map", emission.map, state_dim, dtype)
        if isinstance(dynamics, NonlinearDynamics):
            next_dim = mapped_size("dynamics.map", dynamics.map, state_dim, dtype)
            if next_dim != state_dim:
                fail(
                    "dynamics.map",
                    got=f"a map to {next_dim} numbers",
                    expected=f"a map to the {state_dim} states",
                    remedy="It takes one state and returns the expected next one.",
                )
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
        return mapped_size("emission.map", self.emission.map, self.state_dim, self.initial.mean.dtype)

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
    _check_constant("params.emissions", params.emissions, "The emission of an `SSM` is the same at every step.")
    emissions = params.emissions
    emission = GaussianEmission(LinearMap(emissions.weights, emissions.bias), emissions.cov, emissions.input_weights)
    return SSM(params.initial, params.dynamics, emission)


def ssm_to_lgssm(model: SSM) -> ParamsLGSSM:
    """The parameters of a model that is linear and Gaussian, for the exact algorithms.

    Args:
        model: A model with linear dynamics and a `GaussianEmission` around a `LinearMap`.

    Returns:
        The same model.

    Raises:
        ValueError: If the emission or the dynamics are of another kind.

    References:
        `docs/concepts.md`, "Other emissions".

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> issm.ssm_to_lgssm(issm.ssm_from_lgssm(params)).dynamics.weights.tolist() == params.dynamics.weights.tolist()
        True
    """
    check_model(model)
    linear = check_linear(model, 'use `posterior(model, emissions, method="laplace")`')
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
    return ParamsLGSSM(model.initial, linear, emissions)


def bend_dynamics(key: PRNGKey, model: SSM, widths: Sequence[int] = (32,), *, activation: str = "tanh") -> SSM:
    r"""The same model with dynamics that can learn to be nonlinear: $A x + b$ beside a network that starts as zero.

    A good start for a fit of nonlinear dynamics is the linear model that comes closest, whose emissions are near the truth.

    Args:
        key: JAX random key, for the weights of the network.
        model: A model with linear dynamics and diagonal process noise, both the same at every step.
        widths: Numbers of units of the hidden layers, at least one.
        activation: Of the network, as in `MLP`.

    Returns:
        The model with `NonlinearDynamics` around an `MLP`.

    Raises:
        ValueError: If the dynamics are nonlinear already, vary in time, or have correlated noise or a variance of zero.

    References:
        `docs/how-to/nonlinear-dynamics.md`.

    Examples:
        >>> import jax, issm
        >>> linear = issm.ssm_from_lgssm(issm.make_lgssm_params([0.0], [1.0], [[0.75]], [0.1], [[1.0]], [0.5]))
        >>> issm.bend_dynamics(jax.random.key(0), linear).dynamics.map(jax.numpy.array([2.0])).tolist()
        [1.5]
    """
    check_key(key)
    check_model(model)
    linear = check_linear(model, "there is nothing to do")
    _check_constant("model.dynamics", linear, "A map of the dynamics is the same at every step.")
    weights, bias, cov = values_of(linear.weights), values_of(linear.bias), values_of(linear.cov)
    state_dim = model.state_dim
    network = MLP(key, state_dim, state_dim, widths, activation=activation, bias=bias, dtype=bias.dtype)
    network = eqx.tree_at(lambda n: n.skip, network, weights)
    return SSM(model.initial, NonlinearDynamics(network, cov, values_of(linear.input_weights)), model.emission)


def _check_constant(name: str, block: Any, reason: str) -> None:
    """Refuse a block of parameters with a field that varies in time."""
    for field, value in vars(block).items():
        if isinstance(value, TimeVarying):
            fail(f"{name}.{field}", got="a TimeVarying", expected="a constant field", remedy=reason)


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


def check_linear(model: SSM, instead: str) -> ParamsLGSSMDynamics:
    """The dynamics, for what needs them to be linear."""
    if isinstance(model.dynamics, NonlinearDynamics):
        fail(
            "model.dynamics",
            got="NonlinearDynamics",
            expected="linear dynamics, `ParamsLGSSMDynamics`",
            remedy=f"For nonlinear ones, {instead}.",
        )
    return model.dynamics


def companion(model: SSM) -> ParamsLGSSM:
    """A linear Gaussian model with the same states, inputs and numbers of emissions; its emissions see nothing.

    The dynamics are those of the model if they are linear; of others only their sizes and noise are there, for checks.
    """
    dtype, emission_dim, dynamics = model.initial.mean.dtype, model.emission_dim, model.dynamics
    blank = ParamsLGSSMEmissions(
        weights=jnp.zeros((emission_dim, model.state_dim), dtype),
        bias=jnp.zeros(emission_dim, dtype),
        input_weights=_input_weights(model),
        cov=jnp.ones(emission_dim, dtype),
    )
    if isinstance(dynamics, NonlinearDynamics):
        zeros = jnp.zeros(model.state_dim, dtype)
        dynamics = ParamsLGSSMDynamics(jnp.diag(zeros), zeros, dynamics.input_weights, dynamics.cov)
    return ParamsLGSSM(model.initial, dynamics, blank)


def transitions_at(model: SSM, states: Array | None, inputs: Array, intervention: Intervention) -> Transitions:
    """The transitions of one sequence; those of nonlinear dynamics touch them at the path `states`."""
    if isinstance(model.dynamics, NonlinearDynamics):
        assert states is not None
        return transitions_around(states, model.initial, model.dynamics, inputs, intervention)
    return lgssm_transitions(companion(model), inputs, intervention)


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


def _num_inputs(dynamics: ParamsLGSSMDynamics | NonlinearDynamics) -> int:
    weights = dynamics.input_weights
    return (weights.values if isinstance(weights, TimeVarying) else weights).shape[-1]


def mapped_size(name: str, map: Callable[[Array], Array], state_dim: int, dtype: Any) -> int:
    """How many numbers a map makes of one state."""
    in_size = getattr(map, "in_size", state_dim)
    if in_size not in (state_dim, "scalar"):
        fail(
            name,
            got=f"a map of {in_size} numbers",
            expected=f"a map of the {state_dim} states",
            remedy="Build it with in_size = state_dim.",
        )
    try:
        mapped = jax.eval_shape(map, jax.ShapeDtypeStruct((state_dim,), dtype))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: got a map that fails on one state, shape ({state_dim},), with: {error}. Expected a callable from one"
            " state to one array. Check the width of its first layer."
        ) from error
    if not isinstance(mapped, jax.ShapeDtypeStruct) or mapped.ndim != 1 or mapped.shape[0] < 1:
        fail(
            name,
            got=f"a map to {getattr(mapped, 'shape', type(mapped).__name__)}",
            expected="a map to one array with one axis",
            remedy="Return one number for each emission, or for each state.",
        )
    return mapped.shape[0]
