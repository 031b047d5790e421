"""EBPO's bound (LLaDA2.1, arXiv 2602.08676): every block of the completion is noised at once, each at its own level."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from d1lit.attention import block_streams
from d1lit.draws import random_subset
from d1lit.estimators.elbo import scored_tokens, subset_views
from d1lit.estimators.views import sequence_logprobs
from d1lit.types import AttentionPattern, Context, Corruption, EstimatorTraits, LogProbs


@dataclass(frozen=True)
class BlockELBOEstimator:
    """A block-wise likelihood bound with all blocks in one view (EBPO of LLaDA2.1, arXiv 2602.08676).

        ELBO = mean over views k of sum over blocks b of (n_b / l_kb) sum_{i hidden in b} log p_i

    The levels of a rollout's (view, block) cells are evenly spaced from one random start, and a block of n_b tokens at
    level t hides floor(t n_b) + 1 of them.
    Differs from the paper, whose code is closed: read from the port in yjyddq/DARE.
    """

    num_views: int
    block_length: int
    count_from_prompt: bool
    """Blocks are counted from the first real prompt token, so the completion's first one may be short (as the port)."""
    two_stream: bool
    """Views [prompt; noised; clean] in which a noised block sees the clean blocks before it and nothing after: what a
    block-diffusion model is trained on (BD3LM, arXiv 2503.09573). False: the noised canvas alone, all of it seen."""

    @property
    def traits(self) -> EstimatorTraits:
        """A likelihood of sequences; in two streams neighbouring places may see other blocks."""
        blocks = AttentionPattern("blocks", None if self.count_from_prompt else self.block_length)
        pattern = blocks if self.two_stream else None
        return EstimatorTraits("sequence", needs_own_place=self.two_stream, pattern=pattern)

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (rollout, view)."""
        rollout = context.rollout
        valid, _ = scored_tokens(context, score_padding=False)
        block = self._blocks(context)
        sizes = torch.stack([((block == b) & valid).sum(1) for b in range(int(block.max()) + 1)], dim=1)  # [N, b]
        start = context.draws.uniform("block_time", rollout.row_ids, ())[:, None]
        present = (sizes > 0).sum(1, keepdim=True).clamp(min=1)
        number = torch.arange(sizes.shape[1], device=sizes.device)
        hidden, weight = [], []
        for k in range(self.num_views):
            level = (start + (k * present + number) / (self.num_views * present)) % 1
            count = torch.minimum((level * sizes).to(torch.int64) + 1, sizes)
            keys = context.draws.uniform("mask", rollout.row_ids, (valid.shape[1],), step=k)
            chosen = torch.stack(
                [random_subset(keys, count[:, b], valid & (block == b)) for b in number.tolist()], dim=1
            )
            share = sizes / count.clamp(min=1) / self.num_views
            hidden.append(chosen.any(1))
            weight.append((chosen * share[:, :, None]).sum(1))
        views = subset_views(context, torch.stack(hidden, 1), torch.stack(weight, 1).float(), score_padding=False)
        return _with_clean_copy(context, views, block) if self.two_stream else views

    def _blocks(self, context: Context) -> Int[Tensor, "N C"]:
        """Number of the block each completion position lies in, the completion's first being 0."""
        rollout = context.rollout
        place = torch.arange(rollout.completion_ids.shape[1], device=rollout.device).expand_as(rollout.completion_ids)
        first = rollout.prompt_mask.sum(1, keepdim=True) % self.block_length if self.count_from_prompt else 0
        return (first + place) // self.block_length

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """The weighted sum over views and tokens."""
        return sequence_logprobs(view_logprobs, corruption)


def _with_clean_copy(context: Context, views: Corruption, block: Int[Tensor, "N C"]) -> Corruption:
    """The clean completion behind each view, and who sees whom."""
    rollout, k = context.rollout, views.view_of.shape[1]
    prompt, length = rollout.prompt_ids.shape[1], rollout.completion_ids.shape[1]
    clean = rollout.completion_ids.repeat_interleave(k, 0)
    of = torch.cat([torch.full_like(rollout.prompt_ids, -1), block], 1)
    attention = block_streams(of, torch.cat([rollout.prompt_mask, rollout.completion_mask], 1), prompt)
    place = torch.arange(prompt + length, device=rollout.device)
    positions = torch.cat([place, place[prompt:]]).expand(len(clean), -1)
    noised_ids = torch.cat([views.noised_ids, clean], 1)
    return replace(views, noised_ids=noised_ids, attention=attention.repeat_interleave(k, 0), position_ids=positions)
