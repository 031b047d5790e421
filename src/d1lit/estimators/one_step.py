"""d1's one-step estimator: every completion token from one look at a fully masked completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from d1lit.estimators.views import attend_real_tokens, mask_prompt, token_logprobs
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs


@dataclass(frozen=True)
class OneStepEstimator:
    """One-step mean-field log-probabilities of d1 (arXiv 2504.12216).

    The completion is fully masked and each prompt token is masked with a small probability; the log-probability of a
    token is read off at its position. New prompt masks at every inner update. With several masks the log-probabilities
    are averaged.
    """

    prompt_mask_prob: float
    num_masks: int
    """Prompt masks per rollout and inner update; 1 in d1."""
    share_within_group: bool
    """All rollouts of a prompt share its prompt masks, and so their views: R = B views instead of N. d1: False."""
    mask_padding: bool = False
    """Draw masks on left padding too, as d1's code does."""
    temperature: float = 1.0
    guidance: float = 0.0
    traits: ClassVar[EstimatorTraits] = EstimatorTraits("token", is_mean_field=True)

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 <= self.prompt_mask_prob <= 1:
            raise ValueError(
                f"estimator.prompt_mask_prob: must be in [0, 1], got {self.prompt_mask_prob}. Try: d1's 0.15"
            )
        if self.num_masks < 1:
            raise ValueError(f"estimator.num_masks: must be >= 1, got {self.num_masks}. Try: 1")

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (owner, mask), the owner being the rollout or the group."""
        rollout, num_masks = context.rollout, self.num_masks
        num_rollouts, completion_length = rollout.completion_ids.shape
        stride = rollout.group_size if self.share_within_group else 1
        owners = slice(None, None, stride)
        row_ids = rollout.row_ids[owners] // stride
        prompts = torch.stack(
            [
                mask_prompt(rollout, context, row_ids, owners, k, self.prompt_mask_prob, self.mask_padding)
                for k in range(num_masks)
            ],
            dim=1,
        ).flatten(0, 1)  # [R, P]
        completions = prompts.new_full((len(prompts), completion_length), context.mask_token_id)
        owner_of = torch.arange(num_rollouts, device=rollout.device) // stride
        view_of = owner_of[:, None] * num_masks + torch.arange(num_masks, device=rollout.device)
        prompt_mask = rollout.prompt_mask[owners].repeat_interleave(num_masks, dim=0)
        share = rollout.completion_mask.to(torch.float32) / num_masks
        return Corruption(
            noised_ids=torch.cat([prompts, completions], dim=1),
            view_of=view_of,
            target_ids=rollout.completion_ids[:, None, :].expand(-1, num_masks, -1),
            weight=share[:, None, :].expand(-1, num_masks, -1),
            score_from=prompts.shape[1],
            attention=attend_real_tokens(prompt_mask, completion_length),
            temperature=self.temperature,
            guidance=self.guidance,
        )

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The mean over masks, token by token."""
        return token_logprobs(view_logprobs, corruption)
