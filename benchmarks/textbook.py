"""The published algorithm, plainly: what d1 (arXiv 2504.12216) and LLaDA (arXiv 2502.09992) describe, nothing saved.

Every position goes through the head in every step, softmax and noise are taken over [B, L, V], every rollout has its
own view, and every log-probability has its own forward. Written for these benchmarks from the papers' algorithms; it
shares the network (and so SDPA, number type and weights) with what it is compared to, and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from d1lit.models import Policy
from d1lit.sampling.commit import even_quotas


def noisy_logits(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """exp(logits) / (-ln u)^T with one uniform a token, whose arg-max is a sample; the logits at temperature 0."""
    if temperature == 0:
        return logits
    uniforms = torch.rand(logits.shape, generator=generator, device=logits.device)
    return logits.exp() / (-torch.log(uniforms)) ** temperature


@torch.inference_mode()
def sample(
    policy: Policy,
    prompt_ids: Tensor,
    completion_length: int,
    num_steps: int,
    block_length: int,
    temperature: float,
    seed: int = 0,
) -> Tensor:
    """Low-confidence remasking in blocks; gives prompts and completions."""
    rows, start = prompt_ids.shape
    mask_id = policy.mask_token_id
    generator = torch.Generator(prompt_ids.device).manual_seed(seed)
    ids = torch.cat([prompt_ids, prompt_ids.new_full((rows, completion_length), mask_id)], dim=1)
    num_blocks = completion_length // block_length
    for block in range(num_blocks):
        end = start + (block + 1) * block_length
        for quota in even_quotas(block_length, num_steps // num_blocks):
            is_masked = ids == mask_id
            logits = policy.head(policy.hidden(ids))
            proposed = noisy_logits(logits, temperature, generator).argmax(dim=-1)
            probabilities = F.softmax(logits, dim=-1)
            confidence = probabilities.gather(-1, proposed[..., None]).squeeze(-1)
            confidence[:, end:] = -torch.inf
            proposed = torch.where(is_masked, proposed, ids)
            confidence = torch.where(is_masked, confidence, -torch.inf)
            chosen = torch.zeros_like(is_masked)
            for row in range(rows):
                chosen[row, confidence[row].topk(quota).indices] = True
            ids[chosen] = proposed[chosen]
    return ids


def completion_logprobs(policy: Policy, noised_ids: Tensor, completion_ids: Tensor) -> Tensor:
    """Token log-probabilities of each completion, read from its own view: [N, C]."""
    length = completion_ids.shape[1]
    logits = policy.head(policy.hidden(noised_ids))[:, -length:, :]
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), completion_ids.reshape(-1), reduction="none")
    return -losses.view_as(completion_ids)


def masked_prompts(prompt_ids: Tensor, mask_prob: float, mask_id: int, completion_length: int, seed: int) -> Tensor:
    """A view for each row: its prompt with random tokens masked, and the completion masked altogether."""
    generator = torch.Generator().manual_seed(seed)  # the same views on every device
    hidden = torch.rand(prompt_ids.shape, generator=generator).to(prompt_ids.device) < mask_prob
    completion = prompt_ids.new_full((len(prompt_ids), completion_length), mask_id)
    return torch.cat([torch.where(hidden, mask_id, prompt_ids), completion], dim=1)


def clipped_loss(logprobs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, epsilon: float, beta: float) -> Tensor:
    """The clipped surrogate with a k3 penalty, averaged over all tokens."""
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - epsilon, 1 + epsilon) * advantages[:, None])
    penalty = (ref - logprobs).exp() - (ref - logprobs) - 1
    return -(gain - beta * penalty).mean()
