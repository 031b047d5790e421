"""Advantages: from the rewards of whole groups to one number a rollout, or one for each edge or step of it.

Rows of one group are adjacent. A row no judge could judge (all its parts invalid) is left out of means and spreads
and gets advantage 0, so a crashed grader neither rewards nor punishes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from d1lit.draws import CounterDraws
from d1lit.types import Advantage, LogProbs, RewardBatch, Rollout, Tree

Rows = Float[Tensor, " N"]


def _grouped(rewards: RewardBatch, group_size: int) -> tuple[Float[Tensor, "B G"], Bool[Tensor, "B G"]]:
    """Totals and whether they count, one row a group."""
    if group_size < 2:
        raise ValueError(f"group_size: {group_size} leaves nothing to compare a rollout with. Try: group_size >= 2")
    if rewards.value.shape[0] % group_size:
        raise ValueError(f"group_size: {group_size} does not divide {rewards.value.shape[0]} rollouts")
    return rewards.total.view(-1, group_size), rewards.valid.any(-1).view(-1, group_size)


def judged_mean(value: Float[Tensor, "B G *S"], counts: Bool[Tensor, "B G *S"]) -> Float[Tensor, "B 1 *S"]:
    """Mean of each group over the entries that count; 0 where none does."""
    return (value * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)


def judged_std(value: Float[Tensor, "B G *S"], counts: Bool[Tensor, "B G *S"]) -> Float[Tensor, "B 1 *S"]:
    """Unbiased (n - 1) standard deviation over the entries that count; 0 where fewer than two do."""
    squares = ((value - judged_mean(value, counts)) ** 2 * counts).sum(1, keepdim=True)
    return (squares / (counts.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()


def _centred(rewards: RewardBatch, group_size: int) -> tuple[Float[Tensor, "B G"], Float[Tensor, "B G"], Tensor]:
    value, counts = _grouped(rewards, group_size)
    return (value - judged_mean(value, counts)) * counts, value, counts


def group_mean(rewards: RewardBatch, group_size: int) -> Rows:
    """A = R - mean of the group (d1, arXiv 2504.12216; Dr.GRPO, arXiv 2503.20783): no division by the spread."""
    centred, _, _ = _centred(rewards, group_size)
    return centred.flatten()


def group_zscore(rewards: RewardBatch, group_size: int, eps: float = 1e-4) -> Rows:
    """A = (R - mean) / (std + eps) within the group (GRPO, arXiv 2402.03300); eps 1e-4 in TRL, 1e-6 in verl."""
    centred, value, counts = _centred(rewards, group_size)
    return (centred / (judged_std(value, counts) + eps)).flatten()


def group_mean_batch_std(rewards: RewardBatch, group_size: int, eps: float = 1e-4) -> Rows:
    """A = (R - group mean) / (std of the rewards of the whole batch + eps) (TRL's `scale_rewards="batch"`)."""
    centred, value, counts = _centred(rewards, group_size)
    return (centred / (judged_std(value.view(1, -1), counts.view(1, -1)) + eps)).flatten()


def leave_one_out(rewards: RewardBatch, group_size: int) -> Rows:
    """A_i = R_i - mean of the others (RLOO, arXiv 2402.14740; DiffuCoder, ESPO): n / (n - 1) times R - mean."""
    centred, _, counts = _centred(rewards, group_size)
    n = counts.sum(1, keepdim=True)
    return (centred * n / (n - 1).clamp(min=1)).flatten()


def leave_one_out_zscore(rewards: RewardBatch, group_size: int, eps: float = 1e-4) -> Rows:
    """Leave-one-out advantage over the group's standard deviation (DiffuCoder's `scale_rewards`)."""
    _, value, counts = _centred(rewards, group_size)
    return (leave_one_out(rewards, group_size).view_as(value) / (judged_std(value, counts) + eps)).flatten()


def group_median(rewards: RewardBatch, group_size: int) -> Rows:
    """A = R - median of the group (mean of the middle two when even): one outlier does not move the baseline; ours."""
    value, counts = _grouped(rewards, group_size)
    middle = torch.where(counts, value, torch.nan).nanquantile(0.5, dim=1, keepdim=True)
    return torch.where(counts, value - middle, 0.0).flatten()


def normalize_then_sum(rewards: RewardBatch, group_size: int, eps: float = 1e-4) -> Rows:
    """Each reward part is z-scored in its group, then the weighted sum over the batch (NVIDIA's multi-reward GDPO).

    Not the diffusion method called GDPO (arXiv 2510.08554).
    """
    _, counts = _grouped(rewards, group_size)
    parts = []
    for part in range(rewards.value.shape[1]):
        value = rewards.value[:, part].view(-1, group_size)
        valid = rewards.valid[:, part].view(-1, group_size)
        parts.append(
            (value - judged_mean(value, valid)) * valid / (judged_std(value, valid) + eps) * rewards.weights[part]
        )
    total, counts = torch.stack(parts).sum(0).view(1, -1), counts.view(1, -1)
    return ((total - judged_mean(total, counts)) * counts / (judged_std(total, counts) + eps)).flatten()


def whiten(advantages: Rows, eps: float = 1e-4) -> Rows:
    """Shift and scale the whole batch to mean 0 and standard deviation 1."""
    return (advantages - advantages.mean()) / (advantages.std() + eps)


def token_whitened(advantages: Rows, completion_mask: Bool[Tensor, "N C"], eps: float = 1e-8) -> Float[Tensor, "N C"]:
    """A rollout's advantage on each of its tokens, whitened over those of the batch (REINFORCE++, arXiv 2501.03262).

    So long completions weigh more in mean and spread. With `group_mean` it is verl's "reinforce++ baseline".
    """
    weight = completion_mask.to(advantages.dtype)
    tokens, count = advantages[:, None] * weight, weight.sum()
    mean = tokens.sum() / count
    variance = (((tokens - mean) ** 2) * weight).sum() / (count - 1).clamp(min=1)
    return (tokens - mean) * torch.rsqrt(variance + eps) * weight


LengthPenalty = Callable[[Rollout], Rows]
"""A part of the reward that reads lengths in tokens."""


def overlong_penalty(rollout: Rollout, cache: int) -> Rows:
    """DAPO's soft overlong punishment (arXiv 2503.14476): 0 up to C - cache tokens, then falling to -1 at C tokens.

    Differs from the paper: C, the longest completion, is the canvas, so nothing is longer.
    """
    canvas = rollout.completion_ids.shape[1]
    length = rollout.completion_mask.sum(1).to(torch.float32)
    return ((canvas - cache - length) / cache).clamp(-1.0, 0.0)


def with_part(rewards: RewardBatch, value: Rows, weight: float) -> RewardBatch:
    """The rewards with one part more, which is always valid."""
    ones = torch.ones(len(value), 1, dtype=torch.bool, device=value.device)
    asked = rewards.asked
    return replace(
        rewards,
        value=torch.cat([rewards.value, value.to(rewards.value.dtype)[:, None]], 1),
        valid=torch.cat([rewards.valid, ones], 1),
        weights=torch.cat([rewards.weights, rewards.weights.new_tensor([weight])]),
        asked=None if asked is None else torch.cat([asked, ones], 1),
    )


def has_spread(rewards: RewardBatch, group_size: int, tolerance: float = 1e-6) -> Bool[Tensor, " B"]:
    """Which groups can teach anything: those whose rewards differ (dynamic sampling of DAPO, arXiv 2503.14476)."""
    value, counts = _grouped(rewards, group_size)
    return judged_std(value, counts)[:, 0] > tolerance


@dataclass(frozen=True)
class StepAdvantage:
    """MDPO (arXiv 2508.13148): of each denoising step, what its prediction gained and how good the later ones are.

        raw_k = R_k - R_(k-1) + mean of R_(k+1) ... R_S,   A_k = (raw_k - mean) / (std + eps) over the group at step k

    R_k judges the text that step k predicts, every mask filled. The first step counts its own reward as its gain, the
    last one its own as its future. Steps that a rollout did not take (it had ended) and those that no judge could judge
    are in no gain, mean or spread, and have advantage 0.
    Differs from the paper: the 1 that it adds to every gain is left out, for it cancels in the group.
    """

    eps: float = 1e-4
    of_steps: ClassVar[bool] = True

    def __call__(self, rewards: RewardBatch, group_size: int) -> Float[Tensor, "N S"]:
        """[N S]; rewards of whole completions count as those of a single step."""
        num_rows = len(rewards.value)
        value, counts = (x.reshape(num_rows, -1) for x in (rewards.total, rewards.valid.any(-1)))
        steps = torch.arange(value.shape[1], device=value.device)
        latest = torch.where(counts, steps, -1).cummax(1).values.roll(1, dims=1)  # the step before that counts
        latest[:, 0] = -1
        gain = value - torch.where(latest >= 0, value.gather(1, latest.clamp(min=0)), 0.0)
        later, left = (_after(x) for x in (value * counts, counts.to(value.dtype)))
        raw = gain + torch.where(left > 0, later / left.clamp(min=1), value)
        raw, counts = (x.view(-1, group_size, len(steps)) for x in (raw, counts))
        centred = (raw - judged_mean(raw, counts)) * counts
        return (centred / (judged_std(raw, counts) + self.eps)).view(num_rows, -1)


def _after(value: Float[Tensor, "N S"]) -> Float[Tensor, "N S"]:
    """The sum over later steps."""
    return value.flip(1).cumsum(1).flip(1) - value


@dataclass(frozen=True)
class TreeAdvantage:
    """d-TreeRPO (arXiv 2512.09675): of each edge, the value of its child minus the mean of the child's OTHER siblings.

    A leaf's value is its reward, a node's the mean of its children's. Children no leaf of which could be judged are
    left out, and their edges have advantage 0.
    """

    tree: Tree

    def __call__(self, rewards: RewardBatch, group_size: int) -> Float[Tensor, "N E"]:
        """[N, height]: of the edges from the root to each rollout; those below a node share its edge's number.

        Raises:
            ValueError: if a group is not the leaves of the tree.
        """
        value, counts = _grouped(rewards, group_size)
        if group_size != self.tree.leaves:
            cause = f"{group_size}, but the tree has {self.tree.leaves} leaves"
            raise ValueError(f"group_size: {cause}. Try: {self.tree.leaves}")
        edges = []
        for level in range(self.tree.height, 0, -1):
            value, counts = (x.reshape(-1, self.tree.branching) for x in (value, counts))
            mean, judged = judged_mean(value, counts), counts.sum(1, keepdim=True)
            advantage = (value - mean) * counts * judged / (judged - 1).clamp(min=1)
            edges.append(advantage.flatten().repeat_interleave(self.tree.width(level)))
            value, counts = mean, counts.any(1, keepdim=True)
        return torch.stack(edges[::-1], dim=1)


def on_tokens(advantages: Float[Tensor, "N ..."], rollout: Rollout) -> Float[Tensor, "N ..."]:
    """Advantages of edges as those of the tokens fixed on them, [N C]; one a rollout as they are."""
    if advantages.ndim == 1 or rollout.edge is None:
        return advantages
    height = advantages.shape[1]
    spread = advantages.gather(1, rollout.edge.clamp(0, height - 1))
    return torch.where(rollout.edge < height, spread, 0.0)


def on_units(advantages: Float[Tensor, "N ..."], logprobs: LogProbs) -> Float[Tensor, "N ..."]:
    """Advantages of steps as those of the units scored at them, [N U]; others as they are.

    The part `step` of a likelihood says which step each unit belongs to, and `scale` what its advantage is multiplied
    by; a KL beside it is not.
    """
    step = logprobs.parts.get("step")
    if advantages.ndim == 1 or step is None:
        return advantages
    return advantages.gather(1, step) * logprobs.parts["scale"]


@dataclass(frozen=True)
class ShuffledRewards:
    """A control: another advantage on rewards permuted over all rollouts, so that nothing true is left to learn.

    What a run still gains under it comes from the updates themselves and not from the reward.
    """

    advantage: Advantage
    seed: int

    @property
    def tree(self) -> Tree | None:
        """That of the wrapped advantage, where it has one."""
        return getattr(self.advantage, "tree", None)

    @property
    def of_steps(self) -> bool:
        """Whether the wrapped advantage asks for the rewards of steps."""
        return getattr(self.advantage, "of_steps", False)

    def __call__(self, rewards: RewardBatch, group_size: int) -> Float[Tensor, "N ..."]:
        """Advantages of the permuted rewards; the permutation hangs on the seed and the rollout's number."""
        order = CounterDraws(self.seed).permutation("shuffled_rewards", len(rewards.value), rewards.step)
        order = order.to(rewards.value.device)
        return self.advantage(replace(rewards, value=rewards.value[order], valid=rewards.valid[order]), group_size)
