"""Building noised views: the steps that most estimators share."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.types import Context, Corruption, LogProbs, Rollout


def attend_real_tokens(prompt_mask: Bool[Tensor, "R P"], completion_length: int) -> Bool[Tensor, "R T"] | None:
    """Keys that may be attended: real prompt tokens and the whole canvas; None where no prompt is padded."""
    if bool(prompt_mask.all()):
        return None
    return torch.cat([prompt_mask, prompt_mask.new_ones(len(prompt_mask), completion_length)], dim=1)


def prompt_uniforms(context: Context, row_ids: Int[Tensor, " n"], length: int, index: int) -> Float[Tensor, "n P"]:
    """One uniform for each prompt position, counted BACKWARD from the completion.

    So a prompt's numbers do not depend on how much padding its batch put before it.
    """
    return context.draws.uniform("prompt_mask", row_ids, (length,), step=index).flip(1)


def mask_prompt(
    rollout: Rollout,
    context: Context,
    row_ids: Int[Tensor, " n"],
    rows: slice,
    index: int,
    mask_prob: float,
    mask_padding: bool = False,
) -> Int[Tensor, "n P"]:
    """Prompts of `rows` with each token hidden with probability mask_prob; padding only where asked for."""
    prompt_ids, prompt_mask = rollout.prompt_ids[rows], rollout.prompt_mask[rows]
    if mask_prob == 0:
        return prompt_ids
    is_masked = prompt_uniforms(context, row_ids, prompt_ids.shape[1], index) < mask_prob
    if not mask_padding:
        is_masked = is_masked & prompt_mask
    return torch.where(is_masked, context.mask_token_id, prompt_ids)


def own_views(num_rollouts: int, num_views: int, device: torch.device) -> Int[Tensor, "N K"]:
    """Views 0 .. N K - 1, those of one rollout adjacent."""
    return torch.arange(num_rollouts * num_views, device=device).view(num_rollouts, num_views)


def completion_views(
    rollout: Rollout,
    noised_completions: Int[Tensor, "N K C"],
    weight: Float[Tensor, "N K C"],
    noised_prompts: Int[Tensor, "N K P"] | None = None,
    temperature: float = 1.0,
    guidance: float = 0.0,
) -> Corruption:
    """A corruption with K views of each rollout's own, the completion being scored in each of them.

    Args:
        rollout: the rollout to score.
        noised_completions: what each view shows of the completion.
        weight: share of each scored token under each view; 0 where it is not scored.
        noised_prompts: what each view shows of the prompt; the prompt itself where None.
        temperature: logits are divided by it.
        guidance: classifier-free guidance scale.
    """
    n, k, c = noised_completions.shape
    prompts = rollout.prompt_ids[:, None, :].expand(n, k, -1) if noised_prompts is None else noised_prompts
    return Corruption(
        noised_ids=torch.cat([prompts, noised_completions], dim=2).flatten(0, 1),
        view_of=own_views(n, k, rollout.device),
        target_ids=rollout.completion_ids[:, None, :].expand(n, k, c),
        weight=weight,
        score_from=prompts.shape[2],
        attention=attend_real_tokens(rollout.prompt_mask.repeat_interleave(k, dim=0), c),
        temperature=temperature,
        guidance=guidance,
    )


def token_logprobs(view_logprobs: Float[Tensor, "N K C"], corruption: Corruption) -> LogProbs:
    """One likelihood a token: the weighted sum over its views; tokens without a view count for nothing."""
    scored = (corruption.weight > 0).any(1)
    value = (view_logprobs * corruption.weight).sum(1)
    return LogProbs(value=value, weight=scored.to(value.dtype))


def sequence_logprobs(view_logprobs: Float[Tensor, "N K C"], corruption: Corruption) -> LogProbs:
    """One likelihood a sequence: the weighted sum over views and tokens, weighing 1."""
    value = (view_logprobs * corruption.weight).sum((1, 2))[:, None]
    return LogProbs(value=value, weight=torch.ones_like(value))
