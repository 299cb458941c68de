"""Systems with known dynamics, stimulation protocols, and data drawn from the two."""

from issm.simulate.euler import euler_sample as euler_sample
from issm.simulate.linear import random_clamped_lgssm as random_clamped_lgssm
from issm.simulate.stimulation import random_stimulation as random_stimulation
from issm.simulate.systems import DynamicAttractor as DynamicAttractor
from issm.simulate.systems import Linear as Linear
from issm.simulate.systems import RotationalDynamics as RotationalDynamics
from issm.simulate.systems import Saddle as Saddle
from issm.simulate.systems import ff_integrator as ff_integrator
from issm.simulate.systems import line_attractor as line_attractor
from issm.simulate.systems import lr_integrator as lr_integrator
from issm.simulate.systems import orthogonal_lift as orthogonal_lift
from issm.simulate.systems import point_attractor as point_attractor
