"""The words of the project: shape letters, the records that travel from prompt to loss, and the protocols they meet.

Shape letters, used in every annotation of layers 0 to 2:

    B  prompts                       G  group size (rollouts of one prompt)     N  rollouts, N = B * G
    P  prompt length                 C  completion length                       L  = P + C
    V  vocabulary                    D  width of the network                    M  positions wanted of one view
    R  noised views                  T  length of a view (L, or 2L for two-stream views)
    K  views that score one rollout  U  units of a likelihood (C tokens, 1 sequence, K views or S steps)
    F  reward parts                  S  denoising steps                         E  edges from a tree's root to a leaf

Log-probabilities are in nats. Masks are boolean and True means "real", "valid" or "masked" as their name says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Unit = Literal["token", "sequence", "view", "step"]
Outcome = Literal["ok", "unparsed", "refused", "timeout", "error", "skipped"]
Example = Mapping[str, Any]
Metrics = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------- draws


@runtime_checkable
class Draws(Protocol):
    """A source of random numbers whose values depend on what they are for, never on when or where they are drawn."""

    def at(self, *, step: int | None = None, inner: int | None = None) -> Draws:
        """The same source at another rollout step or inner update."""
        ...

    def uniform(
        self,
        stream: str,
        rows: Int[Tensor, " n"],
        shape: tuple[int, ...],
        step: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "n ..."]:
        """Uniforms in the open interval (0, 1), a block of `shape` for each global row id, on the device of `rows`."""
        ...

    def batch(self, stream: str, shape: tuple[int, ...], step: int = 0) -> Float[Tensor, "..."]:
        """Uniforms for the whole global batch (stratified t, shared masks): the same on every rank; on the CPU."""
        ...


# -------------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class PromptBatch:
    """Prompts, left-padded to one length."""

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    """True where a real prompt token stands."""
    row_ids: Int[Tensor, " B"]
    """Global identity of each prompt within its batch or data set; every random draw for the row hangs on it."""
    examples: Sequence[Example] = ()

    def rows(self, start: int, stop: int) -> PromptBatch:
        """The prompts from `start` up to, not including, `stop`."""
        return PromptBatch(
            self.prompt_ids[start:stop],
            self.prompt_mask[start:stop],
            self.row_ids[start:stop],
            self.examples[start:stop],
        )

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same prompts with their tensors on `device`."""
        return PromptBatch(
            self.prompt_ids.to(device), self.prompt_mask.to(device), self.row_ids.to(device), self.examples
        )


# ------------------------------------------------------------------------------------------------------------- rollouts

UNREACHED, GIVEN = -1, -2
"""Commit steps of tokens that no denoising step fixed: they fill up an ended completion, or stood there beforehand."""


@dataclass(frozen=True)
class Tree:
    """How the rollouts of a group share their first denoising steps (d-TreeRPO, arXiv 2512.09675).

    The fully masked canvas is the root at level 0; every node has `branching` children down to level `height`, where
    the leaves are the rollouts, those below a node adjacent. Edge k leads from level k to level k + 1; edges take equal
    shares of the steps.
    """

    branching: int
    height: int

    def __post_init__(self) -> None:
        for key, least in (("branching", 2), ("height", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"tree.{key}: {getattr(self, key)} is below {least}. Try: {least} or more")

    @property
    def leaves(self) -> int:
        """Rollouts of a group."""
        return self.width(0)

    def width(self, level: int) -> int:
        """Leaves below a node of a level."""
        return self.branching ** (self.height - level)

    def starts(self, num_steps: int) -> list[int]:
        """The step with which each edge begins."""
        return [edge * num_steps // self.height for edge in range(self.height)]

    def edge_of(self, step: int, num_steps: int) -> int:
        """The edge that a step of `num_steps` belongs to."""
        return sum(step >= start for start in self.starts(num_steps)) - 1


@dataclass(frozen=True)
class AttentionPattern:
    """Who may attend to whom where not everybody sees everything."""

    kind: Literal["blocks", "order"]
    """Block by block (BD3LM, arXiv 2503.09573), or in the order of commitment (d2-AnyOrder, arXiv 2509.21474)."""
    block_length: int | None = None
    """Of blocks that are counted from the completion's start; None: in an order, or blocks counted otherwise."""

    def __str__(self) -> str:
        if self.kind == "order":
            return "in the order of commitment"
        return f"in blocks of {self.block_length}" if self.block_length else "in blocks from the prompt on"


@dataclass(frozen=True)
class OrderLaw:
    """Positions drawn one by one from softmax(score / temperature) over those still open (Plackett-Luce)."""

    score: Literal["token", "head", "other"]
    """The log-probability of the token drawn there, what the network's order head says, or something else."""
    temperature: float

    def __str__(self) -> str:
        scores = {"token": "the tokens' log-probs", "head": "the order head", "other": "another score"}
        return f"drawn by {scores[self.score]} at temperature {self.temperature:g}"


@dataclass(frozen=True)
class StepRecord:
    """The denoising steps of some rollouts, each with the network's whole prediction."""

    standing: Int[Tensor, "S N C"]
    """The tokens that a step found on the canvas; of no meaning where it was masked, or was no step."""
    predictions: Int[Tensor, "S N C"]
    """As in `Rollout`."""
    logprobs: Float[Tensor, "S N C"]

    @property
    def masked(self) -> Bool[Tensor, "S N C"]:
        """Where the canvas was masked; nowhere in a step that a row did not take."""
        return self.predictions >= 0

    @property
    def taken(self) -> Bool[Tensor, "S N"]:
        """Which steps each row took: those that found a mask."""
        return self.masked.any(-1)

    @property
    def clean(self) -> Int[Tensor, "S N C"]:
        """The canvas with every mask filled by its proposal, the clean text as the step saw it (x0-hat)."""
        return torch.where(self.masked, self.predictions, self.standing)


@dataclass(frozen=True)
class Rollout:
    """Completions of a batch of prompts, group by group, with what the sampler saw when it committed each token."""

    prompt_ids: Int[Tensor, "N P"]
    prompt_mask: Bool[Tensor, "N P"]
    completion_ids: Int[Tensor, "N C"]
    completion_mask: Bool[Tensor, "N C"]
    """True up to and including the first end-of-sequence token."""
    row_ids: Int[Tensor, " N"]
    """Global id of each rollout: prompt row id * group_size + place in the group."""
    group_size: int
    commit_step: Int[Tensor, "N C"]
    """Index of the denoising step that last wrote each token; `UNREACHED` or `GIVEN` where none did, and then the three
    records below are 0."""
    sampled_logprobs: Float[Tensor, "N C"]
    """Log-probability of the chosen token under the distribution it was drawn from (temperature included); at
    temperature 1 of a token that an edit rule wrote."""
    confidence: Float[Tensor, "N C"]
    """The score by which the position was chosen when it was committed, in the unit of the sampler's confidence part
    (a probability, nats, ...)."""
    entropy: Float[Tensor, "N C"]
    """Entropy of the prediction (temperature 1) when the token was committed, in nats."""
    trace: Int[Tensor, "S N C"] | None = None
    """The canvas after every denoising step, on request (samplers that remask or edit, order methods, the player)."""
    completions: tuple[str, ...] = ()
    """Text of each completion up to the first end-of-sequence token."""
    examples: tuple[Example, ...] = ()
    num_forwards: int = 0
    """Network calls the sampler made for this batch."""
    num_tokens_forward: int = 0
    """Token positions those calls computed, over all rows (what the FLOP counters need)."""
    edge: Int[Tensor, "N C"] | None = None
    """The edge of the group's tree on which each token was fixed, its height where none was; None without a tree."""
    predictions: Int[Tensor, "S N C"] | None = None
    """What each denoising step proposed wherever the canvas was still masked, in the active block and behind it; -1
    where a token stood, or where the row took no such step. On request, together with the trace."""
    prediction_logprobs: Float[Tensor, "S N C"] | None = None
    """Of those proposals, as `sampled_logprobs`."""

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.completion_ids.device

    @property
    def given(self) -> Bool[Tensor, "N C"]:
        """True for tokens that stood on the canvas before sampling: the sampler drew the others around them."""
        return self.commit_step == GIVEN

    @property
    def steps(self) -> StepRecord:
        """What every denoising step saw and proposed.

        Raises:
            ValueError: if the sampler did not record it.
        """
        if self.trace is None or self.predictions is None or self.prediction_logprobs is None:
            raise ValueError(
                "rollout: the predictions of its denoising steps were not recorded. Try: a sampler `with_predictions()`"
            )
        # A token that stands at the first step was given, and stands at the end.
        before = torch.cat([self.completion_ids[None], self.trace])[: len(self.trace)]
        return StepRecord(before, self.predictions, self.prediction_logprobs)

    def rows(self, start: int, stop: int) -> Rollout:
        """The rollouts from `start` up to, not including, `stop`, as views; the cost counters stay with the whole."""
        cut = slice(start, stop)
        return replace(
            self,
            **{name: getattr(self, name)[cut] for name in _ROW_TENSORS},
            trace=None if self.trace is None else self.trace[:, cut],
            edge=None if self.edge is None else self.edge[cut],
            predictions=None if self.predictions is None else self.predictions[:, cut],
            prediction_logprobs=None if self.prediction_logprobs is None else self.prediction_logprobs[:, cut],
            completions=self.completions[cut],
            examples=self.examples[cut],
            num_forwards=0,
            num_tokens_forward=0,
        )


_ROW_TENSORS = (
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "row_ids",
    "commit_step",
    "sampled_logprobs",
    "confidence",
    "entropy",
)


# ----------------------------------------------------------------------------------------------------------- likelihood


POSITION = -1
"""A target that is no token but the position itself: it is scored by the order head, for its place in the order."""


@dataclass(frozen=True)
class Corruption:
    """Noised views of a rollout: what the network sees when it scores the rollout. All randomness is already in it."""

    noised_ids: Int[Tensor, "R T"]
    view_of: Int[Tensor, "N K"]
    """Which views score each rollout; -1 for none. Several rollouts may share a view."""
    target_ids: Int[Tensor, "N K C"]
    """The tokens scored in those views (the completion, unless a method says otherwise), or `POSITION`."""
    weight: Float[Tensor, "N K C"]
    """Share of each scored token under each view; 0 means not scored there."""
    score_from: int
    """Index in the view of the first scored position; positions score_from .. score_from + C - 1 are scored."""
    attention: Bool[Tensor, "R T"] | Bool[Tensor, "R T T"] | None = None
    """Which keys may be attended (per row, or per query and key); None: all."""
    position_ids: Int[Tensor, "R T"] | None = None
    temperature: float = 1.0
    """Logits are divided by it before the log-softmax."""
    guidance: float = 0.0
    """Classifier-free guidance scale s: logits become u + (s + 1)(c - u), u seen with the whole prompt masked."""
    exclude_mask: bool = False
    """The mask token takes no part in the softmax, as in the samplers; published estimators let it."""


@dataclass(frozen=True)
class Context:
    """What an estimator may know when it draws its corruption."""

    rollout: Rollout
    advantages: Float[Tensor, "..."]
    """[N] or [N U]; SPG chooses its bound by the sign."""
    inner: int
    num_inner_updates: int
    mask_token_id: int
    draws: Draws


@dataclass(frozen=True)
class LogProbs:
    """A likelihood of each rollout in units (tokens, one sequence, views or steps), in nats."""

    value: Float[Tensor, "N U"]
    weight: Float[Tensor, "N U"]
    """How much each unit counts; 0 where nothing was scored (past the end of the completion, say)."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Quantities a loss may want apart: both bounds, token and order likelihood, ..."""


@dataclass(frozen=True)
class Scores:
    """What the network said about a corruption."""

    logprobs: Float[Tensor, "N K C"]
    """Log-probability of each target in each view, the order head's score for `POSITION`; 0 where its weight is 0."""
    entropy: Float[Tensor, "N K C"] | None = None
    """Entropy of the prediction at each scored position in nats, on request."""


@dataclass(frozen=True)
class EstimatorTraits:
    """What an estimator says of itself: what cannot go with it is refused before a model loads."""

    unit: Unit
    """What one column of the likelihood stands for."""
    needs_trace: bool = False
    """It replays the steps at which the sampler committed the tokens."""
    needs_own_place: bool = False
    """It scores places that see each a context of their own: no network that predicts a token at the one before."""
    needs_advantages: bool = False
    """Its likelihood depends on the advantages."""
    needs_predictions: bool = False
    """It scores what every denoising step proposed (`Rollout.predictions`), whatever the sampler made of it."""
    pattern: AttentionPattern | None = None
    """Who may attend to whom in its views, as on the canvases of such a sampler and of no other; None: the sampler
    says it (`AttendingSampler`)."""
    order: OrderLaw | None = None
    """The law of the order that it scores. By the order head's scores: it asks for those of `POSITION`, and the stage
    gives the network such a head, which learns with the policy. None: it scores no order."""
    tree: Tree | None = None
    """How the rollouts branch that it scores; None: any rollouts."""
    is_mean_field: bool = False
    """All tokens are scored in one view, as if they were independent of each other."""
    is_upper_bound: bool = False
    """Nothing but an upper bound speaks for rollouts without a positive advantage."""
    parts: frozenset[str] = frozenset()
    """Names in `LogProbs.parts`."""


@runtime_checkable
class LogProbEstimator(Protocol):
    """Turns a rollout into noised views, and the network's verdict on them into a likelihood. Never calls a network."""

    @property
    def traits(self) -> EstimatorTraits:
        """What it is and needs; a class attribute where it does not depend on the fields."""
        ...

    def corrupt(self, context: Context) -> Corruption:
        """Draw the noised views; every random number comes from `context.draws`."""
        ...

    def combine(self, view_logprobs: Float[Tensor, "N K C"], corruption: Corruption, context: Context) -> LogProbs:
        """Pure maths: from token log-probabilities per view to the likelihood."""
        ...


# ------------------------------------------------------------------------------------------------------ rewards, losses


@dataclass(frozen=True)
class Verdict:
    """What a reward part or a grader says of one completion."""

    value: float
    outcome: Outcome = "ok"
    """ok: judged; unparsed: no answer found, or none that can be read; refused: beyond a bound, so not read; timeout,
    error: the judge failed, which is never a silent zero; skipped: the part judges another task."""
    parsed: str | None = None
    """The answer as it was read from the completion."""
    out_of: float = 1.0
    """The most that `value` can be where a grader counts (cells of a Sudoku); 1 elsewhere."""


@runtime_checkable
class Reward(Protocol):
    """Text to verdicts: no tensors, no printing, no side effects."""

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        """One verdict for each completion of the matching example."""
        ...


@dataclass(frozen=True)
class RewardBatch:
    """Reward parts as tensors, gathered over all ranks of an update."""

    value: Float[Tensor, "N *S F"]
    """[N F] of completions; [N S F] of what each denoising step predicted."""
    valid: Bool[Tensor, "N *S F"]
    """False where a judge failed (timeout, error), or where a rollout took no such step."""
    weights: Float[Tensor, " F"]
    step: int = 0
    """Which rollout of the run this is, for the rare advantage that draws."""
    asked: Bool[Tensor, "N *S F"] | None = None
    """False where a part judges another task than the row's, and its value is 0; None: every part judges every row."""

    @property
    def total(self) -> Float[Tensor, "N *S"]:
        """Weighted sum of the valid parts."""
        return (torch.where(self.valid, self.value, 0.0) * self.weights).sum(-1)


@runtime_checkable
class Advantage(Protocol):
    """From the rewards of whole groups to one number a rollout, or one for each edge of its tree or denoising step.

    One that has an attribute `of_steps`, and it is true, is given the rewards of what every step predicted.
    """

    def __call__(self, rewards: RewardBatch, group_size: int) -> Float[Tensor, "N ..."]:
        """Advantages of all N rollouts; rows of one group are adjacent."""
        ...


@dataclass(frozen=True)
class LossInputs:
    """All a policy loss may read. Likelihoods of the same corruption, so their differences mean something."""

    logprobs: LogProbs
    old: LogProbs | None
    ref: LogProbs | None
    advantages: Float[Tensor, "..."]
    """[N] or [N U]."""
    rewards: Float[Tensor, " N"]
    """Weighted sum of each rollout's reward parts."""
    group_size: int
    completion_mask: Bool[Tensor, "N C"]
    entropy: Float[Tensor, "N U"] | None
    """Of the current policy's predictions, in nats, brought to units as the log-probs are; without gradient; None where
    the loss does not ask for it."""
    num_units: float
    """Total unit weight in the GLOBAL batch of this update, over accumulation and ranks; tokens for token losses."""
    num_rollouts: float
    """Rollouts in the GLOBAL batch of this update."""
    given: Bool[Tensor, "N C"] | None = None
    """True for tokens that the sampler did not draw (`Rollout.given`); None: it drew all."""
    progress: float = 0.0
    """Share of the stage's updates that lie behind this one, in [0, 1)."""


@dataclass(frozen=True)
class LossTraits:
    """What a policy loss says of itself: passes nobody wants are not made, and senseless pairs are refused."""

    units: frozenset[str]
    """Units of likelihood that the loss makes sense of."""
    needs_old: bool = False
    """It reads the log-probs of the policy that sampled."""
    needs_reference: bool = False
    """It reads those of the reference policy."""
    needs_entropy: bool = False
    """It reads the entropy of the predictions."""
    needs_parts: frozenset[str] = frozenset()
    """Parts of the estimator's likelihood that it reads."""
    group_size: int | None = None
    """The one group size it makes sense of; None: any."""
    tree: Tree | None = None
    """How the rollouts branch whose edges it tells apart; None: it does not."""
    takes_unit_advantages: bool = False
    """It makes sense of one advantage a unit, [N U]; else of one a rollout, [N]."""


@runtime_checkable
class PolicyLoss(Protocol):
    """A scalar to minimise, and what to log. Sums over its rollouts divided by GLOBAL counts: micro-batches add up."""

    @property
    def traits(self) -> LossTraits:
        """What it is and needs; a class attribute where it does not depend on the fields."""
        ...

    def __call__(self, inputs: LossInputs) -> tuple[Float[Tensor, ""], Metrics]:
        """The loss of this micro-batch as its share of the global one, and detached metrics."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """A masking schedule: alpha(t) is the probability that a token is still clean at time t."""

    def alpha(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Survival probability, 1 at t = 0 and 0 at t = 1 (up to the schedule's guard)."""
        ...

    def mask_prob(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """1 - alpha(t)."""
        ...

    def weight(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """-alpha'(t) / (1 - alpha(t)), the weight that makes masked cross-entropy a likelihood bound."""
        ...


@runtime_checkable
class TimeSampler(Protocol):
    """How the times of a batch are drawn."""

    def __call__(
        self, draws: Draws, row_ids: Int[Tensor, " n"], places: Int[Tensor, " n"], num_places: int
    ) -> Float[Tensor, " n"]:
        """One time for each row; `places` are the rows' places 0 .. num_places - 1 in the GLOBAL batch."""
        ...


@runtime_checkable
class MaskRule(Protocol):
    """Which tokens are hidden at a given mask probability."""

    def __call__(
        self, draws: Draws, row_ids: Int[Tensor, " n"], mask_prob: Float[Tensor, " n"], is_maskable: Bool[Tensor, "n T"]
    ) -> Bool[Tensor, "n T"]:
        """True where a token is hidden."""
        ...

    def weight(
        self, draws: Draws, row_ids: Int[Tensor, " n"], mask_prob: Float[Tensor, " n"], is_maskable: Bool[Tensor, "n T"]
    ) -> Float[Tensor, "n T"]:
        """Factor on the schedule's weight of each token; 1 where each is hidden with probability `mask_prob`."""
        ...


@dataclass(frozen=True)
class NoisedRows:
    """Training rows, and which of their tokens are hidden."""

    ids: Int[Tensor, "n T"]
    is_masked: Bool[Tensor, "n T"]
    is_target: Bool[Tensor, "n T"]
    """What could have been hidden: the completion."""
    attention: Bool[Tensor, "n T"] | None
    """Leaves out padding; None where there is none."""
    row_ids: Int[Tensor, " n"]
    mask_token_id: int

    @property
    def is_seen(self) -> Bool[Tensor, "n T"]:
        """All but padding."""
        return torch.ones_like(self.is_masked) if self.attention is None else self.attention

    @property
    def first_target(self) -> int:
        """The first column in which a row has a target."""
        return int(self.is_target.any(0).int().argmax())


@dataclass(frozen=True)
class SeenRows:
    """What the network sees of noised training rows."""

    ids: Int[Tensor, "n S"]
    attention: Bool[Tensor, "n S"] | Bool[Tensor, "n S S"] | None
    position_ids: Int[Tensor, "n S"] | None
    slots: Int[Tensor, " T"]
    """Where in `ids` the hidden token of each column of the row is predicted."""


@runtime_checkable
class RowView(Protocol):
    """What the network sees of a training row of which some tokens are hidden."""

    @property
    def pattern(self) -> AttentionPattern | None:
        """Who may attend to whom in it, and so in rollouts of what learns by it; None: everybody to everything."""
        ...

    def __call__(self, rows: NoisedRows, draws: Draws) -> SeenRows:
        """The rows as they go through the network."""
        ...

    def length(self, prompt_length: int, num_targets: int) -> int:
        """Tokens that go through the network for a row of so many."""
        ...


# -------------------------------------------------------------------------------------------------------------- network


@runtime_checkable
class MaskPredictor(Protocol):
    """A bidirectional network that predicts the clean token at every position, whatever its family."""

    @property
    def mask_token_id(self) -> int:
        """Id of [MASK]."""
        ...

    @property
    def eos_token_id(self) -> int:
        """Id that ends a completion."""
        ...

    @property
    def pad_token_id(self) -> int:
        """Id that fills prompts on the left."""
        ...

    def hidden(
        self,
        ids: Int[Tensor, "R T"],
        attention: Bool[Tensor, "R T"] | Bool[Tensor, "R T T"] | None = None,
        position_ids: Int[Tensor, "R T"] | None = None,
        keep: Int[Tensor, "R M"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "R M D"]:
        """Final hidden states from which `head` predicts the tokens AT the kept positions (Dream's shift is inside).

        With `keep`, the last block and the head do no work elsewhere; without, M = T.
        """
        ...

    def head(self, hidden: Float[Tensor, "*M D"]) -> Float[Tensor, "*M V"]:
        """Logits, in float32."""
        ...

    def logprobs(
        self,
        hidden: Float[Tensor, "M D"],
        targets: Int[Tensor, "M J"],
        temperature: float = 1.0,
        exclude_mask: bool = False,
    ) -> Float[Tensor, "M J"]:
        """Log-probabilities of J targets at each position, without a [M, V] tensor in memory.

        Where a target is `POSITION`: the score of the order head, 0 for a network without one.
        """
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within the context the network is the reference policy: adapter off, or the frozen copy."""
        ...


@runtime_checkable
class OrderPredictor(MaskPredictor, Protocol):
    """A mask predictor that may have a head for the order in which positions are fixed."""

    def order_scores(self, hidden: Float[Tensor, "*M D"]) -> Float[Tensor, "*M"] | None:
        """A score for each position, the higher the earlier; None without a head."""
        ...


@runtime_checkable
class AttendingSampler(Protocol):
    """A sampler that can say who attended to whom on its canvases, so that views of a rollout are scored alike."""

    @property
    def pattern(self) -> AttentionPattern | None:
        """None: everybody to everything."""
        ...

    def attended(self, corruption: Corruption) -> Corruption:
        """The views in that pattern, unless they bring their own."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """The reverse process: fills a masked canvas after each prompt and records what happened."""

    def __call__(self, policy: MaskPredictor, prompts: PromptBatch, group_size: int, draws: Draws) -> Rollout:
        """`group_size` completions of each prompt, adjacent; text is added by the caller, who knows the tokenizer."""
        ...
