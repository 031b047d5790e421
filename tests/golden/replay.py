"""Replaying stored random numbers and stored network calls: no model is needed, the manifest's rows answer for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from d1lit.types import Context, Corruption, LogProbs, Rollout


class ReplayDraws:
    """Draws that hand out stored numbers by (stream, step), or by stream alone; anything else is an error."""

    def __init__(self, values: Mapping[Any, Tensor]) -> None:
        self.values = values

    def at(self, *, step: int | None = None, inner: int | None = None) -> ReplayDraws:
        return self

    def uniform(self, stream, rows, shape, step=0, dtype=torch.float32) -> Tensor:
        value = self.values[(stream, step)] if (stream, step) in self.values else self.values[stream]
        assert value.shape == (len(rows), *shape), (stream, value.shape, (len(rows), *shape))
        return value.to(dtype)

    def batch(self, stream, shape, step=0) -> Tensor:
        value = self.values[(stream, step)] if (stream, step) in self.values else self.values[stream]
        assert value.shape == tuple(shape)
        return value


class StoredCalls:
    """The stored network: logits are looked up by the ids that went in, so no order of calls is assumed."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "call", shifted: bool = False) -> None:
        """`shifted`: row i of the logits predicts token i + 1."""
        self.rows: dict[tuple[int, ...], int] = {}
        self.shifted = shifted
        logits, grads = [], []
        number = 0
        while f"{prefix}{number}.logits" in tensors:
            ids, given = tensors[f"{prefix}{number}.input_ids"], tensors[f"{prefix}{number}.logits"]
            grad = tensors.get(f"{prefix}{number}.grad_logits", torch.zeros_like(given))
            for row, one, two in zip(ids.tolist(), given, grad, strict=True):
                if tuple(row) in self.rows:
                    assert torch.allclose(logits[self.rows[tuple(row)]], one, atol=1e-5)
                    grads[self.rows[tuple(row)]] = grads[self.rows[tuple(row)]] + two
                else:
                    self.rows[tuple(row)] = len(logits)
                    logits.append(one)
                    grads.append(two)
            number += 1
        assert number, f"no {prefix}0.logits among {sorted(tensors)}"
        self.used: set[int] = set()
        self.logits = torch.stack(logits).requires_grad_()
        self.expected_grad = torch.stack(grads)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits that predict the token AT each position; a row of ids that was never fed in is an error."""
        index = []
        for row in ids.tolist():
            assert tuple(row) in self.rows, f"the reference never saw {row}"
            index.append(self.rows[tuple(row)])
        self.used |= set(index)
        logits = self.logits[torch.tensor(index)]
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if self.shifted else logits

    def all_used(self) -> bool:
        """Whether every row that carried gradient was asked for."""
        needed = {i for i, grad in enumerate(self.expected_grad) if bool((grad != 0).any())}
        return needed <= self.used


def longhand_scores(network: Any, corruption: Corruption) -> Tensor:
    """[N, K, C] log-probabilities, written as loops over rollouts, views and positions."""
    logits = network(corruption.noised_ids)
    logprobs = torch.log_softmax(logits / corruption.temperature, dim=-1)
    n, k, c = corruption.target_ids.shape
    rows = []
    for i in range(n):
        for j in range(k):
            view = int(corruption.view_of[i, j])
            for p in range(c):
                if view < 0 or corruption.weight[i, j, p] == 0:
                    rows.append(logits.new_zeros(()))
                else:
                    rows.append(logprobs[view, corruption.score_from + p, corruption.target_ids[i, j, p]])
    return torch.stack(rows).view(n, k, c)


def make_rollout(
    prompt_ids: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor | None = None,
    group_size: int = 1,
    prompt_mask: Tensor | None = None,
    commit_step: Tensor | None = None,
    **more: Any,
) -> Rollout:
    """A rollout from the parts a manifest stores; what it does not store is blank."""
    n, c = completion_ids.shape
    blank = torch.zeros(n, c)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=torch.ones_like(prompt_ids, dtype=torch.bool) if prompt_mask is None else prompt_mask.bool(),
        completion_ids=completion_ids,
        completion_mask=(torch.ones(n, c, dtype=torch.bool) if completion_mask is None else completion_mask.bool()),
        row_ids=torch.arange(n),
        group_size=group_size,
        commit_step=torch.zeros(n, c, dtype=torch.int64) if commit_step is None else commit_step,
        **{"sampled_logprobs": blank, "confidence": blank, "entropy": blank, **more},
    )


def make_context(
    rollout: Rollout, draws: Any, mask_token_id: int, advantages: Tensor | None = None, inner: int = 0, total: int = 1
) -> Context:
    """A context around a rollout."""
    advantages = torch.zeros(len(rollout.row_ids)) if advantages is None else advantages
    return Context(rollout, advantages, inner, total, mask_token_id, draws)


def likelihood(estimator: Any, context: Context, network: Any) -> tuple[LogProbs, Corruption]:
    """corrupt, score, combine."""
    corruption = estimator.corrupt(context)
    return estimator.combine(longhand_scores(network, corruption), corruption, context), corruption


def keys_for_subset(chosen: Tensor) -> Tensor:
    """Uniforms of which the chosen entries are the smallest."""
    order = torch.arange(chosen.shape[-1]).expand(chosen.shape) / (4.0 * chosen.shape[-1]) + 0.01
    return torch.where(chosen, order, order + 0.5)


def uniform_below(chosen: Tensor, prob: float) -> Tensor:
    """Uniforms below `prob` exactly where chosen."""
    return torch.where(chosen, prob / 2, (1 + prob) / 2).to(torch.float32)


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; both must be finite and of one shape."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    assert bool(torch.isfinite(got).all())
    return float((got.double() - expected.double()).abs().max()) if got.numel() else 0.0


def assert_near(name: str, got: Tensor, expected: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Equal at the manifest's tolerance; the largest difference is printed."""
    got, expected = got.detach(), expected.detach()
    print(f"{name}: largest difference {largest_difference(got, expected):.2e}")
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=atol)


def completion_corruption(noised: Tensor, completion_ids: Tensor, weight: Tensor) -> Corruption:
    """Stored views [N, K, T] of each rollout as a corruption that scores the completion at their end."""
    n, k, length = noised.shape
    c = completion_ids.shape[1]
    return Corruption(
        noised_ids=noised.flatten(0, 1),
        view_of=torch.arange(n * k).view(n, k),
        target_ids=completion_ids[:, None].expand(n, k, c),
        weight=weight,
        score_from=length - c,
    )
