"""The block sampler: blocks of the completion are unmasked from left to right, each over several denoising steps."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from d1lit.sampling.commit import CumulativeEntropyBounded, EntropyBounded
from d1lit.sampling.confidence import NegativeEntropy
from d1lit.sampling.parts import Cells, CommitRule, Confidence, Proposal
from d1lit.sampling.prediction import Canvas, choose, entropies, evaluation_mode, predict
from d1lit.types import Draws, MaskPredictor, PromptBatch, Rollout


@dataclass
class _Rows:
    """All rows of a call, on the device: the canvas and what is recorded of it. Steps write into it by row index."""

    ids: Int[Tensor, "N L"]
    attention: Bool[Tensor, "N L"] | None
    row_ids: Int[Tensor, " N"]
    prompt_length: int
    commit_step: Tensor
    sampled_logprobs: Tensor
    confidence: Tensor
    entropy: Tensor
    steps_taken: Int[Tensor, " N"]
    """Denoising steps of each row so far: the index its next step carries in the record."""
    trace: Tensor | None
    num_forwards: int = 0
    num_tokens_forward: int = 0


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
        with evaluation_mode(policy), torch.inference_mode():
            rows = self._lay_out(policy, prompts, group_size)
            self._fill(policy, rows, draws)
        return self._record(rows, policy.eos_token_id, prompts, group_size)

    # ------------------------------------------------------------------------------------------------- rows and blocks

    def _lay_out(self, policy: MaskPredictor, prompts: PromptBatch, group_size: int) -> _Rows:
        """Every row with its prompt and a masked completion."""
        prompt_ids = prompts.prompt_ids.repeat_interleave(group_size, 0)
        count, prompt_length = prompt_ids.shape
        shape, device = (count, self.completion_length), prompt_ids.device
        attention = None
        if not bool(prompts.prompt_mask.all()):
            seen = torch.ones(shape, dtype=torch.bool, device=device)
            attention = torch.cat([prompts.prompt_mask.repeat_interleave(group_size, 0), seen], 1)
        place = torch.arange(group_size, device=device)
        canvas = torch.full(shape, policy.mask_token_id, dtype=prompt_ids.dtype, device=device)
        most_steps = self.num_blocks * max(self.steps_per_block, self.block_length)
        return _Rows(
            ids=torch.cat([prompt_ids, canvas], 1),
            attention=attention,
            row_ids=(prompts.row_ids[:, None] * group_size + place).flatten(),
            prompt_length=prompt_length,
            commit_step=torch.full(shape, -1, dtype=torch.int64, device=device),
            sampled_logprobs=torch.zeros(shape, device=device),
            confidence=torch.zeros(shape, device=device),
            entropy=torch.zeros(shape, device=device),
            steps_taken=torch.zeros(count, dtype=torch.int64, device=device),
            trace=canvas.expand(most_steps, *shape).clone() if self.record_trace else None,
        )

    def _fill(self, policy: MaskPredictor, rows: _Rows, draws: Draws) -> None:
        """Block after block for the rows on board; a finished row makes room for one that waits."""
        waiting = list(range(len(rows.row_ids)))[::-1]
        room = self.rows_per_forward or 2 * len(waiting)
        room = room // 2 if self.guidance else room
        aboard: dict[int, int] = {}  # row -> its next block
        while waiting or aboard:
            while waiting and len(aboard) < room:
                aboard[waiting.pop()] = 0
            self._fill_block(policy, rows, aboard, draws)
            aboard = {row: block + 1 for row, block in aboard.items() if block + 1 < self.num_blocks}
            if self.stop_at_eos and aboard:
                aboard = self._without_ended(rows, aboard, policy.eos_token_id)

    def _without_ended(self, rows: _Rows, aboard: dict[int, int], eos: int) -> dict[int, int]:
        """The rows whose finished blocks hold no EOS; the others are filled up with it. One read from the device."""
        index = torch.tensor(list(aboard), device=rows.ids.device)
        completion = rows.ids[index, rows.prompt_length :]
        ended = (completion == eos).any(1)
        unreached = ended[:, None] & (rows.commit_step[index] < 0)
        rows.ids[index, rows.prompt_length :] = torch.where(unreached, eos, completion)
        return {row: aboard[row] for row, end in zip(aboard, ended.tolist(), strict=True) if not end}

    def _fill_block(self, policy: MaskPredictor, rows: _Rows, aboard: dict[int, int], draws: Draws) -> None:
        """All denoising steps of one block of each row; the rows may stand at different blocks."""
        device = rows.ids.device
        index = torch.tensor(list(aboard), device=device)
        first = torch.tensor(list(aboard.values()), device=device) * self.block_length
        quotas = self.commit.quotas(self.block_length, self.steps_per_block)
        if quotas is not None:
            left = self.block_length
            for step, quota in enumerate(quotas):
                # A step that fixes nothing changes nothing: it keeps its number and needs no forward.
                if quota:
                    self._step(policy, rows, index, first, left, step, quota, draws)
                _close_step(rows, index)
                left -= quota
            return
        step = 0
        while True:
            masked = self._block_ids(rows, index, first) == policy.mask_token_id
            counts = masked.sum(1).tolist()
            if not any(counts):
                return
            if not all(counts):
                alive = torch.tensor([place for place, count in enumerate(counts) if count], device=device)
                index, first = index[alive], first[alive]
            self._step(policy, rows, index, first, max(counts), step, None, draws)
            _close_step(rows, index)
            step += 1

    def _block_ids(self, rows: _Rows, index: Int[Tensor, " n"], first: Int[Tensor, " n"]) -> Int[Tensor, "n block"]:
        """Tokens of the active block of each row."""
        places = rows.prompt_length + first[:, None] + torch.arange(self.block_length, device=first.device)
        return rows.ids[index].gather(1, places)

    # ------------------------------------------------------------------------------------------------------- one step

    def _step(
        self,
        policy: MaskPredictor,
        rows: _Rows,
        index: Int[Tensor, " n"],
        first: Int[Tensor, " n"],
        width: int,
        step: int,
        quota: int | None,
        draws: Draws,
    ) -> None:
        """One forward: predictions at the `width` leftmost masked positions of the block, some of them fixed."""
        masked = self._block_ids(rows, index, first) == policy.mask_token_id
        inside = masked.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
        cells = Cells(
            row_ids=rows.row_ids[index],
            positions=first[:, None] + inside,
            candidates=masked.gather(1, inside),
            completion_length=self.completion_length,
            step=step,
            num_steps=self.steps_per_block,
            quota=quota,
            draws=draws,
        )
        attention = None if rows.attention is None else rows.attention[index]
        canvas = Canvas(rows.ids[index], attention, rows.prompt_length)
        logits = predict(policy, canvas, rows.prompt_length + cells.positions, self.guidance)
        rows.num_forwards += 1
        rows.num_tokens_forward += canvas.ids.numel() * (2 if self.guidance else 1)
        choice, scores = choose(logits, cells, policy.mask_token_id, self.temperature, self.proposal, self.confidence)
        scores = scores.masked_fill(~cells.candidates, -torch.inf)
        selected = self.commit.select(scores, cells)
        # The flat places of the fixed cells: known in number with a quota, so no read from the device.
        if quota is None:
            places = selected.flatten().nonzero()[:, 0]
        else:
            columns = selected.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :quota]
            places = (torch.arange(len(index), device=columns.device)[:, None] * width + columns).flatten()
        who, where = index[places // width], cells.positions.flatten()[places]
        rows.ids[who, rows.prompt_length + where] = choice.tokens[places].to(rows.ids.dtype)
        rows.commit_step[who, where] = rows.steps_taken[who]
        rows.sampled_logprobs[who, where] = choice.logprobs[places].float()
        rows.confidence[who, where] = scores.flatten()[places].float()
        rows.entropy[who, where] = entropies(logits.flatten(0, 1), places).float()

    # --------------------------------------------------------------------------------------------------------- record

    def _record(self, rows: _Rows, eos: int, prompts: PromptBatch, group_size: int) -> Rollout:
        """The rollout, in tensors that autograd may use (inference tensors may not be)."""
        kept = {f.name: getattr(rows, f.name) for f in fields(rows)}
        kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in kept.items()}
        completion_ids = kept["ids"][:, rows.prompt_length :].contiguous()
        ends = (completion_ids == eos).to(torch.int64)
        return Rollout(
            prompt_ids=kept["ids"][:, : rows.prompt_length].contiguous(),
            prompt_mask=prompts.prompt_mask.repeat_interleave(group_size, 0),
            completion_ids=completion_ids,
            completion_mask=ends.cumsum(1) - ends == 0,
            row_ids=kept["row_ids"],
            group_size=group_size,
            commit_step=kept["commit_step"],
            sampled_logprobs=kept["sampled_logprobs"],
            confidence=kept["confidence"],
            entropy=kept["entropy"],
            trace=None if rows.trace is None else _settled(kept["trace"], kept["steps_taken"], completion_ids),
            examples=tuple(example for example in prompts.examples for _ in range(group_size)),
            num_forwards=rows.num_forwards,
            num_tokens_forward=rows.num_tokens_forward,
        )


def _close_step(rows: _Rows, index: Int[Tensor, " n"]) -> None:
    """Note the canvas after the step and count it."""
    if rows.trace is not None:
        rows.trace[rows.steps_taken[index], index] = rows.ids[index, rows.prompt_length :]
    rows.steps_taken[index] += 1


def _settled(
    trace: Int[Tensor, "S N C"], steps_taken: Int[Tensor, " N"], final: Int[Tensor, "N C"]
) -> Int[Tensor, "s N C"]:
    """The trace up to the longest row; shorter rows stay at their final canvas."""
    trace = trace[: int(steps_taken.max())].clone()
    for step in range(len(trace)):
        done = step >= steps_taken
        trace[step] = torch.where(done[:, None], final, trace[step])
    return trace
