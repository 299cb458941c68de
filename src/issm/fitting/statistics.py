r"""The E step: expected sufficient statistics of the parameters, sums over trials and time only.

All residuals are those of the current parameters. Means are summed over trials, covariances over the patterns that trials share.
"""

import equinox as eqx
from jaxtyping import Array, Float

from issm.fitting.arrival_statistics import dynamics_statistics, initial_statistics
from issm.fitting.emission_statistics import emission_statistics
from issm.fitting.mask_patterns import Patterns
from issm.fitting.regression import PatternStatistics, RowStatistics
from issm.fitting.step_data import StepData
from issm.inference.methods import filter_and_smooth
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials


class SufficientStatistics(eqx.Module):
    """What an M step needs, with the log-likelihood of the parameters that it was computed with."""

    log_prob: Float[Array, ""]
    initial: RowStatistics | PatternStatistics
    dynamics: RowStatistics | PatternStatistics
    emissions: RowStatistics | PatternStatistics


def expected_statistics(
    params: ParamsLGSSM, trials: Trials, patterns: Patterns, method: str = "auto"
) -> SufficientStatistics:
    """Smooth every trial and add up what the M step needs."""
    moments = filter_and_smooth(params, trials, method)
    data = StepData(trials)
    return SufficientStatistics(
        log_prob=moments.logliks.sum(),
        initial=initial_statistics(params, moments, data, patterns.initial),
        dynamics=dynamics_statistics(params, moments, data, patterns.dynamics),
        emissions=emission_statistics(params, moments, data),
    )
