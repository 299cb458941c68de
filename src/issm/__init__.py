"""Causal state-space modelling of dynamical systems under intervention, in JAX."""

from issm.fitting.em import fit_em as fit_em
from issm.fitting.initialize import initialize_lgssm as initialize_lgssm
from issm.fitting.priors import Priors as Priors
from issm.fitting.priors import RegressionPrior as RegressionPrior
from issm.fitting.result import FitResult as FitResult
from issm.inference.kalman import PosteriorGSSMFiltered as PosteriorGSSMFiltered
from issm.inference.kalman import lgssm_filter as lgssm_filter
from issm.inference.kalman import marginal_log_prob as marginal_log_prob
from issm.inference.posterior import posterior_sample as posterior_sample
from issm.inference.smoother import PosteriorGSSMSmoothed as PosteriorGSSMSmoothed
from issm.inference.smoother import lgssm_smoother as lgssm_smoother
from issm.interventions import Intervention as Intervention
from issm.interventions import do as do
from issm.interventions import merge as merge
from issm.interventions import no_intervention as no_intervention
from issm.interventions import stimulate as stimulate
from issm.models.lgssm import ParamsLGSSM as ParamsLGSSM
from issm.models.lgssm import ParamsLGSSMDynamics as ParamsLGSSMDynamics
from issm.models.lgssm import ParamsLGSSMEmissions as ParamsLGSSMEmissions
from issm.models.lgssm import ParamsLGSSMInitial as ParamsLGSSMInitial
from issm.models.lgssm import TimeVarying as TimeVarying
from issm.models.lgssm import make_lgssm_params as make_lgssm_params
from issm.models.padding import pad_trials as pad_trials
from issm.models.sampling import lgssm_sample as lgssm_sample
