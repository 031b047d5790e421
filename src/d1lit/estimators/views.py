"""Building noised views: the steps that most estimators share."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.types import Context, Corruption, LogProbs, Rollout


def attend_real_tokens(
    prompt_mask: Bool[Tensor, "R P"], completion_length: int, completion_mask: Bool[Tensor, "R C"] | None = None
) -> Bool[Tensor, "R T"] | None:
    """Keys that may be attended: real prompt tokens and the canvas, or its valid part; None where that is all."""
    canvas = prompt_mask.new_ones(len(prompt_mask), completion_length) if completion_mask is None else completion_mask
    attention = torch.cat([prompt_mask, canvas], dim=1)
    return None if bool(attention.all()) else attention


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
    attend_padding: bool = True,
    exclude_mask: bool = False,
) -> Corruption:
    """A corruption with K views of each rollout's own, the completion being scored in each of them.

    Args:
        rollout: the rollout to score.
        noised_completions: what each view shows of the completion.
        weight: share of each scored token under each view; 0 where it is not scored.
        noised_prompts: what each view shows of the prompt; the prompt itself where None.
        temperature: logits are divided by it.
        guidance: classifier-free guidance scale.
        attend_padding: whether tokens after the end of the sequence may be attended.
        exclude_mask: leave the mask token out of the softmax.
    """
    n, k, c = noised_completions.shape
    prompts = rollout.prompt_ids[:, None, :].expand(n, k, -1) if noised_prompts is None else noised_prompts
    return Corruption(
        noised_ids=torch.cat([prompts, noised_completions], dim=2).flatten(0, 1),
        view_of=own_views(n, k, rollout.device),
        target_ids=rollout.completion_ids[:, None, :].expand(n, k, c),
        weight=weight,
        score_from=prompts.shape[2],
        attention=attend_real_tokens(
            rollout.prompt_mask.repeat_interleave(k, dim=0),
            c,
            None if attend_padding else rollout.completion_mask.repeat_interleave(k, dim=0),
        ),
        temperature=temperature,
        guidance=guidance,
        exclude_mask=exclude_mask,
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


def drop_unscored(corruption: Corruption) -> Corruption:
    """The same corruption without the views in which nothing is scored: no forward pass is spent on them.

    Views must be of one rollout each, in the order (rollout, view), as `completion_views` makes them.
    """
    scored = (corruption.weight > 0).any(2)  # [N, K]
    keep = scored.flatten()
    if bool(keep.all()):
        return corruption
    if not bool(keep.any()):  # a micro-batch must not be empty: one view stays, with weight 0
        keep = torch.zeros_like(keep).index_fill(0, torch.tensor(0, device=keep.device), True)
        scored = keep.view_as(scored)
    number = (keep.cumsum(0) - 1).view_as(scored)
    return replace(
        corruption,
        noised_ids=corruption.noised_ids[keep],
        view_of=torch.where(scored, number, -1),
        attention=None if corruption.attention is None else corruption.attention[keep],
        position_ids=None if corruption.position_ids is None else corruption.position_ids[keep],
    )


def segment_views(
    context: Context,
    segment: Int[Tensor, "N C"],
    chosen: Int[Tensor, "N K"],
    share: Float[Tensor, "N K"] | None = None,
    score_all_hidden: bool = False,
    score_padding: bool = False,
    temperature: float = 1.0,
    exclude_mask: bool = False,
) -> Corruption:
    """One view for each chosen segment of the trajectory: earlier tokens shown, this and later segments hidden.

    Args:
        context: gives the rollout and the mask id.
        segment: the segment in which each token was committed; a token never committed carries a number above all.
        chosen: which segment each view replays; -1 for none.
        share: weight of each view's tokens; 1 where None.
        score_all_hidden: score all hidden tokens instead of those of the segment.
        score_padding: score tokens after the end of the sequence too.
        temperature: logits are divided by it.
        exclude_mask: leave the mask token out of the softmax.
    """
    rollout = context.rollout
    is_hidden = segment[:, None, :] >= chosen[:, :, None]
    noised = torch.where(is_hidden, context.mask_token_id, rollout.completion_ids[:, None, :])
    scored = is_hidden if score_all_hidden else segment[:, None, :] == chosen[:, :, None]
    scored = scored & (chosen >= 0)[:, :, None]
    if not score_padding:
        scored = scored & rollout.completion_mask[:, None, :]
    weight = scored.to(torch.float32)
    if share is not None:
        weight = weight * share[:, :, None]
    views = completion_views(rollout, noised, weight, temperature=temperature, exclude_mask=exclude_mask)
    return drop_unscored(views)


def commit_segments(context: Context) -> tuple[Int[Tensor, "N C"], Int[Tensor, " N"]]:
    """The step that committed each token (the largest integer where none did), and each rollout's number of steps."""
    step = context.rollout.commit_step
    num_steps = step.amax(1) + 1
    return torch.where(step < 0, torch.iinfo(step.dtype).max, step), num_steps
