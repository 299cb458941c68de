"""Effects with their uncertainty, source by source: what every causal question about a change gives back."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from issm.causal.summaries import effect_table
from issm.causal.uncertainty import Spread


class Effect(eqx.Module):
    """An effect with its uncertainty, source by source; all arrays have the shape of `mean`.

    Attributes:
        mean: The expected effect, in the units of what it is an effect on.
        trial: Spread of the effect from trial to trial, the parameters being known: the two worlds of a trial share its initial
            state, process noise and emission noise. Zero where the effect is the same in every trial.
        parameter: Uncertainty of the expected effect for want of knowledge of the parameters; None where they are taken as
            known.
        total: Both together: where the effect in one new trial may lie.

    References:
        `docs/concepts.md`, "Effects".

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> effect = issm.causal_effect(params, issm.do({0: 2.0}, num_timesteps=3, state_dim=1)).average
        >>> effect.mean.tolist(), effect.parameter is None
        ([2.0], True)
    """

    mean: Float[Array, "*shape"]
    trial: Spread
    parameter: Spread | None
    total: Spread

    @property
    def sd(self) -> Float[Array, "*shape"]:
        """Standard deviation, all sources together."""
        return self.total.sd

    @property
    def lower(self) -> Float[Array, "*shape"]:
        """Lower end of the interval, all sources together."""
        return self.total.lower

    @property
    def upper(self) -> Float[Array, "*shape"]:
        """Upper end of the interval, all sources together."""
        return self.total.upper


class EffectEstimate(eqx.Module):
    """Result of `causal_effect`: the effect at every step, and over the window that was asked for.

    `mean`, `sd`, `lower` and `upper` are those of `per_step`, all sources of uncertainty together.

    Attributes:
        per_step: At every step of the plan, `(num_timesteps, num_outputs)`.
        cumulative: Summed from the start of the window up to every step, `(num_timesteps, num_outputs)`.
        average: Averaged over the window, `(num_outputs,)`.
        relative: The average effect over the average expected outcome under the reference, `(num_outputs,)`; NaN where that is
            zero.
        level: Level of the intervals.

    All have a leading trial axis if the plan, the reference, the history or the inputs have one and trials are not averaged.

    References:
        Brodersen et al. (2015), *Annals of Applied Statistics* 9, sec. 2.3 (point, average, cumulative and relative effects).

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[1.0]], [0.5], emissions_bias=[10.0])
        >>> plan = issm.do({0: 4.0}, num_timesteps=3, state_dim=1, stop=1)
        >>> effect = issm.causal_effect(params, plan)
        >>> effect.mean[:, 0].tolist(), effect.cumulative.mean[:, 0].tolist()
        ([4.0, 2.0, 1.0], [4.0, 6.0, 7.0])
    """

    per_step: Effect
    cumulative: Effect
    average: Effect
    relative: Effect
    level: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, "*trials num_timesteps num_outputs"]:
        """The expected effect at every step."""
        return self.per_step.mean

    @property
    def sd(self) -> Float[Array, "*trials num_timesteps num_outputs"]:
        """Its standard deviation at every step, all sources together."""
        return self.per_step.sd

    @property
    def lower(self) -> Float[Array, "*trials num_timesteps num_outputs"]:
        """Lower end of the interval at every step."""
        return self.per_step.lower

    @property
    def upper(self) -> Float[Array, "*trials num_timesteps num_outputs"]:
        """Upper end of the interval at every step."""
        return self.per_step.upper

    def summary(self) -> str:
        """Average, cumulative and relative effect of every output (and trial), with interval and two-sided tail probability.

        Returns:
            A table.
        """
        end = jax.tree.map(lambda leaf: leaf[..., -1, :], self.cumulative)
        parts = {"average": self.average, "cumulative": end, "relative": self.relative}
        return effect_table(parts, title=f"Effect over the window, {float(self.level):.0%} intervals")
