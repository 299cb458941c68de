"""What a fit of a general model returns, and why it ended."""

import enum
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from issm._host import is_concrete
from issm.models.ssm import SSM


class Code(enum.IntEnum):
    """Why a stage of a fit ended, as a number that a compiled loop can carry."""

    RUNNING = 0
    CONVERGED = 1
    MAX_ITERS = 2
    STOPPED_EARLY = 3
    START_NOT_FINITE = 4
    OBJECTIVE_NOT_FINITE = 5
    UPDATE_NOT_FINITE = 6
    INTERRUPTED = 7


REASONS = {
    Code.RUNNING: "still running",
    Code.CONVERGED: "converged: the last update gained less than the tolerance",
    Code.MAX_ITERS: "stopped after the largest number of updates",
    Code.STOPPED_EARLY: "stopped early: the held-out trials had ceased to gain; the parameters best for them are returned",
    Code.START_NOT_FINITE: "did not start: the objective of the starting parameters is not finite (rates that overflow, or a"
    " path that diverges)",
    Code.OBJECTIVE_NOT_FINITE: "stopped because the objective after an update was not finite; the parameters before it are"
    " returned",
    Code.UPDATE_NOT_FINITE: "stopped because an update was not finite; the parameters before it are returned",
    Code.INTERRUPTED: "interrupted; the last parameters that are known to be finite are returned",
}


class SSMFit(eqx.Module):
    r"""A fitted general model, and how the fit went; every objective is in nats for each observed entry.

    Attributes:
        params: The model, in the structure of the one that the fit started from.
        rollout_log_probs: $\log p(y \mid f(x))$ along the deterministic path before every update of the rollout stage,
            `(num_updates + 1,)`. Empty if there was no such stage.
        log_probs: Objective before every update of the main stage, `(num_iters + 1,)`: Laplace's marginal log-likelihood, or
            the evidence lower bound. Under `jit` or `vmap` both logs have the largest possible length, and entries beyond the
            last repeat it.
        held_out: The same on the held-out trials; zero if there are none.
        converged: Whether the last update of the main stage gained less than the tolerance.
        num_iters: Number of updates of the main stage.
        best_iter: How many of them are behind `params`: all, or with `patience` those up to the best held-out objective.
        code: Why the fit ended, as a number; `reason` says it in words.
        recognition: The trained recognition network of a variational fit, or None.

    References:
        `docs/how-to/other-emissions.md`.

    Examples:
        >>> import jax, numpy as np, issm
        >>> counts = np.array([[0.0], [2.0], [1.0], [3.0], [2.0], [0.0]])
        >>> start = issm.initialize_ssm(jax.random.key(0), counts, 1, likelihood="poisson", widths=())
        >>> fit = issm.fit_laplace_em(start, counts, num_iters=2)
        >>> fit.log_probs.shape, fit.reason
        ((3,), 'stopped after the largest number of updates')
    """

    params: SSM
    rollout_log_probs: Float[Array, "*batch num_rollout_log_probs"]
    log_probs: Float[Array, "*batch num_log_probs"]
    held_out: Float[Array, "*batch num_log_probs"]
    converged: Bool[Array, "*batch"]
    num_iters: Int[Array, "*batch"]
    best_iter: Int[Array, "*batch"]
    code: Int[Array, "*batch"]
    recognition: Any = None

    @property
    def reason(self) -> str | list:
        """Why the fit ended, in words; a nested list of them for a batch of fits."""
        if not is_concrete(self.code):
            return "not known while JAX traces"
        return _describe(np.asarray(self.code))


def _describe(code: Any) -> str | list:
    return [_describe(one) for one in code] if np.ndim(code) else REASONS[Code(int(code))]
