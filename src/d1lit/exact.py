"""The exact law of the block sampler on worlds small enough to enumerate, differentiable in the network's weights.

The canvases after each denoising step form a Markov chain: every masked position of the active block draws a token, and
the most confident ones stay. Its probabilities are carried forward from the masked canvas, so the expected reward of
the ACTUAL sampler, with its block length, its temperature and its order of commits, is a sum, and autograd gives its
gradient. An estimator of log-probabilities can then be compared with the truth.

The order is decided by comparing confidences, so the expected reward jumps where two of them tie. The gradient is that
between the jumps, which is what any update that follows log-probabilities can aim at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.sampling.block import BlockSampler
from d1lit.sampling.confidence import PlackettLuce, RandomOrder
from d1lit.sampling.parts import Choice, Prediction
from d1lit.sampling.prediction import Canvas, block_causal, evaluation_mode, predict
from d1lit.sampling.proposal import tempered_logits
from d1lit.types import MaskPredictor

MAX_TRANSITIONS = 2**22
"""Canvases times choices of one step above which enumerating is refused."""


@dataclass(frozen=True)
class CanvasLaw:
    """Which canvases the sampler can be at, and how probable each of them is."""

    canvases: Int[Tensor, "Y C"]
    """Completions with their masks, no two alike."""
    probability: Float[Tensor, " Y"]

    def expectation(self, value: Float[Tensor, " Y"]) -> Float[Tensor, ""]:
        """Mean of a quantity of the canvases; for the reward of completions, the J that training wants to raise."""
        return (self.probability * value).sum()


@dataclass(frozen=True)
class _Step:
    """Everything drawn in one denoising step, for each canvas."""

    positions: Int[Tensor, "Y M"]
    tokens: Int[Tensor, " W"]
    """All tokens but the mask token."""
    probs: Float[Tensor, "Y M W"]
    """Probability that the position draws the token."""
    scores: Float[Tensor, "Y M W"] | None
    """Confidence of the position if it does; None where chance decides."""


def completion_law(policy: MaskPredictor, sampler: BlockSampler, prompt_ids: Int[Tensor, " P"]) -> CanvasLaw:
    """The law of the sampler's completions of one prompt."""
    *_, last = canvas_laws(policy, sampler, prompt_ids)
    return last


def canvas_laws(policy: MaskPredictor, sampler: BlockSampler, prompt_ids: Int[Tensor, " P"]) -> Iterator[CanvasLaw]:
    """The law of the canvas before the first and after every denoising step; with EOS stop, also after the last cut.

    Args:
        policy: the network; in float64 the probabilities sum to 1 within about 1e-15.
        sampler: low-confidence, left-to-right or any other order that follows from the predictions, or random order;
            a fixed quota of tokens a step; temperature above 0; no cache.
        prompt_ids: one prompt without padding.

    Raises:
        ValueError: for a sampler or a world that cannot be enumerated.
    """
    quotas = _check(sampler)
    law = _masked_canvas(policy, prompt_ids, sampler.completion_length)
    yield law
    done = CanvasLaw(law.canvases[:0], law.probability[:0])  # rows that ended at EOS
    for block in range(sampler.num_blocks):
        active = slice(block * sampler.block_length, (block + 1) * sampler.block_length)
        for quota in quotas:
            if quota:
                law = _advance(policy, sampler, prompt_ids, law, active, quota)
                yield _joined(done, law)
        if sampler.stop_at_eos:
            done, law = _ended(done, law, active.stop, policy.eos_token_id)
            if not len(law.canvases):
                break
    if sampler.stop_at_eos:
        yield _joined(done, law)


def _check(sampler: BlockSampler) -> tuple[int, ...]:
    """The quota of each step of a block, for a sampler that can be enumerated."""
    quotas = sampler.commit.quotas(sampler.block_length, sampler.steps_per_block)
    if quotas is None or sampler.is_approximate or isinstance(sampler.confidence, PlackettLuce):
        raise ValueError(
            "sampler: only a fixed quota of tokens a step, an order by confidence or uniform chance, and no cache can"
            f" be enumerated, not {type(sampler.commit).__name__} with {type(sampler.confidence).__name__}."
            " Try: sampler=low_confidence or sampler=random"
        )
    if sampler.any_order:
        raise ValueError(
            "sampler.any_order: what a token sees hangs on the order, which a canvas does not tell. Try: false"
        )
    if sampler.temperature <= 0:
        raise ValueError("sampler.temperature: at 0 nothing is drawn, so there is no law. Try: 1")
    return quotas


def _masked_canvas(policy: MaskPredictor, prompt_ids: Tensor, length: int) -> CanvasLaw:
    canvas = torch.full((1, length), policy.mask_token_id, dtype=prompt_ids.dtype, device=prompt_ids.device)
    return CanvasLaw(canvas, torch.ones(1, dtype=torch.float64, device=prompt_ids.device))


def _joined(first: CanvasLaw, second: CanvasLaw) -> CanvasLaw:
    return CanvasLaw(torch.cat([first.canvases, second.canvases]), torch.cat([first.probability, second.probability]))


def _ended(done: CanvasLaw, law: CanvasLaw, filled: int, eos: int) -> tuple[CanvasLaw, CanvasLaw]:
    """Canvases whose finished blocks hold EOS are filled up with it and go no further."""
    ends = (law.canvases[:, :filled] == eos).any(1)
    canvases = law.canvases[ends].clone()
    canvases[:, filled:] = eos
    done = _joined(done, CanvasLaw(canvases, law.probability[ends]))
    return done, CanvasLaw(law.canvases[~ends], law.probability[~ends])


def _advance(
    policy: MaskPredictor,
    sampler: BlockSampler,
    prompt_ids: Int[Tensor, " P"],
    law: CanvasLaw,
    active: slice,
    quota: int,
) -> CanvasLaw:
    """One denoising step: each set of positions that may be fixed, with each choice of their tokens."""
    step = _draws(policy, sampler, prompt_ids, law.canvases, active)
    width = step.positions.shape[1]
    transitions = len(law.canvases) * comb(width, quota) * len(step.tokens) ** quota
    if transitions > MAX_TRANSITIONS:
        raise ValueError(
            f"sampler.completion_length: {transitions} ways through one step are too many to enumerate (at most"
            f" {MAX_TRANSITIONS}). Try: a shorter completion, shorter blocks or a smaller vocabulary"
        )
    grid = torch.cartesian_prod(*[torch.arange(len(step.tokens), device=law.canvases.device)] * quota)
    choices = grid.view(-1, quota)  # [A, quota], also where the quota is 1
    canvases, probability = [], []
    for chosen in combinations(range(width), quota):
        weight = _selection(step, chosen, choices)
        for column, place in enumerate(chosen):
            weight = weight * step.probs[:, place][:, choices[:, column]]
        after = law.canvases[:, None].expand(-1, len(choices), -1).clone()
        where = step.positions[:, None, list(chosen)].expand(-1, len(choices), -1)
        after.scatter_(2, where, step.tokens[choices].expand(len(after), -1, -1).to(after.dtype))
        canvases.append(after.flatten(0, 1))
        probability.append((law.probability[:, None] * weight).flatten())
    return _merged(torch.cat(canvases), torch.cat(probability))


def _draws(
    policy: MaskPredictor, sampler: BlockSampler, prompt_ids: Tensor, canvases: Int[Tensor, "Y C"], active: slice
) -> _Step:
    """What each masked position of the active block may draw, and how confident it would be."""
    masked = canvases[:, active] == policy.mask_token_id
    width = int(masked[0].sum())  # the same in every canvas: a quota rule keeps them in step
    positions = active.start + masked.nonzero()[:, 1].view(len(canvases), width)
    ids = torch.cat([prompt_ids.expand(len(canvases), -1), canvases], 1)
    canvas = Canvas(ids, None, len(prompt_ids))
    if sampler.block_causal:
        canvas = block_causal(canvas, sampler.block_length)
    with evaluation_mode(policy):
        logits = predict(policy, canvas, len(prompt_ids) + positions, sampler.guidance).flatten(0, 1)
    tokens = torch.arange(logits.shape[1], device=logits.device)
    tokens = tokens[tokens != policy.mask_token_id]
    logprobs = tempered_logits(logits, sampler.temperature, policy.mask_token_id).log_softmax(-1)[:, tokens]
    shape = (len(canvases), width, len(tokens))
    if isinstance(sampler.confidence, RandomOrder):
        return _Step(positions, tokens, logprobs.exp().view(shape), None)
    logits = logits.detach()
    prediction = Prediction(logits, logits.softmax(-1), policy.mask_token_id)
    scores = [
        sampler.confidence.score(prediction, Choice(token.expand(len(logits)), column), positions.flatten(), None)
        for token, column in zip(tokens, logprobs.detach().unbind(1), strict=True)
    ]
    return _Step(positions, tokens, logprobs.exp().view(shape), torch.stack(scores, 1).view(shape))


def _selection(step: _Step, chosen: tuple[int, ...], choices: Int[Tensor, "A quota"]) -> Float[Tensor, "Y A"]:
    """Probability that exactly these positions are fixed, given their tokens: all others drew something less sure."""
    count, width = step.positions.shape
    if step.scores is None:
        return step.probs.new_full((count, len(choices)), 1 / comb(width, len(chosen)))
    lowest = step.scores[:, chosen[0]][:, choices[:, 0]]
    place = torch.full_like(lowest, chosen[0])
    for column, other in enumerate(chosen[1:], start=1):
        score = step.scores[:, other][:, choices[:, column]]
        lower = score <= lowest  # a later position loses a tie
        lowest, place = torch.where(lower, score, lowest), torch.where(lower, other, place)
    result = torch.ones_like(lowest)
    for other in set(range(width)) - set(chosen):
        ranks_below = _below(step.scores[:, other], lowest, place < other)
        result = result * (ranks_below * step.probs[:, None, other]).sum(-1)
    return result


def _below(
    scores: Float[Tensor, "Y W"], lowest: Float[Tensor, "Y A"], loses_ties: Bool[Tensor, "Y A"]
) -> Bool[Tensor, "Y A W"]:
    """Which tokens leave a position behind the lowest of the fixed ones."""
    scores, lowest = scores[:, None], lowest[..., None]
    return (scores < lowest) | ((scores == lowest) & loses_ties[..., None])


def _merged(canvases: Int[Tensor, "Z C"], probability: Float[Tensor, " Z"]) -> CanvasLaw:
    """Equal canvases are one, and those that cannot be reached are none."""
    reachable = probability.detach() > 0
    canvases, inverse = torch.unique(canvases[reachable], dim=0, return_inverse=True)
    total = probability.new_zeros(len(canvases)).index_add(0, inverse, probability[reachable])
    return CanvasLaw(canvases, total)
