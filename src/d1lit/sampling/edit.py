"""Edit rules: which tokens of the active block are replaced by what the network, which sees them, now prefers.

With one of these the commit steps in a rollout are those of the LAST token written at each place, and so are the
log-probs, confidences and entropies beside them; the canvases between can no longer be read off them (`record_trace`
keeps those).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class TokenEditing:
    """Token-to-token editing of LLaDA2.1 (arXiv 2602.08676): a standing token gives way to a more probable other one.

    With `Threshold` as the commit rule it is the joint threshold. Both act in every step of a block, on the same
    predictions. Once nothing is masked the block goes on for as long as steps change something, at most `num_checks`.
    Read in SGLang (joint_threshold) and in the dLLM toolkit's port, the paper's own code being closed. As in SGLang the
    other token is the most probable one at any temperature.
    Differs from both: the mask token takes no share of the probability, nor is a token ever replaced by it.
    """

    threshold: float
    """Probability that the other token must exceed; 0 replaces every token that is not the most probable one."""
    num_checks: int
    """Most steps of a block with nothing masked; 0: a block ends with its last mask."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"sampler.edit.threshold: {self.threshold} must be in [0, 1). Try: 0")
        if self.num_checks < 0:
            raise ValueError(f"sampler.edit.num_checks: {self.num_checks} must not be below 0. Try: 16")

    def select(self, probability: Float[Tensor, "n M"], differs: Bool[Tensor, "n M"]) -> Bool[Tensor, "n M"]:
        """Those sure enough of another token."""
        return differs & (probability > self.threshold)
