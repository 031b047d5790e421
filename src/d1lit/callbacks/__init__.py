"""What watches a stage: progress, checkpoints, signals."""

from d1lit.callbacks.progress import ConsoleProgress
from d1lit.callbacks.saving import SaveCheckpoints
from d1lit.callbacks.signals import Interrupted, StopFlag, StopOnSignal

__all__ = ["ConsoleProgress", "Interrupted", "SaveCheckpoints", "StopFlag", "StopOnSignal"]
