"""Lightning modules, one a stage, and their batches."""

from d1lit.modules.grpo import DiffuGRPO
from d1lit.modules.sft import MaskedSFT
from d1lit.modules.stage_data import Corpus, Demonstrations, Prompts, StageData

__all__ = ["Corpus", "Demonstrations", "DiffuGRPO", "MaskedSFT", "Prompts", "StageData"]
