"""One policy update from rollouts, by the project's own estimator, scoring and loss; and its moments over many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pairs import Pair, Recorder
from torch import Tensor
from world import PROMPTS, Setting, World, flat_gradient, prompt_batch, rewards_of

from d1lit.draws import CounterDraws
from d1lit.scoring import score
from d1lit.types import Context, Corruption, LossInputs, RewardBatch, Rollout


@dataclass(frozen=True)
class Batch:
    """Rollouts and their rewards."""

    rollout: Rollout
    rewards: Tensor
    group_size: int
    draws: CounterDraws


def collect(
    world: World, setting: Setting, group_size: int, prompts: Tensor, draws: CounterDraws, recorder: Recorder
) -> Batch:
    """Groups of the given prompts (by number) from the real sampler, every proposal on record."""
    recorder.drawn.clear()
    rollout = setting.sampler(recorder)(world, prompt_batch(prompts), group_size, draws)
    rewards = rewards_of(rollout.prompt_ids, rollout.completion_ids)
    return Batch(rollout, rewards, group_size, draws)


@contextmanager
def counting_mask(world: World, counts: bool) -> Iterator[None]:
    """Within the context the mask token takes part in the softmax, or not."""
    before, world.predicts_mask = world.predicts_mask, counts
    try:
        yield
    finally:
        world.predicts_mask = before


def looked_up(world: World, corruption: Corruption) -> Tensor:
    """What `d1lit.scoring.score` gives, [N K C], each DISTINCT view computed once: so small a world has few."""
    views, number = corruption.noised_ids.unique(dim=0, return_inverse=True)
    width = corruption.target_ids.shape[2]
    logits = world.head(world.hidden(views)[:, corruption.score_from : corruption.score_from + width])
    table = (logits / corruption.temperature).log_softmax(-1)
    said = table[number[corruption.view_of.clamp(min=0)]].gather(-1, corruption.target_ids[..., None])[..., 0]
    return torch.where((corruption.weight != 0) & (corruption.view_of >= 0)[..., None], said, 0.0)


def loss_of(pair: Pair, world: World, batch: Batch, reference: World | None = None) -> tuple[Tensor, float]:
    """The loss of a first inner update, and network passes a rollout."""
    rewards = batch.rewards
    judged = RewardBatch(rewards[:, None].float(), torch.ones(len(rewards), 1).bool(), torch.ones(1))
    advantages = pair.advantage(judged, batch.group_size)
    context = Context(batch.rollout, advantages, 0, 1, world.mask_token_id, batch.draws)
    corruption = pair.estimator.corrupt(context)
    with counting_mask(world, pair.predicts_mask):
        said = looked_up(world, corruption)
    logprobs = pair.estimator.combine(said, corruption, context)
    ref = None
    if pair.loss.traits.needs_reference:
        with torch.no_grad():
            ref = pair.estimator.combine(looked_up(reference or world, corruption), corruption, context)
    inputs = LossInputs(
        logprobs=logprobs,
        old=None,
        ref=ref,
        advantages=advantages,
        rewards=rewards,
        group_size=batch.group_size,
        completion_mask=batch.rollout.completion_mask,
        entropy=None,
        num_units=float(logprobs.weight.sum()),
        num_rollouts=float(len(rewards)),
    )
    return pair.loss(inputs)[0], len(corruption.noised_ids) / len(rewards)


@dataclass(frozen=True)
class Moments:
    """Mean updates of independent chunks of groups."""

    chunks: Tensor
    """[chunks, weights]: minus the gradient of the loss."""
    groups_per_chunk: int
    passes_per_rollout: float
    group_size: int

    def compare(self, exact: Tensor, passes: int = 1024) -> dict[str, float]:
        """Against the exact gradient; |mean|^2 is estimated without the bias that noise adds.

        `alignment` is the expected cosine, to first order, of ONE update made with that many network passes: bias and
        noise together, at equal cost. `error` is a jackknife standard error of the cosine.
        """
        n = len(self.chunks)
        total, squares = self.chunks.sum(0), (self.chunks**2).sum(1)

        def cosine(total: Tensor, squares: Tensor, n: int) -> tuple[float, float]:
            length = float((total @ total - squares.sum()) / (n * (n - 1)))
            return float(total @ exact / n) / (float(exact.norm()) * max(length, 1e-300) ** 0.5), length

        value, length = cosine(total, squares, n)
        left_out = torch.tensor(
            [
                cosine(total - chunk, torch.cat([squares[:i], squares[i + 1 :]]), n - 1)[0]
                for i, chunk in enumerate(self.chunks)
            ]
        )
        noise = float(self.chunks.var(0).sum()) * self.groups_per_chunk  # of one group's update
        groups = passes / (self.passes_per_rollout * self.group_size)
        at_cost = float(total @ exact / n) / (float(exact.norm()) * (max(length, 0.0) + noise / groups) ** 0.5)
        difference = float((total / n - exact).pow(2).sum()) - float(self.chunks.var(0).sum()) / n
        return {
            "cosine": value,
            "error": float(((n - 1) / n * (left_out - left_out.mean()).pow(2).sum()) ** 0.5),
            "norm_ratio": max(length, 0.0) ** 0.5 / float(exact.norm()),
            "bias": max(difference, 0.0) ** 0.5 / float(exact.norm()),
            "variance": noise / max(length, 1e-300),
            "passes": self.passes_per_rollout,
            "alignment": at_cost,
        }


def check_lookup(world: World, setting: Setting, make_pairs: Callable[[Setting, Recorder], Mapping[str, Pair]]) -> None:
    """`looked_up` and the project's scoring say the same of every estimator's views."""
    recorder = Recorder()
    batch = collect(world, setting, 4, torch.arange(len(PROMPTS)), CounterDraws(3), recorder)
    context = Context(batch.rollout, batch.rewards - 0.5, 0, 1, world.mask_token_id, batch.draws)
    for name, pair in make_pairs(setting, recorder).items():
        corruption = pair.estimator.corrupt(context)
        difference = score(world, batch.rollout, corruption).logprobs - looked_up(world, corruption)
        assert float(difference.detach().abs().max()) < 1e-10, name


def measure(
    world: World,
    setting: Setting,
    group_size: int,
    make_pairs: Callable[[Setting, Recorder], Mapping[str, Pair]],
    chunks: int,
    groups: int,
    seed: int,
) -> dict[str, Moments]:
    """Mean updates of all pairs on the SAME rollouts: chunks of groups of every prompt in turn."""
    recorder = Recorder()
    made = make_pairs(setting, recorder)
    world = copy.deepcopy(world).float()  # noise outweighs rounding by far
    found: dict[str, list[Tensor]] = {name: [] for name in made}
    passes: dict[str, float] = {}
    prompts = torch.arange(groups) % len(PROMPTS)
    for chunk in range(chunks):
        batch = collect(world, setting, group_size, prompts, CounterDraws(seed, step=chunk), recorder)
        for name, pair in made.items():
            loss, passes[name] = loss_of(pair, world, batch)
            found[name].append(-flat_gradient(loss, world).double())
    return {name: Moments(torch.stack(rows), groups, passes[name], group_size) for name, rows in found.items()}
