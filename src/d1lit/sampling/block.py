"""The block sampler: blocks of the completion are unmasked from left to right, each over several denoising steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from d1lit.sampling.cache import RolloutCache, SpanStorage
from d1lit.sampling.commit import CumulativeEntropyBounded, EntropyBounded
from d1lit.sampling.confidence import NegativeEntropy
from d1lit.sampling.parts import Cells, CommitRule, Confidence, Proposal
from d1lit.sampling.prediction import Canvas, View, choose, entropies, evaluation_mode, predict
from d1lit.sampling.replay import approximation_nats
from d1lit.sampling.rows import Rows, lay_out
from d1lit.types import Draws, MaskPredictor, PromptBatch, Rollout


@dataclass(frozen=True)
class _Wave:
    """Rows that go through the steps of a block together; without a cache they may stand at different blocks."""

    index: Int[Tensor, " n"]
    first: Int[Tensor, " n"]
    """Where the active block of each starts in the completion."""
    cache: SpanStorage | None = None
    span: tuple[int, int] = (0, 0)
    """What the steps after the first compute, where there is a cache."""

    def select(self, places: list[int], guided: bool) -> _Wave:
        """Some of the rows."""
        chosen = torch.tensor(places, device=self.index.device)
        cache = self.cache
        if cache is not None:
            cache = cache.select(torch.cat([chosen, chosen + len(self.index)]) if guided else chosen)
        return replace(self, index=self.index[chosen], first=self.first[chosen], cache=cache)


@dataclass(frozen=True)
class _Moment:
    """A denoising step of a block."""

    step: int
    quota: int | None
    fresh: bool
    """True for the first forward of the block."""


@dataclass(frozen=True)
class BlockSampler:
    """Semi-autoregressive unmasking (LLaDA, arXiv 2502.09992; d1, arXiv 2504.12216); exact unless a part says not.

    Every forward runs the last block of the network and the head only where the active block is still masked; nothing
    of the size of completion times vocabulary is kept; at temperature 0 nothing is drawn. With a quota rule the
    step loop never reads from the device; EOS stop reads once a block. A row's result depends on nothing but the row.
    Differs from the paper's code: the mask token is never proposed (the reference would leave it in its output), and a
    finished row (`stop_at_eos`) leaves the batch for a waiting one.
    """

    completion_length: int
    num_steps: int
    """Over the whole completion; each block gets num_steps // blocks of them, at least one."""
    block_length: int
    temperature: float
    guidance: float
    """Classifier-free guidance scale s; 0 turns it off and halves the cost."""
    proposal: Proposal
    confidence: Confidence
    commit: CommitRule
    stop_at_eos: bool
    """A row ends once a FINISHED block holds EOS; blocks never reached are filled with EOS at commit step -1."""
    cache: RolloutCache | None = None
    """None: exact. A prefix or dual cache is faster and approximate."""
    record_trace: bool = False
    rows_per_forward: int | None = None
    """Most rows in one network call (a guided row counts twice); None: all of them."""

    def __post_init__(self) -> None:
        for key in ("completion_length", "num_steps", "block_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"sampler.{key}: {getattr(self, key)} must be at least 1. Try: a positive number.")
        if self.completion_length % self.block_length:
            raise ValueError(
                f"sampler.block_length: {self.block_length} does not divide completion_length"
                f" {self.completion_length}. Try: a divisor of {self.completion_length}."
            )
        for key in ("temperature", "guidance"):
            if getattr(self, key) < 0:
                raise ValueError(f"sampler.{key}: {getattr(self, key)} must not be below 0. Try: 0.")
        if self.rows_per_forward is not None and self.rows_per_forward < (2 if self.guidance else 1):
            raise ValueError(
                f"sampler.rows_per_forward: {self.rows_per_forward} leaves no room for a row"
                " (a guided one counts twice). Try: 2 or more."
            )
        bounded = isinstance(self.commit, EntropyBounded | CumulativeEntropyBounded)
        if bounded and not isinstance(self.confidence, NegativeEntropy):
            raise ValueError(
                f"sampler.confidence: {type(self.confidence).__name__} is no entropy, which"
                f" {type(self.commit).__name__} bounds. Try: NegativeEntropy."
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of a completion."""
        return self.completion_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Denoising steps planned for each block; a rule that decides from the predictions may take others."""
        return max(1, self.num_steps // self.num_blocks)

    def __call__(self, policy: MaskPredictor, prompts: PromptBatch, group_size: int, draws: Draws) -> Rollout:
        """`group_size` completions of each prompt, adjacent.

        Raises:
            ValueError: no prompts, or a group of none.
        """
        if group_size < 1 or len(prompts.row_ids) == 0:
            raise ValueError(
                f"sampler: {len(prompts.row_ids)} prompts in groups of {group_size} make no rollout. Try: at least one."
            )
        most_steps = self.num_blocks * max(self.steps_per_block, self.block_length) if self.record_trace else 0
        with evaluation_mode(policy), torch.inference_mode():
            rows = lay_out(prompts, group_size, self.completion_length, policy.mask_token_id, most_steps)
            self._fill(policy, rows, draws)
        return rows.rollout(policy.eos_token_id)

    @property
    def is_approximate(self) -> bool:
        """True under a cache, whose keys and values are stale."""
        return self.cache is not None

    def replay(self, policy: MaskPredictor, rollout: Rollout, num_rows: int) -> Float[Tensor, ""]:
        """Mean |log p of the exact network - log p recorded| of the chosen tokens, over some rows, in nats."""
        return approximation_nats(policy, rollout, self.temperature, self.guidance, num_rows)

    def _fill(self, policy: MaskPredictor, rows: Rows, draws: Draws) -> None:
        """Block after block for the rows on board; a finished row makes room for one that waits."""
        waiting = list(range(len(rows.row_ids)))[::-1]
        room = self.rows_per_forward or 2 * len(waiting)
        room = room // 2 if self.guidance else room
        aboard: dict[int, int] = {}  # row -> its next block
        while waiting or aboard:
            # Rows under a cache share the span that a forward computes, so they board and travel together.
            while waiting and len(aboard) < room and (self.cache is None or not any(aboard.values())):
                aboard[waiting.pop()] = 0
            self._fill_block(policy, rows, self._wave(rows, aboard), draws)
            aboard = {row: block + 1 for row, block in aboard.items() if block + 1 < self.num_blocks}
            if self.stop_at_eos and aboard:
                ended = rows.end_at_eos(torch.tensor(list(aboard), device=rows.ids.device), policy.eos_token_id)
                aboard = {row: aboard[row] for row, end in zip(list(aboard), ended, strict=True) if not end}

    def _wave(self, rows: Rows, aboard: dict[int, int]) -> _Wave:
        """The rows on board at their blocks."""
        device = rows.ids.device
        index = torch.tensor(list(aboard), device=device)
        first = torch.tensor(list(aboard.values()), device=device) * self.block_length
        if self.cache is None:
            return _Wave(index, first)
        (block,) = set(aboard.values())
        start = rows.prompt_length + block * self.block_length
        span = self.cache.span(start, start + self.block_length, rows.ids.shape[1])
        return _Wave(index, first, self.cache.storage(), span)

    def _fill_block(self, policy: MaskPredictor, rows: Rows, wave: _Wave, draws: Draws) -> None:
        """All denoising steps of one block of each row."""
        quotas = self.commit.quotas(self.block_length, self.steps_per_block)
        computed = 0
        if quotas is not None:
            left = self.block_length
            for step, quota in enumerate(quotas):
                # A step that fixes nothing changes nothing: it keeps its number and needs no forward.
                if quota:
                    self._step(policy, rows, wave, left, _Moment(step, quota, computed == 0), draws)
                    computed += 1
                rows.close_step(wave.index)
                left -= quota
            return
        while True:
            masked = rows.block_ids(wave.index, wave.first, self.block_length) == policy.mask_token_id
            counts = masked.sum(1).tolist()
            if not any(counts):
                return
            if not all(counts):
                wave = wave.select([place for place, count in enumerate(counts) if count], self.guidance > 0)
            self._step(policy, rows, wave, max(counts), _Moment(computed, None, computed == 0), draws)
            rows.close_step(wave.index)
            computed += 1

    def _step(self, policy: MaskPredictor, rows: Rows, wave: _Wave, width: int, moment: _Moment, draws: Draws) -> None:
        """One forward: predictions at the `width` leftmost masked positions of the block, some of them fixed."""
        masked = rows.block_ids(wave.index, wave.first, self.block_length) == policy.mask_token_id
        inside = masked.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
        cells = Cells(
            row_ids=rows.row_ids[wave.index],
            positions=wave.first[:, None] + inside,
            candidates=masked.gather(1, inside),
            completion_length=self.completion_length,
            step=moment.step,
            num_steps=self.steps_per_block,
            quota=moment.quota,
            draws=draws,
        )
        logits = self._predict(policy, rows, wave, cells, moment.fresh)
        choice, scores = choose(logits, cells, policy.mask_token_id, self.temperature, self.proposal, self.confidence)
        scores = scores.masked_fill(~cells.candidates, -torch.inf)
        selected = self.commit.select(scores, cells)
        # The flat places of the fixed cells: known in number with a quota, so no read from the device.
        if moment.quota is None:
            places = selected.flatten().nonzero()[:, 0]
        else:
            columns = selected.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : moment.quota]
            places = (torch.arange(len(wave.index), device=columns.device)[:, None] * width + columns).flatten()
        who, where = wave.index[places // width], cells.positions.flatten()[places]
        rows.ids[who, rows.prompt_length + where] = choice.tokens[places].to(rows.ids.dtype)
        rows.commit_step[who, where] = rows.steps_taken[who]
        rows.sampled_logprobs[who, where] = choice.logprobs[places].float()
        rows.confidence[who, where] = scores.flatten()[places].float()
        rows.entropy[who, where] = entropies(logits.flatten(0, 1), places).float()

    def _predict(
        self, policy: MaskPredictor, rows: Rows, wave: _Wave, cells: Cells, fresh: bool
    ) -> Float[Tensor, "n M V"]:
        """Logits at the cells, counted; the first forward of a block fills the cache where there is one."""
        attention = None if rows.attention is None else rows.attention[wave.index]
        canvas = Canvas(rows.ids[wave.index], attention, rows.prompt_length)
        span, cache = (0, rows.ids.shape[1]), wave.cache
        if cache is not None and not fresh:
            span, cache = wave.span, cache.at(*wave.span)
        rows.num_forwards += 1
        rows.num_tokens_forward += len(wave.index) * (span[1] - span[0]) * (2 if self.guidance else 1)
        return predict(policy, canvas, rows.prompt_length + cells.positions, self.guidance, View(span, cache))
