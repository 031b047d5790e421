"""All rows of one sampling call on the device: their canvases, and what is recorded while they fill."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from d1lit.sampling.parts import Memory
from d1lit.types import GIVEN, UNREACHED, PromptBatch, Rollout


@dataclass
class CanvasBatch:
    """The steps of the sampler write into these tensors by row index; nothing here leaves the device before the end."""

    prompts: PromptBatch
    group_size: int
    ids: Int[Tensor, "N L"]
    attention: Bool[Tensor, "N L"] | None
    """None where no prompt is padded."""
    row_ids: Int[Tensor, " N"]
    commit_step: Int[Tensor, "N C"]
    sampled_logprobs: Float[Tensor, "N C"]
    confidence: Float[Tensor, "N C"]
    entropy: Float[Tensor, "N C"]
    steps_taken: Int[Tensor, " N"]
    """Denoising steps of each row so far: the index its next step carries in the record."""
    checks: Int[Tensor, " N"]
    """Steps that each row may still take with nothing masked in its block, where tokens are edited."""
    trace: Int[Tensor, "S N C"] | None
    has_given: bool = False
    """Whether tokens may stand on the canvas from the beginning: then rows differ in how much of a block is masked."""
    memory: Memory | None = None
    """What the sampler's memory keeps from step to step."""
    predictions: Int[Tensor, "S N C"] | None = None
    """What each step proposes for all masks; -1 elsewhere."""
    prediction_logprobs: Float[Tensor, "S N C"] | None = None
    num_forwards: int = 0
    num_tokens_forward: int = 0

    @property
    def prompt_length(self) -> int:
        """P; the completion starts there."""
        return self.prompts.prompt_ids.shape[1]

    def block_ids(self, index: Int[Tensor, " n"], first: Int[Tensor, " n"], length: int) -> Int[Tensor, "n block"]:
        """Tokens of one block of each row, from its place `first` in the completion."""
        places = self.prompt_length + first[:, None] + torch.arange(length, device=first.device)
        return self.ids[index].gather(1, places)

    def close_step(self, index: Int[Tensor, " n"]) -> None:
        """Note the canvas after a step and count it."""
        if self.trace is not None:
            self.trace[self.steps_taken[index], index] = self.ids[index, self.prompt_length :]
        self.steps_taken[index] += 1

    def note_predictions(
        self,
        index: Int[Tensor, " n"],
        positions: Int[Tensor, "n M"],
        tokens: Int[Tensor, " c"],
        logprobs: Float[Tensor, " c"],
        mask_token_id: int,
    ) -> None:
        """Keep what the step proposes for some positions, where they are masked; nothing if that is not wanted."""
        if self.predictions is None or self.prediction_logprobs is None:
            return
        is_masked = self.ids[index[:, None], self.prompt_length + positions] == mask_token_id
        place = (self.steps_taken[index][:, None], index[:, None], positions)
        self.predictions[place] = torch.where(is_masked, tokens.view_as(positions), -1).to(self.predictions.dtype)
        self.prediction_logprobs[place] = torch.where(is_masked, logprobs.view_as(positions), 0.0).float()

    def remask(
        self,
        index: Int[Tensor, " n"],
        places: Int[Tensor, "n M"],
        chosen: Bool[Tensor, "n M"],
        mask_token_id: int,
    ) -> None:
        """Hide tokens again, and forget what was noted when they were fixed."""
        who, column = chosen.nonzero(as_tuple=True)
        rows, where = index[who], places[who, column]
        self.ids[rows, self.prompt_length + where] = mask_token_id
        self.commit_step[rows, where] = UNREACHED
        for record in (self.sampled_logprobs, self.confidence, self.entropy):
            record[rows, where] = 0

    def end_at_eos(self, index: Int[Tensor, " n"], done: Int[Tensor, " n"], eos: int) -> list[bool]:
        """Which rows hold EOS; what they never reached is filled with it. The one read from the device in a block.

        Args:
            index: the rows.
            done: how many places of each completion are finished; an EOS given beyond them ends nothing yet.
            eos: the token.
        """
        completion = self.ids[index, self.prompt_length :]
        finished = torch.arange(completion.shape[1], device=done.device) < done[:, None]
        ended = ((completion == eos) & finished).any(1)
        unreached = ended[:, None] & (self.commit_step[index] == UNREACHED)
        self.ids[index, self.prompt_length :] = torch.where(unreached, eos, completion)
        return ended.tolist()

    def rollout(self, eos: int) -> Rollout:
        """The record, in tensors that autograd may use; inference tensors, which these are, may not be."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}
        completion_ids = kept["ids"][:, self.prompt_length :].contiguous()
        ends = (completion_ids == eos).to(torch.int64)
        predictions, logprobs = kept.get("predictions"), kept.get("prediction_logprobs")
        taken = int(kept["steps_taken"].max()) if predictions is not None else 0
        return Rollout(
            prompt_ids=kept["ids"][:, : self.prompt_length].contiguous(),
            prompt_mask=self.prompts.prompt_mask.repeat_interleave(self.group_size, 0),
            completion_ids=completion_ids,
            completion_mask=ends.cumsum(1) - ends == 0,
            row_ids=kept["row_ids"],
            group_size=self.group_size,
            commit_step=kept["commit_step"],
            sampled_logprobs=kept["sampled_logprobs"],
            confidence=kept["confidence"],
            entropy=kept["entropy"],
            trace=_settled(kept["trace"], kept["steps_taken"], completion_ids) if "trace" in kept else None,
            examples=tuple(example for example in self.prompts.examples for _ in range(self.group_size)),
            num_forwards=self.num_forwards,
            num_tokens_forward=self.num_tokens_forward,
            predictions=None if predictions is None else predictions[:taken].clone(),
            prediction_logprobs=None if logprobs is None else logprobs[:taken].clone(),
        )


def lay_out(
    prompts: PromptBatch,
    group_size: int,
    completion_length: int,
    mask_token_id: int,
    trace_steps: int,
    given: Int[Tensor, "N C"] | None = None,
    records_predictions: bool = False,
) -> CanvasBatch:
    """Every row with its prompt and a masked completion, or one on which tokens stand already.

    Args:
        prompts: the prompts; each is repeated for its group.
        group_size: rows of one prompt, adjacent.
        completion_length: masks after the prompt.
        mask_token_id: what stands there.
        trace_steps: steps that the trace holds; 0 for no trace.
        given: the completions to begin with, masks where the sampler is to write; None: masks all over.
        records_predictions: whether the predictions of as many steps are kept too.
    """
    prompt_ids = prompts.prompt_ids.repeat_interleave(group_size, 0)
    shape, device = (len(prompt_ids), completion_length), prompt_ids.device
    attention = None
    if not bool(prompts.prompt_mask.all()):
        seen = torch.ones(shape, dtype=torch.bool, device=device)
        attention = torch.cat([prompts.prompt_mask.repeat_interleave(group_size, 0), seen], 1)
    canvas = torch.full(shape, mask_token_id, dtype=prompt_ids.dtype, device=device) if given is None else given
    place = torch.arange(group_size, device=device)
    return CanvasBatch(
        prompts=prompts,
        group_size=group_size,
        ids=torch.cat([prompt_ids, canvas], 1),
        attention=attention,
        row_ids=(prompts.row_ids[:, None] * group_size + place).flatten(),
        commit_step=torch.where(canvas == mask_token_id, UNREACHED, GIVEN),
        sampled_logprobs=torch.zeros(shape, device=device),
        confidence=torch.zeros(shape, device=device),
        entropy=torch.zeros(shape, device=device),
        steps_taken=torch.zeros(len(prompt_ids), dtype=torch.int64, device=device),
        checks=torch.zeros(len(prompt_ids), dtype=torch.int64, device=device),
        trace=canvas.expand(trace_steps, *shape).clone() if trace_steps else None,
        has_given=given is not None,
        predictions=prompt_ids.new_full((trace_steps, *shape), -1) if records_predictions else None,
        prediction_logprobs=torch.zeros(trace_steps, *shape, device=device) if records_predictions else None,
    )


def _settled(
    trace: Int[Tensor, "S N C"], steps_taken: Int[Tensor, " N"], final: Int[Tensor, "N C"]
) -> Int[Tensor, "s N C"]:
    """The trace up to the longest row; shorter rows stay at their final canvas."""
    trace = trace[: int(steps_taken.max())].clone()
    after = torch.arange(len(trace), device=trace.device)[:, None] >= steps_taken
    return torch.where(after[..., None], final, trace)
