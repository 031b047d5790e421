"""The enumerated law of the sampler against the sampler itself, finite differences and estimators that must agree."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d1lit.draws import CounterDraws
from d1lit.estimators.left_to_right import LeftToRightEstimator
from d1lit.estimators.packed_trace import PackedTraceEstimator
from d1lit.estimators.step_merge import TraceEstimator
from d1lit.exact import CanvasLaw, canvas_laws, completion_law
from d1lit.losses.policy_gradient import ReinforceLoss
from d1lit.losses.terms import sequence_sum
from d1lit.models.head import chunked_logprobs
from d1lit.sampling import (
    BlockSampler,
    EvenSchedule,
    FixedQuota,
    InverseCDF,
    LeftToRight,
    Margin,
    PlackettLuce,
    RandomOrder,
    SampledLogProb,
    Threshold,
    TokenProbability,
)
from d1lit.sampling.parts import Cells, Choice, Prediction
from d1lit.scoring import score
from d1lit.types import Context, LogProbs, LossInputs, PromptBatch, Rollout

VOCAB, MASK, EOS = 5, 4, 3
NEVER = 99
"""An end of sequence outside the vocabulary: all completions have full length."""
PROMPT = torch.tensor([1, 2])


class ToyNetwork(nn.Module):
    """A float64 network whose prediction depends on all tokens and their distance; unless told to, it never predicts
    the mask.

    The kernel knows left from right: in a mirrored canvas two confidences would tie at all weights.
    """

    mask_token_id, pad_token_id = MASK, EOS

    def __init__(self, seed: int = 0, eos: int = EOS, predicts_mask: bool = False) -> None:
        super().__init__()
        self.eos_token_id, self.predicts_mask = eos, predicts_mask
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCAB, 6, generator=generator, dtype=torch.float64))
        self.out = nn.Parameter(torch.randn(6, VOCAB, generator=generator, dtype=torch.float64) * 1.3)

    def hidden(
        self, ids: Tensor, attention: Any = None, position_ids: Any = None, keep: Any = None, cache: Any = None
    ) -> Tensor:
        place = torch.arange(ids.shape[1]).expand_as(ids) if position_ids is None else position_ids
        gap = (place[:, :, None] - place[:, None, :]).double()
        kernel = torch.exp(-0.4 * gap.abs()) * torch.cos(1.3 * gap + 0.4)
        if attention is not None and attention.dim() == 3:
            kernel = kernel * attention
        mixed = kernel @ self.table[ids]
        hidden = torch.tanh(mixed)
        return hidden if keep is None else hidden.gather(1, keep[..., None].expand(-1, -1, 6))

    def head(self, hidden: Tensor) -> Tensor:
        logits = hidden @ self.out
        return logits if self.predicts_mask else logits.masked_fill(torch.arange(VOCAB) == MASK, -100.0)

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, exclude_mask: bool = False) -> Tensor:
        if exclude_mask:
            return chunked_logprobs(hidden, self.out.T, targets, temperature, excluded=MASK)
        return (self.head(hidden) / temperature).log_softmax(-1).gather(-1, targets)

    def reference(self) -> AbstractContextManager[None]:
        return nullcontext()


def sampler(confidence: Any, **changes: Any) -> BlockSampler:
    """Four tokens in one block, one a step."""
    parts: dict[str, Any] = {
        "completion_length": 4,
        "num_steps": 4,
        "block_length": 4,
        "temperature": 1.0,
        "guidance": 0.0,
        "proposal": InverseCDF(),
        "confidence": confidence,
        "commit": FixedQuota(EvenSchedule()),
        "stop_at_eos": False,
    }
    return BlockSampler(**(parts | changes))


CASES = {
    "low_confidence": sampler(TokenProbability()),
    "low_confidence_0.9": sampler(TokenProbability(), temperature=0.9),
    "low_confidence_two_a_step": sampler(TokenProbability(), num_steps=2),
    "low_confidence_uneven": sampler(TokenProbability(), num_steps=3),
    "blocks": sampler(TokenProbability(), block_length=2, temperature=0.7),
    "blocks_eos": sampler(TokenProbability(), block_length=2, stop_at_eos=True),
    "sampled_logprob": sampler(SampledLogProb(), num_steps=2, temperature=0.6),
    "margin": sampler(Margin(), num_steps=2),
    "random": sampler(RandomOrder()),
    "random_two_a_step": sampler(RandomOrder(), num_steps=2, temperature=0.9),
    "left_to_right": sampler(LeftToRight()),
    "guided": sampler(TokenProbability(), num_steps=2, guidance=0.5),
    "block_causal": sampler(TokenProbability(), block_length=2, block_causal=True),
    "block_causal_random": sampler(RandomOrder(), block_length=2, block_causal=True, temperature=0.9),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def rewards_of(completions: Tensor) -> Tensor:
    """Something that depends on several tokens at once."""
    step = (completions[:, 1:] - completions[:, :-1]) % 4 == 1
    return step.double().mean(1) + 0.5 * (completions[:, 0] == 2) * (completions[:, -1] != 0)


def exact_gradient(network: ToyNetwork, made: BlockSampler) -> tuple[Tensor, Tensor]:
    """J and its flat gradient."""
    law = completion_law(network, made, PROMPT)
    value = law.expectation(rewards_of(law.canvases))
    return value.detach(), flat(torch.autograd.grad(value, list(network.parameters())))


def flat(gradients: Any) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def draw(network: ToyNetwork, made: BlockSampler, count: int, seed: int = 0) -> Rollout:
    prompts = PromptBatch(PROMPT[None], torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    return made(network, prompts, count, CounterDraws(seed))


def index_of(completions: Tensor, law: CanvasLaw) -> Tensor:
    """Which canvas of the law each completion is."""
    base = VOCAB ** torch.arange(completions.shape[1])
    order = (law.canvases * base).sum(1).argsort()
    sorted_codes = (law.canvases * base).sum(1)[order]
    place = torch.searchsorted(sorted_codes, (completions * base).sum(1))
    assert torch.equal(law.canvases[order[place]], completions), "the sampler reached a canvas the law excludes"
    return order[place]


@every
def test_probabilities_of_all_canvases_sum_to_one(case):
    laws = list(canvas_laws(ToyNetwork(), case, PROMPT))
    worst = max(abs(float(law.probability.detach().sum()) - 1) for law in laws)
    print(f"{len(laws)} laws, up to {max(len(law.canvases) for law in laws)} canvases, off by {worst:.1e}")
    assert worst < 1e-10
    assert (laws[-1].canvases != MASK).all()
    for law in laws:
        assert len(law.canvases.unique(dim=0)) == len(law.canvases)


@every
def test_the_sampler_follows_the_law(case):
    """Mean reward within 4 standard errors, and frequencies of all completions by Pearson's statistic."""
    network = ToyNetwork()
    law = completion_law(network, case, PROMPT)
    count = 20_000
    completions = draw(network, case, count).completion_ids
    rewards = rewards_of(completions)
    exact = law.expectation(rewards_of(law.canvases)).detach()
    off = float((rewards.mean() - exact) / (rewards.std() / count**0.5))
    seen = torch.bincount(index_of(completions, law), minlength=len(law.canvases)).double()
    expected = law.probability.detach() * count
    common = expected >= 5  # the rare ones together
    seen = torch.cat([seen[common], seen[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    kept = expected > 0
    pearson = float(((seen - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    print(f"mean reward off by {off:+.2f} standard errors; Pearson {pearson:.0f} at {freedom} degrees of freedom")
    assert abs(off) < 4
    assert abs(pearson - freedom) < 4 * (2 * freedom) ** 0.5


@every
def test_autograd_equals_finite_differences(case):
    """Over a step too short for two confidences to change places, which would be a jump."""
    network = ToyNetwork()
    _, gradient = exact_gradient(network, case)
    direction = torch.randn(len(gradient), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = []
    for step in (1e-7, -1e-7):
        moved = ToyNetwork()
        weights = nn.utils.parameters_to_vector(network.parameters()).detach() + step * direction
        nn.utils.vector_to_parameters(weights, moved.parameters())
        values.append(exact_gradient(moved, case)[0])
    difference = (values[0] - values[1]) / 2e-7
    print(f"off by {abs(float(difference - gradient @ direction)):.1e} of {float(difference):.1e}")
    assert torch.allclose(difference, gradient @ direction, rtol=1e-6, atol=1e-8)


@dataclass
class Recording:
    """A proposal that remembers every token drawn, those that are thrown away too."""

    inner: InverseCDF = field(default_factory=InverseCDF)
    drawn: list[list[int]] = field(default_factory=list)

    def uniforms(self, cells: Cells, vocabulary: int) -> Tensor:
        return self.inner.uniforms(cells, vocabulary)

    def draw(self, prediction: Prediction, temperature: float, uniforms: Tensor) -> Choice:
        choice = self.inner.draw(prediction, temperature, uniforms)
        self.drawn.append(choice.tokens.tolist())
        return choice


@pytest.mark.parametrize(
    "name", ["low_confidence_0.9", "low_confidence_two_a_step", "blocks", "margin", "random", "left_to_right"]
)
def test_score_function_of_all_proposals_has_the_exact_gradient_as_its_mean(name):
    """Given all tokens drawn, discarded ones too, what is fixed no longer hangs on the weights: REINFORCE is exact.

    An independent derivation: it replays the sampler's own draws and never looks at the law.
    """
    network, count, case = ToyNetwork(), 6000, CASES[name]
    recording = Recording()
    rollout = draw(network, replace(case, proposal=recording), count, seed=2)
    _, exact = exact_gradient(network, case)
    scores = torch.zeros(count, dtype=torch.float64)
    first = torch.arange(case.completion_length) // case.block_length * case.block_length
    assert len(recording.drawn) == rollout.commit_step.max() + 1
    for step, tokens in enumerate(recording.drawn):
        hidden = rollout.commit_step >= step
        block = first[(rollout.commit_step[0] == step).nonzero()[0, 0]]
        open_ = hidden & (first == block)
        canvas = torch.where(hidden, MASK, rollout.completion_ids)
        positions = open_.nonzero()[:, 1].view(count, -1)
        ids = torch.cat([rollout.prompt_ids, canvas], 1)
        logits = network.head(network.hidden(ids, keep=2 + positions)) / case.temperature
        chosen = logits.log_softmax(-1).gather(2, torch.tensor(tokens).view(count, -1, 1)).sum((1, 2))
        scores = scores + chosen
    rewards = rewards_of(rollout.completion_ids)
    rows = per_row_gradient((rewards - rewards.mean()) * scores, network)
    assert_mean_is(rows, exact)


def per_row_gradient(terms: Tensor, network: ToyNetwork, batches: int = 40) -> Tensor:
    """Mean gradient of each batch of rows."""
    parts = terms.view(batches, -1).mean(1)
    return torch.stack(
        [flat(torch.autograd.grad(part, list(network.parameters()), retain_graph=True)) for part in parts]
    )


def assert_mean_is(samples: Tensor, exact: Tensor) -> None:
    """Every component and the projection on the exact gradient, within 4 standard errors."""
    error = samples.std(0) / len(samples) ** 0.5
    off = ((samples.mean(0) - exact) / error.clamp(min=1e-12))[error > 1e-9]
    along = samples @ exact / exact.norm()
    projected = float((along.mean() - exact.norm()) / (along.std() / len(along) ** 0.5))
    print(f"worst component {float(off.abs().max()):.2f}, along the gradient {projected:+.2f} standard errors")
    assert off.abs().max() < 4
    assert abs(projected) < 4


def likelihood(network: ToyNetwork, rollout: Rollout, estimator: Any, made: BlockSampler) -> LogProbs:
    """What an estimator says of a sampler's rollout, through the project's own scoring."""
    context = Context(rollout, torch.zeros(len(rollout.row_ids)), 0, 1, MASK, CounterDraws(0))
    corruption = made.attended(estimator.corrupt(context))
    return estimator.combine(score(network, rollout, corruption).logprobs, corruption, context)


BLIND_ORDER = ["random", "random_two_a_step", "left_to_right", "block_causal_random"]


@pytest.mark.parametrize(("name", "packed"), [*((name, False) for name in BLIND_ORDER), ("block_causal_random", True)])
def test_trajectory_likelihood_is_exact_where_the_order_is_not_learnt(name, packed):
    """The estimator, `score` and the recorded commit steps together give the policy gradient under a blind order."""
    network, case = ToyNetwork(eos=NEVER), CASES[name]
    estimator = PackedTraceEstimator(2, case.temperature) if packed else TraceEstimator(1, case.temperature)
    rollout = draw(network, case, 6000, seed=3)
    rewards = rewards_of(rollout.completion_ids)
    logprobs = likelihood(network, rollout, estimator, case)
    terms = (rewards - rewards.mean()) * (logprobs.value * logprobs.weight).sum(1)
    assert_mean_is(per_row_gradient(terms, network), exact_gradient(network, case)[1])


def test_a_mask_token_in_the_softmax_bends_the_gradient():
    """Why the estimators of trajectories leave it out: with its share counted the update points elsewhere."""
    with_mask, exact = left_to_right_update(ToyNetwork(eos=NEVER, predicts_mask=True), 1.0, exclude_mask=False)
    assert float(torch.nn.functional.cosine_similarity(with_mask, exact, dim=0)) < 0.999


@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("predicts_mask", [False, True])
def test_left_to_right_is_the_exact_gradient_under_left_to_right_decoding(temperature, predicts_mask):
    """In expectation, by enumeration over completions: no noise, so the cosine is 1, whatever the mask's logit."""
    network = ToyNetwork(eos=NEVER, predicts_mask=predicts_mask)
    update, exact = left_to_right_update(network, temperature, exclude_mask=predicts_mask)
    cosine = float(torch.nn.functional.cosine_similarity(update, exact, dim=0))
    print(f"1 - cosine {1 - cosine:.1e}, relative length {float(update.norm() / exact.norm()):.8f}")
    assert abs(cosine - 1) < 1e-5
    assert torch.allclose(update, exact, rtol=1e-5, atol=1e-8)


def left_to_right_update(network: ToyNetwork, temperature: float, exclude_mask: bool) -> tuple[Tensor, Tensor]:
    """The expected update of REINFORCE on left-to-right likelihoods, and the exact gradient."""
    case = replace(CASES["left_to_right"], temperature=temperature)
    law = completion_law(network, case, PROMPT)
    value, exact = exact_gradient(network, case)
    count = len(law.canvases)
    order = torch.arange(4).expand(count, -1)
    rollout = replace(
        draw(network, case, count),
        completion_ids=law.canvases,
        completion_mask=torch.ones(count, 4, dtype=torch.bool),
        commit_step=order,
    )
    rewards = rewards_of(law.canvases)
    inputs = LossInputs(
        logprobs=likelihood(network, rollout, LeftToRightEstimator(1.0, temperature, exclude_mask), case),
        old=None,
        ref=None,
        advantages=law.probability.detach() * (rewards - value),
        rewards=rewards,
        group_size=count,
        completion_mask=rollout.completion_mask,
        entropy=None,
        num_units=1.0,
        num_rollouts=1.0,
    )
    loss, _ = ReinforceLoss(sequence_sum)(inputs)
    return -flat(torch.autograd.grad(loss, list(network.parameters()))), exact


def test_what_cannot_be_enumerated_is_refused():
    network = ToyNetwork()
    for case, word in (
        (sampler(PlackettLuce(TokenProbability(), 1.0)), "PlackettLuce"),
        (sampler(TokenProbability(), commit=Threshold(0.5)), "Threshold"),
        (sampler(TokenProbability(), temperature=0.0), "temperature"),
        (sampler(TokenProbability(), completion_length=16, block_length=16, num_steps=2), "too many"),
    ):
        with pytest.raises(ValueError, match=word):
            completion_law(network, case, PROMPT)
