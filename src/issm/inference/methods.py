"""Which kernel runs: the methods of the filter and the smoother, and the rule behind "auto"."""

import jax

from issm._check import fail
from issm.inference.dense import dense_moments
from issm.inference.moments import Moments
from issm.inference.recursions import small_moments
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials

METHODS = ("auto", "sequential")

LARGEST_UNROLLED_STATE_DIM = 16
"""Above this many states, unrolled products lose to LAPACK and take long to compile."""


def check_method(method: str) -> None:
    """Refuse a method that does not exist."""
    if method not in METHODS:
        fail(
            "method",
            got=repr(method),
            expected=f"one of {', '.join(map(repr, METHODS))}",
            remedy='"auto" chooses for you.',
        )


def filter_and_smooth(params: ParamsLGSSM, trials: Trials, method: str) -> Moments:
    """The moments of all trials by the method asked for; under `jit`, what is not used is not computed."""
    return sequential_moments(params, trials)


@jax.custom_jvp
def sequential_moments(params: ParamsLGSSM, trials: Trials) -> Moments:
    """A scan over time. Derivatives of any order are those of the plain form, which is smooth everywhere."""
    if params.state_dim <= LARGEST_UNROLLED_STATE_DIM:
        return small_moments(params, trials)
    return dense_moments(params, trials)


@sequential_moments.defjvp
def _sequential_moments_jvp(primals: tuple, tangents: tuple) -> tuple[Moments, Moments]:
    _, tangent = jax.jvp(dense_moments, primals, tangents)
    return sequential_moments(*primals), tangent
