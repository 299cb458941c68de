"""What a fit by gradients returns, and why it ended."""

import enum
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from issm._host import is_concrete


class Code(enum.IntEnum):
    """Why a fit ended."""

    RUNNING = 0
    CONVERGED = 1
    MAX_EPOCHS = 2
    START_NOT_FINITE = 3
    LOSS_NOT_FINITE = 4
    GRADIENT_NOT_FINITE = 5
    UPDATE_NOT_FINITE = 6
    INTERRUPTED = 7


REASONS = {
    Code.RUNNING: "still running",
    Code.CONVERGED: "converged: the loss that is watched has not improved by more than the tolerance for `patience` epochs",
    Code.MAX_EPOCHS: "stopped after num_epochs epochs",
    Code.START_NOT_FINITE: "did not start: the loss of the starting parameters is not finite",
    Code.LOSS_NOT_FINITE: "stopped because the loss after an update was not finite; the best parameters before it are returned",
    Code.GRADIENT_NOT_FINITE: "stopped because a gradient was not finite; the best parameters before it are returned",
    Code.UPDATE_NOT_FINITE: "stopped because an update was not finite; the best parameters before it are returned",
    Code.INTERRUPTED: "interrupted; the best parameters so far are returned",
}


class SGDResult(eqx.Module):
    r"""Parameters fitted by gradients, and how the fit went.

    Attributes:
        params: The best parameters met, in the structure of those that the fit started from: by the held-out trials if there are
            any, else by the loss of all trials; with batches and nothing held out, the last.
        log_probs: `log_probs[k]` is the log-likelihood of the trials learned from (minus the loss, for a loss of your own)
            before epoch k, `(num_epochs + 1,)`. With batches: of the parameters that each batch met, except for the last entry.
            Under `jit` or `vmap` the length is the largest possible one, and entries beyond the last repeat it.
        held_out_log_probs: The same of the held-out trials before epoch k; None without any.
        converged: Whether the fit ended because nothing improved any more.
        num_epochs: Number of epochs that were run.
        best_epoch: Number of epochs behind `params`.
        code: Why the fit ended, as a number; `reason` says it in words.
        broken: Place in `fields` of the field whose gradient or update was not finite, or -1.
        fields: Names of the arrays of the parameters.

    References:
        Prechelt (1998), *Early Stopping, But When?*, for the held-out trials.

    Examples:
        >>> import numpy as np, issm
        >>> start = issm.make_lgssm_params(0.0, 1.0, 0.5, 1.0, 1.0, 1.0)
        >>> fit = issm.fit_sgd(start, np.sin(np.arange(50.0))[:, None], num_epochs=3)
        >>> fit.num_epochs, fit.reason
        (3, 'stopped after num_epochs epochs')
    """

    params: Any
    log_probs: Float[Array, "*batch num_log_probs"]
    held_out_log_probs: Float[Array, "*batch num_log_probs"] | None
    converged: bool | Bool[Array, "*batch"]
    num_epochs: int | Int[Array, "*batch"]
    best_epoch: int | Int[Array, "*batch"]
    code: Int[Array, "*batch"]
    broken: Int[Array, "*batch"]
    fields: tuple[str, ...] = eqx.field(static=True)

    @property
    def reason(self) -> str | list:
        """Why the fit ended, in words; a list of them for a batch of fits."""
        if not is_concrete(self.code):
            return "not known while JAX traces"
        codes, broken = np.asarray(self.code), np.asarray(self.broken)
        if codes.ndim == 0:
            return self._describe(codes, broken)
        return [self._describe(*pair) for pair in zip(codes.ravel(), broken.ravel(), strict=True)]

    def _describe(self, code: np.ndarray, broken: np.ndarray) -> str:
        where = f" (not finite: {self.fields[int(broken)]})" if broken >= 0 else ""
        return REASONS[Code(int(code))] + where
