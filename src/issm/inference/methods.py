"""Which kernel runs: the methods of the filter and the smoother, and the rule behind "auto"."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from issm._check import fail
from issm._host import is_concrete
from issm._once import look_once
from issm.inference.dense import dense_moments
from issm.inference.moments import Moments
from issm.inference.parallel import parallel_moments
from issm.inference.recursions import small_moments
from issm.inference.sqrt import sqrt_moments
from issm.models.fields import is_diagonal, values_of
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials

METHODS = ("auto", "sequential", "parallel", "sqrt")

LARGEST_UNROLLED_STATE_DIM = 16
"""Above this many states, unrolled products lose to LAPACK and take long to compile."""

SHORTEST_PARALLEL = 128
"""Steps from which "auto" scans in parallel on an accelerator; a guess from the depth of the scans, not yet measured on one."""

LARGEST_STRESS = {"float32": 3e-4, "float64": 1e-10}
"""Rounding error, relative to the emission noise, above which "auto" takes square roots."""

FEWEST_UNROLLED_STEPS = 1000
"""Below this many steps, over all trials, the unrolled kernel gains less time than its compilation costs."""


def check_method(method: str) -> None:
    """Refuse a method that does not exist."""
    if method not in METHODS:
        fail(
            "method",
            got=repr(method),
            expected=f"one of {', '.join(map(repr, METHODS))}",
            remedy='"auto" chooses for you.',
        )


def choose_method(method: str, params: ParamsLGSSM, trials: Trials) -> str:
    """What "auto" stands for; any other method stands for itself.

    "sqrt" where `is_stressed`: where a prior or process variance is so large against the emission noise that a covariance
    would lose the digits that the result is made of (an almost diffuse prior, an almost exact observation). Otherwise "parallel"
    for at least `SHORTEST_PARALLEL` steps on a GPU or TPU, and "sequential" anywhere else: on a CPU the scan in parallel
    does several times the work for nothing.

    While JAX traces the parameters (as arguments of the caller's own `jit`, `grad` or `vmap`, or in an iteration of EM) nothing can
    be looked at. Double precision then takes the plain kernel. Single precision stays "auto": both kernels are compiled and
    the values decide at run time which one runs. Under `vmap` over parameters both run; give the method by name there.
    """
    if method != "auto":
        return method
    stressed = _look_for_stress(params)
    if stressed is None and params.initial.mean.dtype == jnp.float32:
        return "auto"
    return "sqrt" if stressed else _plain_method(trials)


@look_once
def _look_for_stress(params: ParamsLGSSM) -> bool | None:
    """Whether `is_stressed`, or None where it is not known."""
    if not all(map(is_concrete, jax.tree.leaves(params))):
        return None
    with jax.ensure_compile_time_eval():  # the parameters may be known although the caller is being traced
        return bool(is_stressed(params))


@jax.jit
def is_stressed(params: ParamsLGSSM) -> Bool[Array, ""]:
    r"""Whether $\epsilon \cdot \max(S_{ii}, Q_{ii}) \cdot \max_i (C^\top R^{-1} C)_{ii}$ is above `LARGEST_STRESS`.

    The product is the largest $P^- J$ that an update may see: so many times does rounding enter its innovation covariance.
    """
    largest = lambda cov: jnp.max(values_of(cov) if is_diagonal(cov) else _diagonals(values_of(cov)))  # noqa: E731
    variance = jnp.maximum(largest(params.initial.cov), largest(params.dynamics.cov))
    weights, cov = values_of(params.emissions.weights), values_of(params.emissions.cov)
    if is_diagonal(params.emissions.cov):
        weights, cov = _aligned(weights, cov[..., None])
        information = (weights**2 / cov).sum(axis=-2).max()
    else:
        weights, factor = _aligned(weights, jnp.linalg.cholesky(cov))
        whitened = jax.scipy.linalg.solve_triangular(factor, weights, lower=True)
        information = (whitened**2).sum(axis=-2).max()
    return jnp.finfo(cov.dtype).eps * variance * information > LARGEST_STRESS[cov.dtype.name]


def suits(method: str, params: ParamsLGSSM) -> bool | Bool[Array, ""]:
    """Whether a program that holds one form of the kernels holds the one that "auto" stands for at these parameters."""
    return True if method == "auto" else is_stressed(params) == (method == "sqrt")


def filter_and_smooth(params: ParamsLGSSM, trials: Trials, method: str) -> Moments:
    """The moments of all trials by the method asked for; under `jit`, what is not used is not computed."""
    with jax.default_matmul_precision("highest"):  # an accelerator would round single precision to fewer digits
        return moments_by_method(params, trials, choose_method(method, params, trials))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def moments_by_method(params: ParamsLGSSM, trials: Trials, method: str) -> Moments:
    """The moments of all trials. Derivatives of any order are those of the plain form, which is smooth everywhere."""
    if method == "auto":
        kernels = [partial(_run, method=choice) for choice in (_plain_method(trials), "sqrt")]
        return lax.cond(is_stressed(params), kernels[1], kernels[0], params, trials)
    return _run(params, trials, method)


@moments_by_method.defjvp
def _moments_by_method_jvp(method: str, primals: tuple, tangents: tuple) -> tuple[Moments, Moments]:
    # The plain moments come with their derivative: no other program for the same numbers.
    plain, tangent = jax.jvp(dense_moments, primals, tangents)
    return plain if method == "sequential" else moments_by_method(*primals, method), tangent


def _run(params: ParamsLGSSM, trials: Trials, method: str) -> Moments:
    if method == "parallel":
        return parallel_moments(params, trials)
    if method == "sqrt":
        return sqrt_moments(params, trials)
    num_steps = trials.num_trials * trials.emissions.shape[1]
    small = params.state_dim <= LARGEST_UNROLLED_STATE_DIM and num_steps >= FEWEST_UNROLLED_STEPS
    return small_moments(params, trials) if small else dense_moments(params, trials)


def _plain_method(trials: Trials) -> str:
    on_accelerator = jax.default_backend() != "cpu"
    return "parallel" if on_accelerator and trials.emissions.shape[1] >= SHORTEST_PARALLEL else "sequential"


def _diagonals(matrices: Array) -> Array:
    return jnp.diagonal(matrices, axis1=-2, axis2=-1)


def _aligned(left: Array, right: Array) -> tuple[Array, Array]:
    """The same leading axes for both."""
    batch = jnp.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return jnp.broadcast_to(left, (*batch, *left.shape[-2:])), jnp.broadcast_to(right, (*batch, *right.shape[-2:]))
