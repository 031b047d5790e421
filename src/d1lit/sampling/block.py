"""The block sampler: blocks of the completion are unmasked from left to right, each over several denoising steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.models import Policy
from d1lit.sampling.cache import RolloutCache, SpanStorage
from d1lit.sampling.confidence import PlackettLuce, SampledLogProb
from d1lit.sampling.order_head import OrderScore
from d1lit.sampling.parts import (
    Cells,
    Choice,
    CommitRule,
    Confidence,
    EditRule,
    Memory,
    Proposal,
    RemaskRule,
    Standing,
    StepMemory,
)
from d1lit.sampling.prediction import (
    Canvas,
    View,
    any_order,
    block_causal,
    choose,
    entropies,
    evaluation_mode,
    predict_with_order,
)
from d1lit.sampling.refusals import check_sampler
from d1lit.sampling.remask import with_shadow
from d1lit.sampling.replay import approximation_nats
from d1lit.sampling.rows import CanvasBatch, lay_out
from d1lit.sampling.sharing import Sharing, edges, sharing
from d1lit.types import AttentionPattern, Corruption, Draws, MaskPredictor, OrderLaw, PromptBatch, Rollout, Tree


@dataclass(frozen=True)
class _Wave:
    """Rows that go through the steps of a block together; without a cache they may stand at different blocks."""

    index: Int[Tensor, " n"]
    first: Int[Tensor, " n"]
    """Where the active block of each starts in the completion."""
    cache: SpanStorage | None = None
    span: tuple[int, int] = (0, 0)
    """What the steps after the first compute, where there is a cache."""
    rows: tuple[tuple[int, int], ...] = ()
    """Row and block of each on the host, where a tree asks for them."""

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
    quota: int | Int[Tensor, "n 1"] | None
    fresh: bool
    """True for the first forward of the block."""


@dataclass(frozen=True)
class BlockSampler:
    """Semi-autoregressive unmasking (LLaDA, arXiv 2502.09992; d1, arXiv 2504.12216); exact unless a part says not.

    Every forward runs the last block of the network and the head only where the active block is still masked; nothing
    of the size of completion times vocabulary is kept; at temperature 0 nothing is drawn. With a quota rule the
    step loop never reads from the device; EOS stop, and given tokens, read once a block, recorded predictions once a
    step. A row's result depends on nothing but the row; in a tree, on its group.
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
    remask: RemaskRule | None = None
    """None: a token that is fixed stays."""
    edit: EditRule | None = None
    """None: a token that stands is never replaced by another. Every forward with one predicts the whole block."""
    memory: StepMemory | None = None
    """None: a step knows nothing of the predictions before it."""
    block_causal: bool = False
    """Block diffusion decoding (BD3LM, arXiv 2503.09573): a block sees the prompt, the blocks before it and itself, and
    no masks behind it. For networks trained so; then a cache is exact."""
    any_order: bool = False
    """Attention in the order of commitment (d2-AnyOrder, arXiv 2509.21474), see `prediction.any_order`. For networks
    trained so."""
    record_trace: bool = False
    record_predictions: bool = False
    """Keep what every step proposes for ALL masks, those behind the active block too, which costs the last block of the
    network and the head there; and the trace. The rollout is the same. A stage whose method asks for them sets it."""
    rows_per_forward: int | None = None
    """Most rows in one network call (a guided row counts twice); None: all of them."""
    tree: Tree | None = None
    """The rollouts of a group branch off each other (d-TreeRPO, arXiv 2512.09675), each of them still a draw of this
    sampler's law; rows at one canvas share a forward. None: they are independent."""

    def __post_init__(self) -> None:
        check_sampler(self)

    @property
    def num_blocks(self) -> int:
        """Blocks of a completion."""
        return self.completion_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Denoising steps planned for each block; a rule that decides from the predictions may take others."""
        return max(1, self.num_steps // self.num_blocks)

    @property
    def total_steps(self) -> int:
        """Denoising steps planned for a completion."""
        return self.num_blocks * self.steps_per_block

    @property
    def verifies(self) -> bool:
        """True where every forward carries a hidden copy of the block."""
        return self.remask is not None and self.remask.verifies

    @property
    def reviser(self) -> RemaskRule | EditRule | None:
        """The part that hides or replaces tokens that stood: with one no commit step tells what the network saw."""
        return self.edit if self.remask is None else self.remask

    @property
    def pattern(self) -> AttentionPattern | None:
        """Who may attend to whom on its canvases; None: everybody to everything."""
        if self.block_causal:
            return AttentionPattern("blocks", self.block_length)
        return AttentionPattern("order") if self.any_order else None

    @property
    def order_law(self) -> OrderLaw | None:
        """How the positions of a step are drawn; None where they go by rank, or the predictions decide how many."""
        law = self.confidence
        if not isinstance(law, PlackettLuce) or self.commit.quotas(self.block_length, self.steps_per_block) is None:
            return None
        head, token = (isinstance(law.confidence, kind) for kind in (OrderScore, SampledLogProb))
        return OrderLaw("head" if head else "token" if token else "other", law.temperature)

    @property
    def blank_only(self) -> str | None:
        """Key and kind of the part that makes no sense of tokens which stood beforehand; None: `complete` works."""
        parts = {"remask": self.remask, "edit": self.edit, "tree": self.tree}
        named = (f"{key}: {type(part).__name__}" for key, part in parts.items() if part is not None)
        return next(named, "any_order: it" if self.any_order else None)

    def __call__(self, policy: MaskPredictor, prompts: PromptBatch, group_size: int, draws: Draws) -> Rollout:
        """`group_size` completions of each prompt, adjacent.

        Raises:
            ValueError: no prompts, or a group of none; or a network that a part cannot work with.
        """
        return self._sampled(policy, prompts, group_size, draws, None)

    def complete(
        self,
        policy: MaskPredictor,
        prompts: PromptBatch,
        group_size: int,
        draws: Draws,
        canvas: Int[Tensor, "N C"],
    ) -> Rollout:
        """The same around tokens that stand already: only the masks of `canvas` are filled, a block's over its steps.

        A given token is never hidden, drawn or scored: its commit step is `GIVEN`.

        Raises:
            ValueError: as above; or a canvas of another shape, or a part that has to begin at a blank one.
        """
        shape = (len(prompts.row_ids) * group_size, self.completion_length)
        if tuple(canvas.shape) != shape:
            raise ValueError(f"sampler: a canvas of {tuple(canvas.shape)} for completions of {shape}. Try: one a row.")
        if self.blank_only is not None:
            raise ValueError(
                f"sampler.{self.blank_only} reckons with the tokens that the sampler fixed, and knows of none that "
                "were given. Try: a sampler without it."
            )
        return self._sampled(policy, prompts, group_size, draws, canvas)

    def _sampled(
        self,
        policy: MaskPredictor,
        prompts: PromptBatch,
        group_size: int,
        draws: Draws,
        given: Int[Tensor, "N C"] | None,
    ) -> Rollout:
        if group_size < 1 or len(prompts.row_ids) == 0:
            raise ValueError(
                f"sampler: {len(prompts.row_ids)} prompts in groups of {group_size} make no rollout. Try: at least one."
            )
        if self.tree is not None and group_size != self.tree.leaves:
            leaves = self.tree.leaves
            raise ValueError(f"sampler.tree: {leaves} leaves are no group of {group_size}. Try: group_size={leaves}.")
        attends = self.pattern is not None
        if (self.verifies or attends) and isinstance(policy, Policy) and policy.network.config.shift:
            key = "block_causal" if self.block_causal else "any_order"
            part = f"remask: {type(self.remask).__name__}" if self.verifies else f"{key}: it"
            raise ValueError(
                f"sampler.{part} needs a network that predicts a token at its own place, not at the one before."
                " Try: model=llada_8b, or another sampler."
            )
        checks = 0 if self.edit is None else self.edit.num_checks
        most_steps = self.num_blocks * (max(self.steps_per_block, self.block_length) + checks)
        with evaluation_mode(policy), torch.inference_mode():
            rows = lay_out(
                prompts,
                group_size,
                self.completion_length,
                policy.mask_token_id,
                most_steps if self.record_trace or self.record_predictions else 0,
                given,
                self.record_predictions,
            )
            self._fill(policy, rows, draws)
        rollout = rows.rollout(policy.eos_token_id)
        if self.tree is None:
            return rollout
        return replace(rollout, edge=edges(self.tree, rollout.commit_step, self.total_steps))

    def with_predictions(self) -> BlockSampler:
        """The same sampler, recording what every step proposes.

        Raises:
            ValueError: if a part does not go with that.
        """
        return replace(self, record_predictions=True)

    @property
    def looks_ahead(self) -> bool:
        """Whether a forward predicts the masks behind the active block too."""
        return self.record_predictions or (self.memory is not None and self.memory.looks_ahead)

    @property
    def is_approximate(self) -> bool:
        """True under a cache, whose keys and values are stale unless no block sees what comes after it."""
        return self.cache is not None and not self.block_causal

    def replay(self, policy: MaskPredictor, rollout: Rollout, num_rows: int) -> Float[Tensor, ""]:
        """Mean |log p of the exact network - log p recorded| of the chosen tokens, over some rows, in nats."""
        return approximation_nats(policy, rollout, self.temperature, self.guidance, num_rows, self._attended)

    def attended(self, corruption: Corruption) -> Corruption:
        """Views of a rollout in which everyone sees what it saw on the canvas; an estimator's own pattern stays."""
        seen = corruption.attention
        if not self.block_causal or (seen is not None and seen.dim() == 3):
            return corruption
        canvas = block_causal(Canvas(corruption.noised_ids, seen, corruption.score_from), self.block_length)
        return replace(corruption, attention=canvas.attention)

    def _attended(self, canvas: Canvas, commit_step: Int[Tensor, "n C"]) -> Canvas:
        """The canvas with who may attend to whom, where that is not everybody to everything."""
        if self.block_causal:
            canvas = block_causal(canvas, self.block_length)
        return any_order(canvas, commit_step) if self.any_order else canvas

    def _fill(self, policy: MaskPredictor, rows: CanvasBatch, draws: Draws) -> None:
        """Block after block for the rows on board; a finished row makes room for one that waits."""
        waiting = list(range(len(rows.row_ids)))[::-1]
        room = self.room_for(self.rows_per_forward or 2 * len(waiting))
        together = 1 if self.tree is None else self.tree.leaves
        aboard: dict[int, int] = {}  # row -> its next block
        while waiting or aboard:
            # Rows under a cache share the span that a forward computes, so they board and travel together.
            while waiting and len(aboard) + together <= room and (self.cache is None or not any(aboard.values())):
                aboard |= {waiting.pop(): 0 for _ in range(together)}
            self._fill_block(policy, rows, self._wave(rows, aboard), draws)
            aboard = {row: block + 1 for row, block in aboard.items() if block + 1 < self.num_blocks}
            if self.stop_at_eos and aboard:
                index, done = torch.tensor([list(aboard), list(aboard.values())], device=rows.ids.device)
                ended = rows.end_at_eos(index, done * self.block_length, policy.eos_token_id)
                aboard = {row: aboard[row] for row, end in zip(list(aboard), ended, strict=True) if not end}

    def room_for(self, rows: int) -> int:
        """How many rows of the call make at most so many rows of a forward."""
        return rows // 2 if self.guidance else rows

    def _wave(self, rows: CanvasBatch, aboard: dict[int, int]) -> _Wave:
        """The rows on board at their blocks."""
        device = rows.ids.device
        index = torch.tensor(list(aboard), device=device)
        first = torch.tensor(list(aboard.values()), device=device) * self.block_length
        if self.cache is None:
            return _Wave(index, first, rows=() if self.tree is None else tuple(aboard.items()))
        (block,) = set(aboard.values())
        start = rows.prompt_length + block * self.block_length
        span = self.cache.span(start, start + self.block_length, rows.ids.shape[1])
        return _Wave(index, first, self.cache.storage(), span)

    def _fill_block(self, policy: MaskPredictor, rows: CanvasBatch, wave: _Wave, draws: Draws) -> None:
        """All denoising steps of one block of each row."""
        if rows.memory is not None and rows.memory.width == self.block_length:
            rows.memory.forget(wave.index)
        plan = self._plan(policy, rows, wave)
        computed = 0
        if plan is not None:
            for step, (left, most, quota) in enumerate(plan):
                # A step that fixes nothing changes nothing: it keeps its number and needs no forward.
                if most:
                    self._step(policy, rows, wave, left, _Moment(step, quota, computed == 0), draws)
                    computed += 1
                rows.close_step(wave.index)
            return
        if self.edit is not None:
            rows.checks[wave.index] = self.edit.num_checks
        while True:
            masked = self._masked(policy, rows, wave).sum(1)
            counts, checks = torch.stack([masked, rows.checks[wave.index]]).tolist()
            busy = [place for place, left in enumerate(zip(counts, checks, strict=True)) if any(left)]
            goes_on = self.remask is not None and self.remask.runs_all_steps and computed < self.steps_per_block
            if not busy and not goes_on:
                return
            if len(busy) < len(counts) and not goes_on:
                wave = wave.select(busy, self.guidance > 0)
            moment, verified = _Moment(computed, None, computed == 0), None
            if busy:
                width = max(counts) if self.edit is None else self.block_length
                verified = self._step(policy, rows, wave, width, moment, draws)
            if self.remask is not None:
                self._remask(self.remask, policy.mask_token_id, rows, wave, moment, verified, draws)
            rows.close_step(wave.index)
            computed += 1

    def _plan(
        self, policy: MaskPredictor, rows: CanvasBatch, wave: _Wave
    ) -> list[tuple[int, int, int | Int[Tensor, "n 1"]]] | None:
        """Of each step: the most masks that a row has left, the most it fixes, and what each fixes; None: unplanned."""
        same = self.commit.quotas(self.block_length, self.steps_per_block)
        if same is None:
            return None
        if not rows.has_given:
            return [(self.block_length - sum(same[:step]), quota, quota) for step, quota in enumerate(same)]
        counts = self._masked(policy, rows, wave).sum(1)
        each = [self.commit.quotas(count, self.steps_per_block) for count in counts.tolist()]
        quotas = torch.tensor(each, device=counts.device)
        left = counts[:, None] - quotas.cumsum(1) + quotas
        most = zip(left.amax(0).tolist(), quotas.amax(0).tolist(), strict=True)
        return [(*numbers, quotas[:, step, None]) for step, numbers in enumerate(most)]

    def _masked(self, policy: MaskPredictor, rows: CanvasBatch, wave: _Wave) -> Bool[Tensor, "n block"]:
        """Which positions of the block are masked."""
        return rows.block_ids(wave.index, wave.first, self.block_length) == policy.mask_token_id

    def _sharing(self, wave: _Wave, moment: _Moment) -> Sharing | None:
        """Which rows stand at one canvas."""
        if self.tree is None:
            return None
        steps = [block * self.steps_per_block + moment.step for _, block in wave.rows]
        return sharing(self.tree, [row for row, _ in wave.rows], steps, self.total_steps, wave.index.device)

    def _cells(
        self, policy: MaskPredictor, rows: CanvasBatch, wave: _Wave, width: int, moment: _Moment, draws: Draws
    ) -> Cells:
        """The positions that the step predicts: the `width` leftmost masked ones of the block, or all masked ones."""
        masked, first = self._masked(policy, rows, wave), wave.first[:, None]
        if self.looks_ahead:
            first = torch.zeros_like(first)
            masked = rows.block_ids(wave.index, first[:, 0], self.completion_length) == policy.mask_token_id
            width = int(masked.sum(1).max())
        inside = masked.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
        positions = first + inside
        return Cells(
            row_ids=rows.row_ids[wave.index],
            positions=positions,
            candidates=masked.gather(1, inside) & (positions < wave.first[:, None] + self.block_length),
            completion_length=self.completion_length,
            step=moment.step,
            num_steps=self.steps_per_block,
            quota=moment.quota,
            draws=draws,
            block_length=self.block_length,
            index=wave.index,
        )

    def _step(
        self, policy: MaskPredictor, rows: CanvasBatch, wave: _Wave, width: int, moment: _Moment, draws: Draws
    ) -> Float[Tensor, "n block"] | None:
        """One forward: predictions at the `width` leftmost masked positions of the block, some of them fixed.

        Returns:
            The probabilities that a remask rule verifies the block by, where it asks for them.
        """
        cells = self._cells(policy, rows, wave, width, moment, draws)
        shared = self._sharing(wave, moment)
        if shared is None:
            logits, order, verified = self._predict(policy, rows, wave, cells.positions, moment.fresh)
        else:
            cells = replace(cells, row_ids=rows.row_ids[shared.drawn_by])
            apart = replace(wave, index=wave.index[shared.first], first=wave.first[shared.first])
            logits, order, verified = self._predict(policy, rows, apart, cells.positions[shared.first], moment.fresh)
            logits, order = logits[shared.canvas], None if order is None else order[shared.canvas]
        if self.memory is not None:
            cells = replace(cells, memory=self._remembered(rows, logits))
            logits = self.memory(logits, cells)
        choice, scores = choose(
            logits, cells, policy.mask_token_id, self.temperature, self.proposal, self.confidence, order
        )
        rows.note_predictions(wave.index, cells.positions, choice.tokens, choice.logprobs, policy.mask_token_id)
        selected = self.commit.select(scores.masked_fill(~cells.candidates, -torch.inf), cells)
        if self.edit is not None:
            choice, scores, edited = self._edit(self.edit, policy, rows, cells, (logits, order), choice, scores)
            selected = selected | edited
        width = cells.positions.shape[1]
        # The flat places of the fixed cells: known in number with one quota, so no read from the device.
        if not isinstance(moment.quota, int):
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
        return verified

    def _edit(
        self,
        rule: EditRule,
        policy: MaskPredictor,
        rows: CanvasBatch,
        cells: Cells,
        predicted: tuple[Float[Tensor, "n M V"], Float[Tensor, "n M"] | None],
        choice: Choice,
        scores: Float[Tensor, "n M"],
    ) -> tuple[Choice, Float[Tensor, "n M"], Bool[Tensor, "n M"]]:
        """Choice and scores with the most probable token at the positions to replace, and which those are."""
        assert cells.index is not None
        best, sure = choice, scores
        if self.temperature > 0:
            logits, order = predicted
            best, sure = choose(logits, cells, policy.mask_token_id, 0.0, self.proposal, self.confidence, order)
        standing = rows.ids[cells.index[:, None], rows.prompt_length + cells.positions]
        differs = (best.tokens.view_as(standing) != standing) & ~cells.candidates
        edited = rule.select(best.logprobs.view_as(scores).exp(), differs)
        flat = edited.flatten()
        choice = Choice(
            torch.where(flat, best.tokens, choice.tokens), torch.where(flat, best.logprobs, choice.logprobs)
        )
        # A step with nothing masked uses up one of the block's checks; one that changes nothing, the rest.
        left, was_open = rows.checks[cells.index], cells.candidates.any(1)
        rows.checks[cells.index] = torch.where(was_open, left, (left - 1) * edited.any(1))
        return choice, torch.where(edited, sure, scores), edited

    def _remembered(self, rows: CanvasBatch, logits: Float[Tensor, "n M V"]) -> Memory:
        """The memory of this call, empty at first."""
        assert self.memory is not None
        if rows.memory is None:
            width = self.completion_length if self.memory.looks_ahead else self.block_length
            shapes = self.memory.shapes(logits.shape[-1])
            rows.memory = Memory(
                width, {name: logits.new_zeros(len(rows.ids), width, *shape) for name, shape in shapes.items()}
            )
        return rows.memory

    def _remask(
        self,
        rule: RemaskRule,
        mask_token_id: int,
        rows: CanvasBatch,
        wave: _Wave,
        moment: _Moment,
        verified: Float[Tensor, "n block"] | None,
        draws: Draws,
    ) -> None:
        """Hide again what the remask rule does not keep of the block."""
        places = wave.first[:, None] + torch.arange(self.block_length, device=wave.first.device)
        who = wave.index[:, None]
        fixed = rows.commit_step[who, places]
        cells = Cells(
            row_ids=rows.row_ids[wave.index],
            positions=places,
            candidates=fixed >= 0,
            completion_length=self.completion_length,
            step=moment.step,
            num_steps=self.steps_per_block,
            quota=None,
            draws=draws,
            block_length=self.block_length,
        )
        age = rows.steps_taken[who] - fixed
        chosen = rule.remask(Standing(cells, rows.confidence[who, places], age, verified))
        rows.remask(wave.index, places, chosen & cells.candidates, mask_token_id)

    def _predict(
        self, policy: MaskPredictor, rows: CanvasBatch, wave: _Wave, positions: Int[Tensor, "n M"], fresh: bool
    ) -> tuple[Float[Tensor, "n M V"], Float[Tensor, "n M"] | None, Float[Tensor, "n block"] | None]:
        """Logits at some positions, counted, the order head's scores, and the probabilities a remask rule asks for.

        The first forward of a block fills the cache where there is one.
        """
        attention = None if rows.attention is None else rows.attention[wave.index]
        canvas = Canvas(rows.ids[wave.index], attention, rows.prompt_length)
        canvas = self._attended(canvas, rows.commit_step[wave.index])
        keep, length = rows.prompt_length + positions, rows.ids.shape[1]
        if self.verifies:
            canvas = with_shadow(canvas, rows.prompt_length + wave.first, self.block_length, policy.mask_token_id)
            shadow = torch.arange(length, length + self.block_length, device=keep.device)
            keep = torch.cat([keep, shadow.expand(len(keep), -1)], 1)
        span, cache = (0, canvas.ids.shape[1]), wave.cache
        if cache is not None and not fresh:
            span, cache = wave.span, cache.at(*wave.span)
        rows.num_forwards += 1
        rows.num_tokens_forward += len(wave.index) * (span[1] - span[0]) * (2 if self.guidance else 1)
        logits, order = predict_with_order(policy, canvas, keep, self.guidance, View(span, cache))
        if not self.verifies:
            return logits, order, None
        width = positions.shape[1]
        order = None if order is None else order[:, :width]
        logits, hidden = logits.split([width, self.block_length], dim=1)
        tokens = rows.block_ids(wave.index, wave.first, self.block_length)
        return logits, order, (hidden.gather(2, tokens[..., None])[..., 0] - hidden.logsumexp(-1)).exp()
