"""The block sampler: token identity with a textbook sampler, its law, and what may not move a token."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from d1lit.draws import CounterDraws
from d1lit.models.cache import KVCache
from d1lit.models.policy import Policy
from d1lit.models.transformer import MaskedDiffusionConfig, MaskedDiffusionLM
from d1lit.sampling import (
    BlockSampler,
    CumulativeEntropyBounded,
    DreamSchedule,
    DualCache,
    EntropyBounded,
    EvenSchedule,
    Factor,
    FixedQuota,
    Gumbel,
    Hierarchical,
    InverseCDF,
    LeftToRight,
    Margin,
    NegativeEntropy,
    PlackettLuce,
    PrefixCache,
    RandomOrder,
    RandomReveal,
    SampledLogProb,
    Threshold,
    TokenProbability,
    approximation_nats,
)
from d1lit.sampling.filters import Filtered, top_k, top_p
from d1lit.sampling.parts import Cells, Choice, Prediction
from d1lit.types import MaskPredictor, PromptBatch, Rollout, Sampler


class SmallNetwork(nn.Module):
    """Two bidirectional attention layers with positions and random weights; every logit hears the whole canvas."""

    def __init__(self, seed: int, vocabulary: int = 23, width: int = 16, eos: int = 1) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=g) / shape[0] ** 0.5)  # noqa: E731
        self.embedding, self.places = draw(vocabulary, width), draw(128, width)
        self.embedding.data *= vocabulary**0.5
        self.places.data *= 128**0.5
        self.query, self.key = nn.ParameterList([draw(width, width), draw(width, width)]), draw(width, width)
        self.value = nn.ParameterList([draw(width, width), draw(width, width)])
        self.output = nn.Parameter(torch.randn(width, vocabulary, generator=g) * 0.8)
        self.dropout = nn.Dropout(0.5)
        self.calls: list[tuple[int, ...]] = []
        self.modes: list[bool] = []
        self.largest_head = 0
        self._ids = (vocabulary - 1, eos, 0)

    @property
    def mask_token_id(self) -> int:
        return self._ids[0]

    @property
    def eos_token_id(self) -> int:
        return self._ids[1]

    @property
    def pad_token_id(self) -> int:
        return self._ids[2]

    def hidden(
        self,
        ids: Int[Tensor, "R T"],
        attention: Bool[Tensor, "R T"] | Bool[Tensor, "R T T"] | None = None,
        position_ids: Int[Tensor, "R T"] | None = None,
        keep: Int[Tensor, "R M"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "R M D"]:
        self.calls.append(tuple(ids.shape))
        self.modes.append(self.training)
        x = self.embedding[ids] + self.places[: ids.shape[1]]
        for query, value in zip(self.query, self.value, strict=True):
            scores = (x @ query) @ (x @ self.key).transpose(1, 2) / x.shape[-1] ** 0.5
            if attention is not None:
                scores = scores.masked_fill(~attention[:, None], -torch.inf)
            x = x + self.dropout(torch.tanh(scores.softmax(-1) @ (x @ value)))
        x = nn.functional.layer_norm(x, x.shape[-1:])
        return x if keep is None else x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))

    def head(self, hidden: Float[Tensor, "*M D"]) -> Float[Tensor, "*M V"]:
        self.largest_head = max(self.largest_head, hidden[..., 0].numel())
        return hidden @ self.output

    def logprobs(
        self,
        hidden: Float[Tensor, "M D"],
        targets: Int[Tensor, "M J"],
        temperature: float = 1.0,
        exclude_mask: bool = False,
    ) -> Float[Tensor, "M J"]:
        return (self.head(hidden) / temperature).log_softmax(-1).gather(-1, targets)

    def reference(self) -> AbstractContextManager[None]:
        return nullcontext()


def sampler(**changes: Any) -> BlockSampler:
    """Low-confidence sampling of 16 tokens in two blocks, with changes."""
    settings: dict[str, Any] = {
        "completion_length": 16,
        "num_steps": 8,
        "block_length": 8,
        "temperature": 0.0,
        "guidance": 0.0,
        "proposal": InverseCDF(),
        "confidence": TokenProbability(),
        "commit": FixedQuota(EvenSchedule()),
        "stop_at_eos": False,
    }
    return BlockSampler(**(settings | changes))


def prompts(count: int, length: int = 5, seed: int = 0, padded: bool = False, vocabulary: int = 23) -> PromptBatch:
    """Random prompts, some left-padded."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary - 1, (count, length), generator=g)
    mask = torch.ones(count, length, dtype=torch.bool)
    if padded:
        lengths = torch.randint(1, length, (count, 1), generator=g)
        mask = torch.arange(length) >= lengths
    return PromptBatch(ids.masked_fill(~mask, 0), mask, torch.arange(count), tuple({"n": n} for n in range(count)))


def textbook(
    policy: SmallNetwork, batch: PromptBatch, completion_length: int, num_steps: int, block_length: int, guidance: float
) -> tuple[Tensor, Tensor]:
    """Low-confidence sampling at temperature 0 as the papers describe it: every position, every token, every step."""
    count, start = batch.prompt_ids.shape
    mask_id = policy.mask_token_id
    ids = torch.cat([batch.prompt_ids, torch.full((count, completion_length), mask_id)], 1)
    attention = torch.cat([batch.prompt_mask, torch.ones(count, completion_length, dtype=torch.bool)], 1)
    commit_step = torch.full((count, completion_length), -1)
    blocks = completion_length // block_length
    steps = max(1, num_steps // blocks)
    for block in range(blocks):
        stop = start + (block + 1) * block_length
        for step in range(steps):
            logits = policy.head(policy.hidden(ids, attention))
            if guidance:
                blind = ids.clone()
                blind[:, :start] = mask_id
                other = policy.head(policy.hidden(blind, attention))
                logits = other + (guidance + 1) * (logits - other)
            probs = logits.softmax(-1)
            allowed = logits.clone()
            allowed[..., mask_id] = -torch.inf
            tokens = allowed.argmax(-1)
            confidence = probs.gather(-1, tokens[..., None])[..., 0]
            for row in range(count):
                masked = [p for p in range(stop) if ids[row, p] == mask_id]
                left = block_length // steps + (step < block_length % steps)
                for p in sorted(masked, key=lambda p: (-float(confidence[row, p]), p))[:left]:
                    ids[row, p] = tokens[row, p]
                    commit_step[row, p - start] = block * steps + step
    return ids[:, start:], commit_step


SHAPES = [(16, 8, 8), (16, 16, 16), (12, 10, 4), (24, 5, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_tokens_equal_a_textbook_sampler(shape: tuple[int, int, int], guidance: float) -> None:
    completion_length, num_steps, block_length = shape
    tokens = 0
    for seed in range(20 if guidance == 0 else 5):
        policy = SmallNetwork(seed).eval()
        batch = prompts(3, seed=seed, padded=seed % 2 == 1)
        with torch.no_grad():
            ids, commit_step = textbook(policy, batch, completion_length, num_steps, block_length, guidance)
        rollout = sampler(
            completion_length=completion_length, num_steps=num_steps, block_length=block_length, guidance=guidance
        )(policy, batch, 1, CounterDraws(0))
        assert torch.equal(rollout.completion_ids, ids)
        assert torch.equal(rollout.commit_step, commit_step)
        tokens += ids.numel()
    print(f"{tokens} tokens equal")


def test_only_masked_positions_of_the_active_block_reach_the_head() -> None:
    policy = SmallNetwork(0)
    rollout = sampler()(policy, prompts(3), 2, CounterDraws(0))
    assert policy.largest_head == 6 * 8
    assert rollout.num_forwards == len(policy.calls) == 8
    assert rollout.num_tokens_forward == 8 * 6 * 21


def test_protocols() -> None:
    assert isinstance(sampler(), Sampler)
    assert isinstance(SmallNetwork(0), MaskPredictor)


# ------------------------------------------------------------------------------------------------- law and invariance

COMMITS = {
    "quota": {},
    "random": {"confidence": RandomOrder()},
    "margin": {"confidence": Margin()},
    "sampled_logprob": {"confidence": SampledLogProb()},
    "left_to_right": {"confidence": LeftToRight()},
    "plackett_luce": {"confidence": PlackettLuce(TokenProbability(), 0.3)},
    "threshold": {"commit": Threshold(0.4)},
    "factor": {"commit": Factor(1.0)},
    "hierarchical": {"commit": Hierarchical(0.9, 0.2)},
    "entropy_bounded": {"commit": EntropyBounded(3.0), "confidence": NegativeEntropy()},
    "cumulative": {"commit": CumulativeEntropyBounded(6.0), "confidence": NegativeEntropy()},
    "origin": {"commit": RandomReveal(1e-3), "num_steps": 6},
    "dream": {"commit": FixedQuota(DreamSchedule(1e-3)), "block_length": 16, "num_steps": 6},
    "guided": {"guidance": 0.7},
    "gumbel": {"proposal": Gumbel(double=True)},
}


def same_rows(one: Rollout, other: Rollout, rows: Tensor, others: Tensor) -> None:
    """Everything recorded of some rows of one rollout equals that of rows of another."""
    for name in ("row_ids", "prompt_ids", "completion_ids", "completion_mask", "commit_step"):
        assert torch.equal(getattr(one, name)[rows], getattr(other, name)[others]), name
    for name in ("sampled_logprobs", "confidence", "entropy"):
        torch.testing.assert_close(getattr(one, name)[rows], getattr(other, name)[others], rtol=1e-4, atol=1e-5)


def pick(batch: PromptBatch, rows: list[int]) -> PromptBatch:
    """Some prompts of a batch in a new order."""
    index = torch.tensor(rows)
    return PromptBatch(
        batch.prompt_ids[index],
        batch.prompt_mask[index],
        batch.row_ids[index],
        tuple(batch.examples[n] for n in rows),
    )


@pytest.mark.parametrize("changes", COMMITS.values(), ids=COMMITS.keys())
def test_a_row_depends_on_nothing_but_itself(changes: dict[str, Any]) -> None:
    """Order, company, rows per call, EOS stop and the slice of a rank move no token at temperature 0.9."""
    policy = SmallNetwork(3)
    batch = prompts(6, seed=4, padded=True)
    draws = CounterDraws(11, step=5)
    settings: dict[str, Any] = {"temperature": 0.9} | changes
    whole = sampler(**settings)(policy, batch, 2, draws)
    assert (whole.completion_ids != policy.mask_token_id).all()
    assert (whole.commit_step >= 0).all()

    everything = torch.arange(12)
    same_rows(whole, sampler(**settings)(policy, batch, 2, draws), everything, everything)
    order = [4, 0, 5, 2]
    shuffled = sampler(**settings)(policy, pick(batch, order), 2, draws)
    same_rows(whole, shuffled, torch.tensor([[2 * n, 2 * n + 1] for n in order]).flatten(), torch.arange(8))
    few = sampler(**settings, rows_per_forward=5)(policy, batch, 2, draws)
    same_rows(whole, few, everything, everything)
    second_rank = sampler(**settings)(policy, batch.rows(3, 6), 2, draws)
    same_rows(whole, second_rank, everything[6:], torch.arange(6))
    assert not torch.equal(whole.completion_ids, sampler(**settings)(policy, batch, 2, draws.at(step=6)).completion_ids)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("commit", [FixedQuota(EvenSchedule()), Threshold(0.5)])
def test_eos_stop_and_refill_keep_every_token_up_to_eos(temperature: float, commit: Any) -> None:
    stopped_early = 0
    for seed in range(6):
        policy = SmallNetwork(seed, vocabulary=11)
        batch = prompts(9, seed=seed, padded=True, vocabulary=11)
        settings: dict[str, Any] = {"completion_length": 24, "num_steps": 12, "block_length": 4} | {
            "temperature": temperature,
            "commit": commit,
        }
        full = sampler(**settings)(policy, batch, 1, CounterDraws(seed))
        for rows_per_forward in (None, 4):
            stopped = sampler(**settings, stop_at_eos=True, rows_per_forward=rows_per_forward)(
                policy, batch, 1, CounterDraws(seed)
            )
            mask = full.completion_mask
            assert torch.equal(stopped.completion_mask, mask)
            assert torch.equal(stopped.completion_ids[mask], full.completion_ids[mask])
            assert torch.equal(stopped.commit_step[mask], full.commit_step[mask])
            unreached = stopped.commit_step < 0
            assert (stopped.completion_ids[unreached] == policy.eos_token_id).all()
            assert not (unreached & mask).any()
            # What was reached is the true canvas, tokens after EOS in its block included: trajectories replay.
            assert torch.equal(stopped.completion_ids[~unreached], full.completion_ids[~unreached])
            assert stopped.num_tokens_forward <= full.num_tokens_forward
            stopped_early += int(unreached.any(1).sum())
    assert stopped_early > 10
    print(f"{stopped_early} rows left early")


def test_refill_fills_the_places_of_finished_rows() -> None:
    """With room for 4 of 12 rows, fewer calls are made than in batches of 4 that wait for their slowest row."""
    policy = SmallNetwork(1, vocabulary=11)
    policy.output.data *= 0.3  # a flat law: rows end in different blocks
    batch = prompts(12, seed=1, vocabulary=11)
    changes: dict[str, Any] = {"completion_length": 24, "num_steps": 12, "block_length": 4, "temperature": 0.9}
    together = sampler(**changes, stop_at_eos=True, rows_per_forward=4)(policy, batch, 1, CounterDraws(0))
    apart = [
        sampler(**changes, stop_at_eos=True)(policy, batch.rows(start, start + 4), 1, CounterDraws(0)).num_forwards
        for start in (0, 4, 8)
    ]
    assert all(rows <= 4 for rows, _ in policy.calls)
    assert together.num_forwards < sum(apart)


def test_the_sampling_law() -> None:
    """Chi-square of first tokens at temperature 0.9 against softmax(logits / 0.9) without the mask token."""
    rows, vocabulary = 20000, 12
    policy = SmallNetwork(5, vocabulary=vocabulary)
    policy.output.data *= 0.3  # a flat law: every token is counted often enough
    one = prompts(1, seed=2, vocabulary=vocabulary)
    ids = torch.cat([one.prompt_ids, torch.full((1, 2), policy.mask_token_id)], 1)
    with torch.no_grad():
        logits = policy.eval().head(policy.hidden(ids))[0, -2:] / 0.9
    logits[:, policy.mask_token_id] = -torch.inf
    law = logits.softmax(-1)
    worst = 0.0
    for proposal in (InverseCDF(), Gumbel(double=False)):
        for seed in range(3):
            rollout = sampler(completion_length=2, block_length=2, num_steps=1, temperature=0.9, proposal=proposal)(
                policy, one, rows, CounterDraws(seed)
            )
            exact = law.log().expand(rows, -1, -1).gather(2, rollout.completion_ids[..., None])[..., 0]
            torch.testing.assert_close(rollout.sampled_logprobs, exact, rtol=1e-5, atol=1e-5)
            for place in range(2):
                seen = rollout.completion_ids[:, place].bincount(minlength=vocabulary)
                allowed = law[place] > 0
                expected = rows * law[place][allowed]
                assert seen[~allowed].sum() == 0
                worst = max(worst, float(((seen[allowed] - expected) ** 2 / expected).sum()))
            both = rollout.completion_ids[:, 0] * vocabulary + rollout.completion_ids[:, 1]
            pairs = rows * (law[0][:, None] * law[1]).flatten()
            often = pairs > 20
            chi = float(((both.bincount(minlength=vocabulary**2)[often] - pairs[often]) ** 2 / pairs[often]).sum())
            assert chi < int(often.sum()) + 4 * (2 * int(often.sum())) ** 0.5
    print(f"largest chi-square {worst:.1f} at {vocabulary - 2} degrees of freedom")
    assert worst < 31.4  # one in 2000 at 10 degrees of freedom


@pytest.mark.parametrize("vocabulary", [3, 511, 512, 513, 1500])
def test_inverse_cdf_is_the_inverse_of_the_cumulative_sum(vocabulary: int) -> None:
    g = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(400, vocabulary, generator=g, dtype=torch.float64) * 3
    logits[:, ::3] = -torch.inf
    prediction = Prediction(logits, logits.softmax(-1), vocabulary - 1)
    u = torch.rand(400, generator=g, dtype=torch.float64)
    u[0], u[1] = 1 - 2.0**-53, 2.0**-60
    choice = InverseCDF().draw(prediction, 0.8, u)
    law = logits / 0.8
    law[:, -1] = -torch.inf
    law = law.softmax(-1)
    for row in range(400):
        total, token = 0.0, None
        for candidate, probability in enumerate(law[row].tolist()):
            total += probability
            token = candidate if probability > 0 else token
            if probability > 0 and total > float(u[row]):
                break
        assert int(choice.tokens[row]) == token


@pytest.mark.parametrize(("fixes_last", "expected"), [(False, [1, 1, 3]), (True, [1, 2, 3])])
def test_the_factor_rule_and_its_published_end(fixes_last: bool, expected: list[int]) -> None:
    """c_(n) >= 1 - f / (n + 1) with f = 1: the second must reach 2/3, the third 3/4. The published code fixes a lone last."""
    scores = torch.tensor([[0.9, 0.5, 0.4], [0.9, 0.5, -torch.inf], [0.9, 0.8, 0.76]])
    cells = Cells(
        candidates=scores > -torch.inf,
        positions=torch.arange(3).expand(3, -1),
        row_ids=torch.arange(3),
        completion_length=3,
        step=0,
        num_steps=1,
        quota=None,
        draws=CounterDraws(0),
    )
    assert Factor(1.0, fixes_last).select(scores, cells).sum(1).tolist() == expected


def test_plackett_luce_order() -> None:
    """Frequencies of ordered pairs agree with sequential draws from softmax(score / temperature)."""
    rows, weights = 40000, torch.tensor([0.1, 0.7, 0.4, 0.6])
    cells = Cells(
        torch.arange(rows), torch.arange(4).expand(rows, 4), torch.ones(rows, 4).bool(), 4, 0, 1, 2, CounterDraws(0)
    )
    rule = PlackettLuce(TokenProbability(), 0.5)
    probs = weights.repeat(rows)[:, None].expand(-1, 2)
    keys = rule.score(
        Prediction(probs.log(), probs, 1),
        Choice(torch.zeros(rows * 4, dtype=torch.int64), torch.zeros(rows * 4)),
        torch.zeros(rows * 4, dtype=torch.int64),
        rule.uniforms(cells).flatten(),
    ).view(rows, 4)
    order = keys.argsort(descending=True)
    selected = FixedQuota(EvenSchedule()).select(keys, cells)
    assert torch.equal(selected, torch.zeros(rows, 4).scatter(1, order[:, :2], 1.0).bool())
    p = (weights / 0.5).softmax(-1)
    for first in range(4):
        for second in range(4):
            if first != second:
                expected = float(p[first] * p[second] / (1 - p[first]))
                seen = float(((order[:, 0] == first) & (order[:, 1] == second)).float().mean())
                assert abs(seen - expected) < 4.5 * (expected * (1 - expected) / rows) ** 0.5


# ------------------------------------------------------------------------------------------------------------ record


@pytest.mark.parametrize("changes", COMMITS.values(), ids=COMMITS.keys())
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_the_record_replays(changes: dict[str, Any], temperature: float) -> None:
    """Log-probabilities follow from tokens and commit steps alone; the trace shows the same canvases."""
    policy = SmallNetwork(2)
    made = sampler(**({"temperature": temperature} | changes), record_trace=True, rows_per_forward=4)(
        policy, prompts(5, padded=True), 2, CounterDraws(0)
    )
    guidance = changes.get("guidance", 0.0)
    assert float(approximation_nats(policy, made, temperature, guidance, 7)) < 1e-5
    assert made.trace is not None and len(made.trace) == int(made.commit_step.max()) + 1
    for step, canvas in enumerate(made.trace):
        expected = torch.where(made.commit_step <= step, made.completion_ids, policy.mask_token_id)
        assert torch.equal(canvas, expected)


def test_confidence_and_entropy_are_those_of_the_moment() -> None:
    policy = SmallNetwork(6).eval()
    batch = prompts(3)
    made = sampler(temperature=0.7)(policy, batch, 1, CounterDraws(0))
    for row in range(3):
        for step in range(8):
            fixed = (made.commit_step[row] >= 0) & (made.commit_step[row] < step)
            completion = torch.where(fixed, made.completion_ids[row], policy.mask_token_id)
            with torch.no_grad():
                probs = policy.head(policy.hidden(torch.cat([batch.prompt_ids[row], completion])[None]))[0].softmax(-1)
            for place in (made.commit_step[row] == step).nonzero()[:, 0].tolist():
                p = probs[5 + place]
                torch.testing.assert_close(made.confidence[row, place], p[made.completion_ids[row, place]])
                torch.testing.assert_close(made.entropy[row, place], -(p * p.log()).sum())


def test_the_network_is_in_evaluation_mode_and_gets_its_flags_back() -> None:
    policy = SmallNetwork(0).train()
    policy.query.eval()
    made = sampler()(policy, prompts(2), 1, CounterDraws(0))
    assert not any(policy.modes)
    assert policy.training and policy.dropout.training and not policy.query.training
    # Tensors of the record take part in autograd.
    weight = torch.ones(1, requires_grad=True)
    (made.sampled_logprobs * weight).sum().backward()
    assert weight.grad is not None
    assert not made.completion_ids.is_inference()


def test_groups_examples_and_masks() -> None:
    policy = SmallNetwork(1)
    made = sampler(temperature=1.0)(policy, prompts(3, padded=True), 4, CounterDraws(0))
    assert made.row_ids.tolist() == list(range(12))
    assert [e["n"] for e in made.examples] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({tuple(row) for row in made.completion_ids[:4].tolist()}) > 1
    for ids, mask in zip(made.completion_ids.tolist(), made.completion_mask.tolist(), strict=True):
        end = ids.index(policy.eos_token_id) if policy.eos_token_id in ids else len(ids)
        assert mask == [place <= end for place in range(len(ids))]


def test_one_number_a_position() -> None:
    """The inverse CDF asks for one uniform a masked position and step, whatever the vocabulary."""

    class Counted(CounterDraws):
        asked = 0

        def uniform(self, stream: str, rows: Tensor, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Tensor:
            Counted.asked += len(rows) * max(1, len(shape))
            assert shape == ()
            return super().uniform(stream, rows, shape, *args, **kwargs)

    sampler(temperature=0.5)(SmallNetwork(0), prompts(3), 1, Counted(0))
    assert Counted.asked == 3 * 2 * (8 + 6 + 4 + 2)
    Counted.asked = 0
    sampler(temperature=0.0)(SmallNetwork(0), prompts(3), 1, Counted(0))
    assert Counted.asked == 0


def test_the_mask_token_is_never_proposed() -> None:
    policy = SmallNetwork(0)
    policy.output.data[:, policy.mask_token_id] += policy.output.data.abs().max() * 30
    for temperature in (0.0, 1.0):
        made = sampler(temperature=temperature)(policy, prompts(4), 1, CounterDraws(0))
        assert (made.completion_ids != policy.mask_token_id).all()
        assert made.sampled_logprobs.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_length": 5}, "block_length: 5 does not divide completion_length 16"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"guidance": -1.0}, "guidance: -1.0"),
        ({"num_steps": 0}, "num_steps: 0"),
        ({"rows_per_forward": 0}, "rows_per_forward: 0"),
        ({"rows_per_forward": 1, "guidance": 1.0}, "rows_per_forward: 1"),
        ({"commit": EntropyBounded(1.0)}, "TokenProbability is no entropy"),
    ],
)
def test_impossible_settings_name_key_value_and_cure(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        sampler(**changes)
    assert "Try:" in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- caches


def transformer(seed: int, shift: bool = False) -> Policy:
    """A tiny network of the project's own kind, which can fill a cache."""
    config = MaskedDiffusionConfig(
        vocab_size=23,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1e4,
        initializer_range=0.25,
        shift=shift,
        mask_token_id=22,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(MaskedDiffusionLM(config))


@pytest.mark.parametrize(
    ("cache", "shift", "changes"),
    [
        (PrefixCache(KVCache), True, {"stop_at_eos": True}),
        (PrefixCache(KVCache), False, {"commit": Threshold(0.3)}),
        (DualCache(KVCache), False, {"commit": Factor(1.0), "guidance": 0.5}),
        (DualCache(KVCache), True, {"commit": Threshold(0.3), "stop_at_eos": True}),
    ],
)
def test_a_cached_row_depends_on_nothing_but_itself(cache: Any, shift: bool, changes: dict[str, Any]) -> None:
    """Batches under a cache, which the published dual cache cannot take, give each row what it gets alone."""
    policy = transformer(1, shift)
    batch = prompts(5, padded=True)
    settings: dict[str, Any] = {"temperature": 0.9, "cache": cache, "completion_length": 24, "num_steps": 12} | changes
    whole = sampler(**settings)(policy, batch, 2, CounterDraws(3))
    few = sampler(**settings, rows_per_forward=4)(policy, batch, 2, CounterDraws(3))
    same_rows(whole, few, torch.arange(10), torch.arange(10))
    alone = sampler(**settings)(policy, pick(batch, [3]), 2, CounterDraws(3))
    same_rows(whole, alone, torch.tensor([6, 7]), torch.arange(2))


def test_a_cache_is_exact_where_nothing_is_reused_and_tells_its_error_elsewhere() -> None:
    policy, batch = transformer(2), prompts(6, padded=True)
    for cache in (PrefixCache(KVCache), DualCache(KVCache)):
        one_step: dict[str, Any] = {"num_steps": 2, "temperature": 0.9}
        exact = sampler(**one_step)(policy, batch, 1, CounterDraws(0))
        cached = sampler(**one_step, cache=cache)(policy, batch, 1, CounterDraws(0))
        same_rows(exact, cached, torch.arange(6), torch.arange(6))
    nats = {}
    for name, cache in (("none", None), ("prefix", PrefixCache(KVCache)), ("dual", DualCache(KVCache))):
        made = sampler(temperature=0.9, num_steps=16, cache=cache)(policy, batch, 4, CounterDraws(0))
        nats[name] = float(approximation_nats(policy, made, 0.9, 0.0, 24))
        lengths = {"none": 8 * 21 * 2, "prefix": 2 * 21 + 7 * (16 + 8), "dual": 2 * 21 + 7 * (8 + 8)}
        assert made.num_tokens_forward == 24 * lengths[name]
    print({name: f"{value:.1e} nats" for name, value in nats.items()})
    assert nats["none"] < 1e-5 < nats["prefix"] and nats["dual"] > 1e-5


# ------------------------------------------------------------------------------------------------------ token filters


def test_filters_longhand():
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    assert top_p(probs, 0.6).tolist() == [[False, True, False, True], [True, False, False, False]]
    assert top_p(probs, 1.0).all()
    assert top_k(probs, 1).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert top_k(probs, 9).all()


def test_filtered_proposal_draws_from_what_is_left():
    """Frequencies and reported log-probabilities are those of the renormalised nucleus at the temperature."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]]).expand(4000, -1)
    uniforms = (torch.arange(4000) + 0.5) / 4000
    prediction = Prediction(logits, logits.softmax(-1), 4)
    choice = Filtered(InverseCDF(), top_p=0.9, top_k=2).draw(prediction, 0.7, uniforms)
    expected = torch.softmax(torch.tensor([2.0, 1.0]) / 0.7, 0)
    share = torch.bincount(choice.tokens, minlength=5) / 4000
    torch.testing.assert_close(share[:2], expected, atol=1e-3, rtol=0)
    assert share[2:].sum() == 0
    torch.testing.assert_close(choice.logprobs, expected.log()[choice.tokens])
