"""The estimator of rollouts that branch: the tokens of an edge are scored from the canvas it starts at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.estimators.views import attend_real_tokens
from d1lit.types import Context, Corruption, EstimatorTraits, LogProbs, Rollout, Tree


@dataclass(frozen=True)
class TreeEdgesEstimator:
    """d-TreeRPO (arXiv 2512.09675): log-probs of the tokens fixed on an edge, all read off its parent's canvas.

    One view a PARENT, shared by all edges that leave it and all leaves below: 1 + b + ... + b^(height - 1) a group. A
    token counts up to the end of sequence on the child's canvas.
    In the sum over leaves an edge counts once, however many leaves lie below, and so do its tokens together: a token
    weighs 1 / (leaves below the edge x tokens of the edge x edges a leaf). With `sequence_sum` the loss is the mean
    over edges of the mean over an edge's tokens, as in the authors' code, an edge after the end of the sequence being a
    0 in it; with `token_mean` the mean over edges that fixed something.
    """

    tree: Tree
    temperature: float
    exclude_mask: bool = False
    """Leave the mask token out of the softmax, as the sampler does; published code lets it take its share."""

    @property
    def traits(self) -> EstimatorTraits:
        """One unit a token of such trees."""
        return EstimatorTraits("token", needs_trace=True, tree=self.tree, parts=frozenset({"edge", "token_ids"}))

    def corrupt(self, context: Context) -> Corruption:
        """Views in the order (level, node): K = height views score a rollout.

        Raises:
            ValueError: if the rollouts are not those of such a tree.
        """
        rollout, tree, edge = context.rollout, self.tree, self._edge(context)
        row = torch.arange(len(edge), device=edge.device)
        noised, prompts, masks, view_of, count = [], [], [], [], 0
        for level in range(tree.height):
            first = slice(None, None, tree.width(level))  # one leaf below each node: up to its canvas all are alike
            noised.append(torch.where(edge[first] >= level, context.mask_token_id, rollout.completion_ids[first]))
            prompts.append(rollout.prompt_ids[first])
            masks.append(rollout.prompt_mask[first])
            view_of.append(count + row // tree.width(level))
            count += len(noised[-1])
        scored = _tokens_of_edges(rollout, edge, tree.height)
        return Corruption(
            noised_ids=torch.cat([torch.cat(prompts), torch.cat(noised)], dim=1),
            view_of=torch.stack(view_of, dim=1),
            target_ids=rollout.completion_ids[:, None].expand_as(scored),
            weight=scored.to(torch.float32),
            score_from=rollout.prompt_ids.shape[1],
            attention=attend_real_tokens(torch.cat(masks), edge.shape[1]),
            temperature=self.temperature,
            exclude_mask=self.exclude_mask,
        )

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """Each token from the view of its edge's parent; the parts say which edge that is, and which token."""
        scored, tree = corruption.weight, self.tree
        share = scored.new_tensor([1 / tree.width(level + 1) for level in range(tree.height)])  # edges a leaf
        weight = scored * (share / share.sum())[:, None] / scored.sum(2, keepdim=True).clamp(min=1)
        parts = {"edge": self._edge(context), "token_ids": context.rollout.completion_ids}
        return LogProbs((view_logprobs * scored).sum(1), weight.sum(1).to(view_logprobs.dtype), parts)

    def _edge(self, context: Context) -> Int[Tensor, "N C"]:
        rollout, leaves = context.rollout, self.tree.leaves
        if rollout.edge is None or rollout.group_size != leaves:
            raise ValueError(
                f"estimator: TreeEdgesEstimator scores the {leaves} leaves of a tree, and these are groups of "
                f"{rollout.group_size}{'' if rollout.edge is not None else ' that did not branch'}. Try: sampler=tree"
            )
        return rollout.edge


def _tokens_of_edges(rollout: Rollout, edge: Int[Tensor, "N C"], height: int) -> Bool[Tensor, "N K C"]:
    """The tokens that count of each edge: those it fixed, up to the first end of sequence on the CHILD's canvas.

    A later edge may end the sequence before tokens that stand already. Were they left out where it does, leaves below
    an edge would not agree on what it fixed.
    """
    ids, length = rollout.completion_ids, rollout.completion_mask.sum(1, keepdim=True)
    # The last valid token ends the sequence, except where the canvas does.
    ends = (ids == ids.gather(1, (length - 1).clamp(min=0))) & (length < ids.shape[1])
    level = torch.arange(height, device=edge.device)[:, None]
    seen = (ends[:, None] & (edge[:, None] <= level)).to(torch.int64)
    return (edge[:, None] == level) & (seen.cumsum(2) - seen == 0)
