"""How well predictions, states and fits agree: with the truth, or with each other."""

from issm.metrics.agreement import r2 as r2
from issm.metrics.agreement import relative_error as relative_error
from issm.metrics.alignment import Alignment as Alignment
from issm.metrics.alignment import align_states as align_states
from issm.metrics.co_smoothing import CoSmoothing as CoSmoothing
from issm.metrics.co_smoothing import co_smoothing as co_smoothing
from issm.metrics.consistency import Consistency as Consistency
from issm.metrics.consistency import consistency as consistency
