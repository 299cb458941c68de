"""Figures of fits, predictions and effects. Matplotlib is imported when a function is called, and axes come back.

Every function draws into `ax`, or into the axes of a new figure where none is given, so that panels can be combined.
"""

from issm.plotting.effects import plot_effect as plot_effect
from issm.plotting.effects import plot_response as plot_response
from issm.plotting.effects import plot_series_effect as plot_series_effect
from issm.plotting.experiments import plot_comparison as plot_comparison
from issm.plotting.experiments import plot_connectivity as plot_connectivity
from issm.plotting.experiments import plot_design as plot_design
from issm.plotting.residuals import plot_residuals as plot_residuals
from issm.plotting.selection import plot_state_dim_selection as plot_state_dim_selection
from issm.plotting.series import plot_flow_field as plot_flow_field
from issm.plotting.series import plot_interventions as plot_interventions
from issm.plotting.series import plot_log_probs as plot_log_probs
from issm.plotting.series import plot_prediction as plot_prediction
