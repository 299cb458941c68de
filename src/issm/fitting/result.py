"""What a fit returns, and why it ended."""

import enum
from operator import attrgetter
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from issm._host import is_concrete
from issm.models.fields import values_of


class Code(enum.IntEnum):
    """Why a fit ended, as a number that a compiled loop can carry."""

    RUNNING = 0
    CONVERGED = 1
    MAX_ITERS = 2
    DECREASED = 3
    START_NOT_FINITE = 4
    LOGLIK_NOT_FINITE = 5
    UPDATE_NOT_FINITE = 6
    INTERRUPTED = 7


REASONS = {
    Code.RUNNING: "still running",
    Code.CONVERGED: "converged: the last update gained less than the tolerance",
    Code.MAX_ITERS: "stopped after num_iters updates, before the gain fell below the tolerance",
    Code.DECREASED: "stopped because an update lowered the objective by more than rounding; the parameters before it are returned",
    Code.START_NOT_FINITE: "did not start: the log-likelihood of the starting parameters is not finite",
    Code.LOGLIK_NOT_FINITE: "stopped because the log-likelihood after an update was not finite; the parameters before it are"
    " returned",
    Code.UPDATE_NOT_FINITE: "stopped because an update was not finite; the parameters before it are returned",
    Code.INTERRUPTED: "interrupted",
}


class FitResult(eqx.Module):
    r"""Fitted parameters, and how the fit went.

    Under `jit` and `vmap` every field is an array as usual, and `reason` can be read from the result once it is concrete.

    Attributes:
        params: The parameters, in the structure of those that the fit started from.
        log_probs: `log_probs[k]` is $\log p(y \mid do(\cdot), u)$ summed over trials at the parameters before update k, and the
            last entry belongs to `params`: `(num_iters + 1,)`. Under `jit` or `vmap` the length is the largest possible one,
            and entries beyond the last repeat it. A step that was tried and not taken repeats the entry too: there is one for
            every E step.
        log_priors: Logarithm of the prior density at the same parameters, up to a constant; zeros without priors.
            `log_probs + log_priors` is what never goes down.
        converged: Whether the last update gained less than the tolerance.
        num_iters: Number of updates behind `params`.
        code: Why the fit ended, as a number; `reason` says it in words.
        broken: Place in `FIELDS` of the field whose update was not finite, or -1.
        floored: Emissions whose noise variance is held at its floor, `(emission_dim,)`: the likelihood has no maximum there
            (a constant channel, or one that the states explain exactly).
        kept: States whose row of the dynamics the data say nothing about, `(state_dim,)`; it keeps the value it started from.

    References:
        `docs/concepts.md`, "Learning".

    Examples:
        >>> import numpy as np, issm
        >>> start = issm.make_lgssm_params(0.0, 1.0, 0.5, 1.0, 1.0, 1.0)
        >>> fit = issm.fit_em(start, np.sin(np.arange(50.0))[:, None], num_iters=3)
        >>> fit.num_iters, fit.reason
        (3, 'stopped after num_iters updates, before the gain fell below the tolerance')
    """

    params: Any
    log_probs: Float[Array, "*batch num_log_probs"]
    log_priors: Float[Array, "*batch num_log_probs"]
    converged: bool | Bool[Array, "*batch"]
    num_iters: int | Int[Array, "*batch"]
    code: Int[Array, "*batch"]
    broken: Int[Array, "*batch"]
    floored: Bool[Array, "*batch emission_dim"]
    kept: Bool[Array, "*batch state_dim"]

    @property
    def reason(self) -> str | list:
        """Why the fit ended, in words; a nested list of them for a batch of fits."""
        if not is_concrete(self.code):
            return "not known while JAX traces"
        parts = [np.asarray(part) for part in (self.code, self.broken, self.floored, self.kept)]
        return _describe(*parts)


FIELDS = (
    "initial.mean",
    "initial.cov",
    "dynamics.weights",
    "dynamics.bias",
    "dynamics.input_weights",
    "dynamics.cov",
    "emissions.weights",
    "emissions.bias",
    "emissions.input_weights",
    "emissions.cov",
)


def first_broken_field(params: Any) -> Int[Array, ""]:
    """Place in `FIELDS` of the first field with an entry that is not finite, or -1."""
    fields = [values_of(attrgetter(name)(params)) for name in FIELDS]
    finite = jnp.concatenate([jnp.isfinite(field).ravel() for field in fields])
    ends = np.cumsum([field.size for field in fields])
    return jnp.where(finite.all(), -1, (jnp.argmin(finite) >= ends).sum()).astype(jnp.int32)


def _describe(code: np.ndarray, broken: np.ndarray, floored: np.ndarray, kept: np.ndarray) -> str | list:
    if code.ndim:
        return [_describe(*map(np.asarray, one)) for one in zip(code, broken, floored, kept, strict=True)]
    reason = REASONS[Code(int(code))]
    if broken >= 0:
        reason += f" (not finite: {FIELDS[int(broken)]})"
    if floored.any():
        reason += f"; noise variance at its floor for emission {_numbers(floored)}: constant, or explained exactly"
    if kept.any():
        reason += f"; the data say nothing about the dynamics of state {_numbers(kept)}: kept as they were"
    return reason


def _numbers(flags: np.ndarray) -> str:
    return ", ".join(str(i) for i in np.flatnonzero(flags))
