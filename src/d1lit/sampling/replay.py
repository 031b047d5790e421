"""What the exact network says of tokens that an approximate sampler chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from d1lit.sampling.prediction import Canvas, evaluation_mode, predict
from d1lit.sampling.proposal import tempered_logits
from d1lit.types import GIVEN, UNREACHED, MaskPredictor, Rollout

Attended = Callable[[Canvas, Int[Tensor, "n C"]], Canvas]
"""A canvas with its attention, from the steps at which its tokens were committed."""


@runtime_checkable
class ApproximateSampler(Protocol):
    """A sampler that may be told to save work at the price of another law, and then says how far it strays."""

    @property
    def is_approximate(self) -> bool:
        """Whether its samples follow another law than the network's."""
        ...

    @property
    def reviser(self) -> object | None:
        """The part that hides or replaces tokens that stood: then no commit steps can be replayed."""
        ...

    def replay(self, policy: MaskPredictor, rollout: Rollout, num_rows: int) -> Float[Tensor, ""]:
        """Mean |log p of the exact network - log p recorded| of the chosen tokens, over some rows, in nats."""
        ...


def replayed_logprobs(
    policy: MaskPredictor,
    rollout: Rollout,
    rows: Int[Tensor, " n"],
    temperature: float,
    guidance: float,
    attended: Attended = lambda canvas, commit_step: canvas,
) -> Float[Tensor, "n C"]:
    """Log-probability of each token on the canvas it was chosen on, by a full forward; 0 where none was chosen.

    The canvases follow from the commit steps, so this is meant for samplers that neither remask nor edit. One forward a
    step for the rows that fixed something in it; for diagnosis, not for training.

    Args:
        policy: the network that sampled.
        rollout: what it sampled.
        rows: which rollouts to replay.
        temperature: of the sampler; 0 is read as 1, as in the record.
        guidance: classifier-free guidance scale of the sampler.
        attended: who attended to whom, given the canvas and the steps so far; everybody to everything where not said.
    """
    steps, tokens = rollout.commit_step[rows], rollout.completion_ids[rows]
    prompt_ids, prompt_mask = rollout.prompt_ids[rows], rollout.prompt_mask[rows]
    length = prompt_ids.shape[1]
    attention = None if bool(prompt_mask.all()) else torch.cat([prompt_mask, torch.ones_like(tokens).bool()], 1)
    result = torch.zeros_like(rollout.sampled_logprobs[rows])
    with evaluation_mode(policy), torch.no_grad():
        for step in steps[steps >= 0].unique().tolist():
            chosen = steps == step
            active = chosen.any(1).nonzero()[:, 0]
            width = int(chosen.sum(1).max())
            places = chosen[active].to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
            fixed = ((steps[active] >= 0) & (steps[active] < step)) | (steps[active] == GIVEN)
            completion = torch.where(fixed, tokens[active], policy.mask_token_id)
            canvas = Canvas(
                torch.cat([prompt_ids[active], completion], 1), None if attention is None else attention[active], length
            )
            canvas = attended(canvas, torch.where(steps[active] < step, steps[active], UNREACHED))
            logits = predict(policy, canvas, length + places, guidance).flatten(0, 1)
            logprobs = tempered_logits(logits, temperature or 1.0, policy.mask_token_id).log_softmax(-1)
            values = logprobs.gather(1, tokens[active].gather(1, places).flatten()[:, None]).view(places.shape)
            kept = torch.where(chosen[active].gather(1, places), values.to(result.dtype), 0.0)
            result[active] += torch.zeros_like(result[active]).scatter_(1, places, kept)
    return result


def approximation_nats(
    policy: MaskPredictor,
    rollout: Rollout,
    temperature: float,
    guidance: float,
    num_rows: int,
    attended: Attended = lambda canvas, commit_step: canvas,
) -> Float[Tensor, ""]:
    """Mean |log p exact - log p recorded| of the chosen tokens up to the first EOS, over some rollouts of a batch.

    About rounding error for the exact sampler; the price of a cache for the others.

    Args:
        policy: the network that sampled, with the same weights.
        rollout: what it sampled.
        temperature: of the sampler.
        guidance: of the sampler.
        num_rows: rollouts to replay, spread evenly over the batch.
        attended: as above.
    """
    count = len(rollout.row_ids)
    rows = torch.linspace(0, count - 1, min(num_rows, count), device=rollout.device).round().to(torch.int64)
    exact = replayed_logprobs(policy, rollout, rows, temperature, guidance, attended)
    counted = rollout.completion_mask[rows] & (rollout.commit_step[rows] >= 0)
    return (exact - rollout.sampled_logprobs[rows]).abs()[counted].mean()
