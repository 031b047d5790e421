"""What watches a stage: progress, samples, checkpoints, signals, guards."""

from d1lit.callbacks.alarms import Alarm, CollapseAlarms
from d1lit.callbacks.guards import SkipNonFinite
from d1lit.callbacks.progress import ConsoleProgress
from d1lit.callbacks.samples import SampleTable
from d1lit.callbacks.saving import SaveCheckpoints
from d1lit.callbacks.signals import StopOnSignal
from d1lit.callbacks.validation import Validate

__all__ = [
    "Alarm",
    "CollapseAlarms",
    "ConsoleProgress",
    "SampleTable",
    "SaveCheckpoints",
    "SkipNonFinite",
    "StopOnSignal",
    "Validate",
]
