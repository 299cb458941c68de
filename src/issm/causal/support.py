"""Which clamps were ever put on, and whether a plan is among what they span."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from issm._check import check_shape
from issm._tables import join_words
from issm.causal.history import check_plan
from issm.interventions import Intervention

TOLERANCE = {"float64": 1e-5, "float32": 3e-3}
"""Share of a clamp, as a length, that may lie outside the span of others before it counts; a square root of rounding."""


class Support(eqx.Module):
    r"""What the clamps of the data reached.

    Attributes:
        lowest: Lowest value each state was clamped to, `(state_dim,)`; infinite where it was never clamped.
        highest: Highest value, same shape; minus infinite where it was never clamped.
        gram: $\sum v_t v_t^\top$ of the clamp vectors $v_t$, zero where a state is free, `(state_dim, state_dim)`.
        together: Number of steps in which i and j were both clamped, `(state_dim, state_dim)`.

    References:
        `docs/how-to/can-the-data-tell.md`.

    Examples:
        >>> import issm
        >>> issm.identifiability(issm.do({0: 2.0}, num_timesteps=4, state_dim=2)).support.highest.tolist()
        [2.0, -inf]
    """

    lowest: Float[Array, " state_dim"]
    highest: Float[Array, " state_dim"]
    gram: Float[Array, "state_dim state_dim"]
    together: Float[Array, "state_dim state_dim"]


class PlanCheck(eqx.Module):
    """Whether the clamps of the data reach a plan; result of `Identifiability.check_plan`.

    Attributes:
        never_clamped: States of the plan that the data never clamp, `(state_dim,)`.
        beyond_range: States that the plan holds at values outside of the range they were clamped to, `(state_dim,)`: the model
            extrapolates.
        outside_span: Share of the plan's clamp vector, as a length between 0 and 1, that no combination of the data's clamp
            vectors gives, at every step, `(num_timesteps,)` or with a leading trial axis. Every state is measured in units of its
            own clamps.
        supported: Whether none of this holds, `()`.

    References:
        `docs/how-to/can-the-data-tell.md`.

    Examples:
        >>> import issm
        >>> together = issm.do({0: 1.0, 1: 1.0}, num_timesteps=4, state_dim=2, stop=2)
        >>> check = issm.identifiability(together).check_plan(issm.do({0: 1.0}, num_timesteps=1, state_dim=2))
        >>> bool(check.supported), [round(float(share), 2) for share in check.outside_span]
        (False, [0.71])
    """

    never_clamped: Bool[Array, " state_dim"]
    beyond_range: Bool[Array, " state_dim"]
    outside_span: Float[Array, "*trials num_timesteps"]
    supported: Bool[Array, ""]

    def summary(self) -> str:
        """The verdict in words.

        Returns:
            One line for each finding.
        """
        if bool(self.supported):
            return "the plan is within what the data's clamps span"
        numbers = lambda flags: join_words([int(i) for i in np.flatnonzero(np.asarray(flags))])  # noqa: E731
        lines = [
            f"state {numbers(flags)}: {words}"
            for flags, words in (
                (self.never_clamped, "in the plan, but never clamped in the data"),
                (self.beyond_range, "held at values beyond those of the data"),
            )
            if np.asarray(flags).any()
        ]
        steps = np.asarray(self.outside_span).reshape(-1, self.outside_span.shape[-1]).max(axis=0)
        outside = steps > TOLERANCE[steps.dtype.name]
        if outside.any():
            lines.append(
                f"{int(outside.sum())} of {len(steps)} steps clamp a combination that the data's clamps do not span"
                f" (up to {steps.max():.0%} of it)"
            )
        return "\n".join(lines)


def support_of(mask: Bool[Array, "*trials num_timesteps state_dim"], value: Array) -> Support:
    """What these clamps reach."""
    axes = tuple(range(mask.ndim - 1))
    vectors = jnp.where(mask, value, 0.0).reshape(-1, mask.shape[-1])
    clamped = mask.reshape(vectors.shape).astype(vectors.dtype)
    return Support(
        lowest=jnp.where(mask, value, jnp.inf).min(axes),
        highest=jnp.where(mask, value, -jnp.inf).max(axes),
        gram=vectors.T @ vectors,
        together=clamped.T @ clamped,
    )


def check_support(support: Support, plan: Intervention) -> PlanCheck:
    """Hold a plan against what was reached."""
    check_plan("plan", plan)
    state_dim = support.lowest.shape[0]
    check_shape(
        "plan",
        plan.mask[..., 0, :],
        (*plan.mask.shape[:-2], state_dim),
        ("state_dim",),
        "Ask about the states of the data.",
    )
    return _check_support(support, plan)


@jax.jit
def _check_support(support: Support, plan: Intervention) -> PlanCheck:
    mask, value = plan.mask, plan.value.astype(support.gram.dtype)
    axes = tuple(range(mask.ndim - 1))
    steps = jnp.diagonal(support.together)
    used = mask.any(axes)
    tolerance = TOLERANCE[value.dtype.name]
    slack = tolerance * jnp.where(steps > 0, support.highest - support.lowest, 0.0)
    lowest, highest = jnp.where(mask, value, jnp.inf).min(axes), jnp.where(mask, value, -jnp.inf).max(axes)
    beyond = used & (steps > 0) & ((lowest < support.lowest - slack) | (highest > support.highest + slack))

    sizes = jnp.sqrt(jnp.diagonal(support.gram) / jnp.maximum(steps, 1.0))
    scale = jnp.where(sizes > 0, 1 / jnp.where(sizes > 0, sizes, 1.0), 1.0)
    values, vectors = jnp.linalg.eigh(support.gram * scale[:, None] * scale[None])
    basis = jnp.where((values > tolerance**2 * values[-1])[None], vectors, 0.0)
    clamps = jnp.where(mask, value * scale[(None,) * (mask.ndim - 1)], 0.0)
    rest = clamps - clamps @ basis @ basis.T
    length = jnp.linalg.norm(jnp.where((clamps == 0).all(axis=-1, keepdims=True), 1.0, clamps), axis=-1)
    outside = jnp.sqrt((rest**2).sum(axis=-1)) / length
    never = used & (steps == 0)
    supported = ~(never.any() | beyond.any() | (outside > tolerance).any())
    return PlanCheck(never, beyond, outside, supported)
