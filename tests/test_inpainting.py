"""IGPO: groups that are all wrong are drawn again around pieces of a worked answer; what was given stays told apart."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from d1lit.app import build
from d1lit.app.build import plan_run
from d1lit.app.composing import compose_jobs
from d1lit.app.plan import make_stage
from d1lit.data import prompt_batch
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.estimators.step_merge import TraceEstimator
from d1lit.losses import ClippedPolicyLoss
from d1lit.losses.filters import GivenEntropyFilter
from d1lit.losses.terms import k3, token_mean
from d1lit.models.cache import KVCache
from d1lit.modules import DiffuGRPO
from d1lit.modules.experience import as_tree, restored
from d1lit.modules.inpainting import Inpainting, replaced
from d1lit.processes import join_world, launch
from d1lit.rewards.parts import RewardParts
from d1lit.sampling import CommitAll, DualCache, EvenSchedule, LowestConfidence, Threshold, replayed_logprobs
from d1lit.sampling.commit import even_quotas
from d1lit.types import GIVEN, UNREACHED, Example, LogProbs, LossInputs, PromptBatch, Rollout, Verdict
from tests.end_to_end.small import (
    COMPLETION,
    EOS,
    MASK,
    EvenTokens,
    make_module,
    prompt_rows,
    quiet,
    sampler,
    small_policy,
)

G = 3
RULE = Inpainting(least_share=0.5, most_share=1.0, least_chunk=3, most_chunk=4, max_replaced=1)
CLIPPED = ClippedPolicyLoss(0.2, 0.28, 0.0, k3, token_mean)
EASY = ("0", "3")
"""Prompts of which every rollout is right."""
UNWORKED = "2"
"""The prompt without a worked answer."""


def worked(example: Example) -> list[int]:
    """Two numbers of the row's own, again and again, so that a chunk of three holds both in order."""
    n = int(example["id"])
    return [] if example["id"] == UNWORKED else [2 * n, 2 * n + 1] * 4


class Pairs:
    """Right where the row's two numbers stand next to each other; a random policy hardly ever writes so."""

    def __init__(self, late: Sequence[str] = ()) -> None:
        self.late = late

    def __call__(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        pairs = ["{} {}".format(2 * int(e["id"]), 2 * int(e["id"]) + 1) for e in examples]
        return [
            Verdict(0.0, "timeout") if e["id"] in self.late
            else Verdict(float(e["id"] in EASY or f" {pair} " in f" {text} "))
            for text, e, pair in zip(completions, examples, pairs, strict=True)
        ]  # fmt: skip


@pytest.fixture(scope="module")
def trainer() -> L.Trainer:
    quiet()
    return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def module_with(trainer: Any, **changes: Any) -> DiffuGRPO:
    settings: dict[str, Any] = {
        "inpainting": RULE, "worked": worked, "counted": Pairs(), "group_size": G,
        "reward": RewardParts({"pairs": Pairs(), "even": EvenTokens()}, {"pairs": 1.0, "even": 0.1}),
        "loss": GivenEntropyFilter(CLIPPED, 0.2),
    }  # fmt: skip
    module = make_module(small_policy(), **settings | changes)
    module.trainer = trainer
    return module


def four_prompts() -> PromptBatch:
    return prompt_batch(prompt_rows(4), range(4), EOS)


# ------------------------------------------------------------------------------------------------------------ the chunks


def test_chunks_longhand() -> None:
    rule = Inpainting(0.1, 0.5, 4, 8, 1)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 3, 4, 11, 19, 40, 40])
    share, sizes, keys = (
        torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((7,), (7, 40), (7, 40))
    )
    given = rule.given(lengths, share, sizes, keys)
    for row, length in enumerate(lengths.tolist()):
        chunks, start, number = [], 0, 0
        while start < length:
            size = min(4 + int(5 * float(sizes[row, number])), length - start)
            if size >= 4:
                chunks.append((float(keys[row, number]), range(start, start + size)))
            start, number = start + size, number + 1
        count = math.ceil((0.1 + float(share[row]) * 0.4) * len(chunks))
        expected = {place for _, places in sorted(chunks, key=lambda chunk: chunk[0])[:count] for place in places}
        assert set(given[row].nonzero()[:, 0].tolist()) == expected
        assert bool(expected) == (length >= 4)


def test_a_canvas_holds_pieces_of_its_own_answer_wherever_its_prompt_stands() -> None:
    rule, draws = Inpainting(0.1, 0.5, 2, 3, 1), CounterDraws(1).at(step=4)
    prompts, answers = four_prompts(), [list(range(8)), list(range(10, 15)), list(range(5, 20)), [21, 21]]
    canvas = rule.canvas(prompts, answers, G, COMPLETION, MASK, draws)
    for n, row in enumerate(canvas.tolist()):
        kept = {place: token for place, token in enumerate(row) if token != MASK}
        assert kept and all(answers[n // G][place] == token for place, token in kept.items())
    assert len({tuple(row) for row in canvas.tolist()}) > 6
    alone = rule.canvas(prompts.rows(2, 3), answers[2:3], G, COMPLETION, MASK, draws)
    assert torch.equal(alone, canvas[2 * G : 3 * G])


# ----------------------------------------------------------------------------------------------------------- the sampler


def canvas_of(*rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows)


SCATTERED = canvas_of(
    [MASK, 4, 5, MASK, MASK, MASK, 6, MASK], [7, 8, 9, 10, MASK, MASK, MASK, MASK],
    [MASK] * 8, [1, MASK, MASK, MASK, 2, 3, 4, 5],
)  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"commit": Threshold(0.6)}, {"cache": DualCache(KVCache)}, {"num_steps": 8}])
def test_given_tokens_stay_and_the_record_is_of_the_others(changes: dict[str, Any]) -> None:
    made, policy, prompts = sampler(stop_at_eos=False, **changes), small_policy(), four_prompts()
    draws = CounterDraws(3)
    rollout = made.complete(policy, prompts, 1, draws, SCATTERED)
    given = SCATTERED != MASK
    assert torch.equal(rollout.given, given)
    assert torch.equal(rollout.completion_ids[given], SCATTERED[given])
    assert not bool((rollout.completion_ids == MASK).any())
    for record in (rollout.sampled_logprobs, rollout.confidence, rollout.entropy):
        assert not bool(record[given].any()) and bool(record[~given].all())
    assert bool((rollout.commit_step[~given] >= 0).all())
    if "commit" not in changes:  # a block's masks are spread over its steps
        per_block = made.steps_per_block
        for n in range(4):
            for block in range(2):
                steps = rollout.commit_step[n, 4 * block : 4 * block + 4]
                found = [int((steps == block * per_block + step).sum()) for step in range(per_block)]
                assert tuple(found) == even_quotas(int((steps >= 0).sum()), per_block)
    if "cache" not in changes:
        exact = replayed_logprobs(policy, rollout, torch.arange(4), 1.0, 0.0)
        torch.testing.assert_close(exact, rollout.sampled_logprobs, atol=1e-5, rtol=1e-4)
        order = [2, 0, 3, 1]
        mixed = PromptBatch(*(getattr(prompts, k)[order] for k in ("prompt_ids", "prompt_mask", "row_ids")))
        moved = made.complete(policy, mixed, 1, draws, SCATTERED[order])
        assert torch.equal(moved.completion_ids, rollout.completion_ids[order])


def test_a_canvas_of_masks_is_a_rollout() -> None:
    policy, prompts, draws = small_policy(), four_prompts(), CounterDraws(3)
    blank = torch.full((8, COMPLETION), MASK)
    one, other = sampler()(policy, prompts, 2, draws), sampler().complete(policy, prompts, 2, draws, blank)
    for name in ("completion_ids", "commit_step", "sampled_logprobs", "confidence", "entropy", "completion_mask"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert not bool(one.given.any())


def test_an_end_that_is_given_ends_the_row_when_its_block_is_done() -> None:
    rows = canvas_of([MASK] * 4 + [MASK, EOS, 3, MASK], [MASK, EOS, MASK, MASK, MASK, MASK, 5, MASK])
    rollout = sampler().complete(small_policy(), four_prompts().rows(0, 2), 1, CounterDraws(0), rows)
    first = rollout.completion_ids[0].tolist()
    if EOS not in first[:4]:
        assert bool((rollout.commit_step[0, 4:5] >= 0).all()) and first[5:7] == [EOS, 3]
    assert rollout.completion_ids[1, 4:].tolist() == [EOS, EOS, 5, EOS]
    assert rollout.commit_step[1, 4:].tolist() == [UNREACHED, UNREACHED, GIVEN, UNREACHED]
    assert rollout.completion_mask[1].tolist().index(False) == first_end(rollout.completion_ids[1]) + 1


def first_end(ids: Tensor) -> int:
    return ids.tolist().index(EOS)


def test_what_a_canvas_cannot_be() -> None:
    policy, prompts, draws = small_policy(), four_prompts(), CounterDraws(0)
    with pytest.raises(ValueError, match=r"^sampler: a canvas of \(4, 8\) .*Try: "):
        sampler().complete(policy, prompts, 2, draws, SCATTERED)
    with pytest.raises(ValueError, match=r"^sampler\.remask: LowestConfidence .*Try: "):
        remasking = sampler(commit=CommitAll(), remask=LowestConfidence(EvenSchedule()))
        remasking.complete(policy, prompts, 1, draws, SCATTERED)


# ------------------------------------------------------------------------------------------------------------- the method


RECORDS = ("completion_ids", "commit_step", "sampled_logprobs", "confidence", "entropy", "completion_mask", "row_ids")


def test_only_groups_that_fail_are_helped_and_only_right_rollouts_replace(trainer: L.Trainer) -> None:
    prompts = four_prompts()
    (plain,) = module_with(trainer, inpainting=None).collect(prompts, 0, 1)
    module = module_with(trainer)
    (helped,) = module.collect(prompts, 0, 1)
    assert torch.equal(plain.rollout.row_ids, helped.rollout.row_ids)
    given = helped.rollout.given.any(1).view(4, G)
    assert given.sum(1).tolist() == [0, 1, 0, 0]  # "0" and "3" are right, "2" has no answer
    row = G + int(given[1].nonzero()[0, 0])
    others = torch.arange(4 * G) != row
    for name in RECORDS:  # untouched, bit for bit
        assert torch.equal(getattr(plain.rollout, name)[others], getattr(helped.rollout, name)[others]), name
    assert torch.equal(plain.rewards[others], helped.rewards[others])
    untouched = torch.arange(4 * G) // G != 1
    assert torch.equal(plain.advantages[untouched], helped.advantages[untouched])
    assert module.verdicts["pairs"][row].value == 1.0 and float(helped.rewards[row]) >= 1.0
    assert [v.value for v in module.verdicts["pairs"][G : 2 * G]].count(0.0) == G - 1
    assert "2 3" in helped.rollout.completions[row]
    numbers = module.metrics.finish()
    assert numbers["rollout/inpainted_fraction"] == 0.25
    assert numbers["rollout/replaced_fraction"] == pytest.approx(1 / 12)
    assert numbers["rollout/entropy"] > 0


def test_a_judge_that_failed_says_nothing(trainer: L.Trainer) -> None:
    (experience,) = module_with(trainer, counted=Pairs(late=["1"])).collect(four_prompts(), 0, 1)
    assert not bool(experience.rollout.given.any())


def test_wrong_rollouts_around_hints_replace_nothing(trainer: L.Trainer) -> None:
    class Never:
        def __call__(self, completions: Any, examples: Any) -> list[Verdict]:
            return [Verdict(0.0) for _ in completions]

    module = module_with(trainer, counted=Never())
    (experience,) = module.collect(four_prompts(), 0, 1)
    assert not bool(experience.rollout.given.any())
    assert module.metrics.finish()["rollout/inpainted_fraction"] == 0.75


def test_a_group_is_helped_alike_alone_and_again(trainer: L.Trainer) -> None:
    """Nothing hangs on the other groups, on the rank that holds it, or on what was collected before."""
    prompts, module = four_prompts(), module_with(trainer)
    (whole,) = module.collect(prompts, 5, 1)
    (again,) = module.collect(prompts, 5, 1)
    (half,) = module_with(trainer).collect(prompts.rows(0, 2), 5, 1)
    (later,) = module.collect(prompts, 6, 1)
    for name in ("completion_ids", "commit_step"):
        assert torch.equal(getattr(whole.rollout, name), getattr(again.rollout, name))
        assert torch.equal(getattr(whole.rollout, name)[: 2 * G], getattr(half.rollout, name))
    assert not torch.equal(whole.rollout.completion_ids, later.rollout.completion_ids)


def test_two_updates_and_a_checkpoint_between_them(trainer: L.Trainer) -> None:
    module = module_with(trainer)
    (experience,) = module.collect(four_prompts(), 0, 1)
    optimizer = torch.optim.SGD(module.policy.parameters(), lr=0.1)
    for inner in range(2):
        kept = restored(as_tree(experience), torch.device("cpu"))
        assert bool(kept.rollout.given.any()) and torch.equal(kept.rollout.given, experience.rollout.given)
        value = module.update(experience, inner, 1)
        assert torch.equal(value, module.update(kept, inner, 1))
        optimizer.zero_grad()
        value.backward()
        grads = [p.grad for p in module.policy.parameters() if p.grad is not None]
        assert all(bool(torch.isfinite(grad).all()) for grad in grads)
        assert max(float(grad.abs().max()) for grad in grads) > 0
        optimizer.step()


def test_rows_of_a_task_bring_their_worked_answers(trainer: L.Trainer) -> None:
    """The recipe on Sudoku with all of the answer given, so that a random network is right; two real updates."""
    rule = "stages.grpo.module.inpainting"
    words = [
        "recipe=igpo", "task=sudoku", "task.num_builtin.train=40", "task.val_rows=0", "scale.grpo.group_size=3",
        *(f"model.tiny.{size}" for size in ("width=16", "num_layers=1", "num_heads=2", "mlp_width=24")),
        *(f"{rule}.{value}" for value in ("least_share=1.0", "most_share=1.0", "least_chunk=1", "most_chunk=1")),
    ]  # fmt: skip
    plan = plan_run(compose_jobs("train", words).configs[0])
    policy, tokenizer = plan.make_policy()
    policy.keep_reference()
    (parts,) = plan.stages
    module = make_stage(plan, parts, tokenizer, lambda *_: trainer).make_module(policy)
    assert isinstance(module, DiffuGRPO)
    module.trainer = trainer
    rows = plan.rows_of(parts, tokenizer).rows[:2]
    (experience,) = module.collect(prompt_batch(rows, range(2), policy.pad_token_id), 0, 1)
    helped = experience.rollout.given.any(1).view(2, 3)
    assert helped.sum(1).tolist() == [1, 1]
    assert torch.equal(experience.rewards.view(2, 3).argmax(1), helped.int().argmax(1))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    for inner in range(2):
        value = module.update(experience, inner, 1)
        assert bool(torch.isfinite(value))
        optimizer.zero_grad()
        value.backward()
        assert max(float(p.grad.abs().max()) for p in policy.parameters() if p.grad is not None) > 0
        optimizer.step()


def test_estimators_that_replay_and_other_misfits_are_refused() -> None:
    one_step, parts = OneStepEstimator(0.0, 1, False), {"group_size": G, "num_inner_updates": 1, "inpainting": RULE}
    DiffuGRPO.check(one_step, CLIPPED, sampler(), **parts)
    with pytest.raises(
        ValueError, match=r"^estimator: TraceEstimator with module\.inpainting is refused.*Try: .*\[E207\]"
    ):
        DiffuGRPO.check(TraceEstimator(1, 1.0), CLIPPED, sampler(), **parts)
    with pytest.raises(ValueError, match=r"^module\.inpainting\.max_replaced: 3 of 3 .*Try: 2"):
        DiffuGRPO.check(one_step, CLIPPED, sampler(), **parts | {"inpainting": replace(RULE, max_replaced=3)})
    remasking = sampler(commit=CommitAll(), remask=LowestConfidence(EvenSchedule()))
    with pytest.raises(ValueError, match=r"^sampler\.remask: LowestConfidence .*Try: "):
        DiffuGRPO.check(one_step, CLIPPED, remasking, **parts)
    with pytest.raises(ValueError, match=r"^module\.inpainting: function .*Try: "):
        DiffuGRPO.check(one_step, CLIPPED, lambda *_: None, **parts)  # type: ignore[arg-type]
    for words, changes in {
        "least_share: 0.0 to 1.0": {"least_share": 0.0}, "least_chunk: 5 to 4": {"least_chunk": 5},
        "max_replaced: 0": {"max_replaced": 0},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"^stages\.grpo\.module\.inpainting\.{words}.*Try: "):
            replace(RULE, **changes)


def test_what_could_not_help_or_would_end_in_the_middle_is_refused_before() -> None:
    one_step, parts = OneStepEstimator(0.0, 1, False), {"group_size": G, "num_inner_updates": 1, "inpainting": RULE}
    with pytest.raises(ValueError, match=r"^sampler\.record_trace: traces .* module\.inpainting.*Try: false"):
        DiffuGRPO.check(one_step, CLIPPED, sampler(record_trace=True), **parts)
    with pytest.raises(ValueError, match=r"^sampler\.record_trace: traces .* module\.num_refills.*Try: false"):
        DiffuGRPO.check(one_step, CLIPPED, sampler(record_trace=True), G, 1, num_refills=1)
    long = replace(RULE, least_chunk=99, most_chunk=99)
    with pytest.raises(ValueError, match=r"^module\.inpainting\.least_chunk: 99 tokens are more than .*Try: 4"):
        DiffuGRPO.check(one_step, CLIPPED, sampler(), **parts | {"inpainting": long})
    wrong = [Verdict(0.0)] * G
    assert RULE.helped(wrong, [[1] * 20], G, length=RULE.least_chunk).all()
    assert not RULE.helped(wrong, [[1] * 20], G, length=RULE.least_chunk - 1).any()


def test_replacing_longhand() -> None:
    def numbered(start: int, rows: list[int]) -> Rollout:
        row = torch.tensor(rows)
        ids = (start + row)[:, None].expand(-1, 4)
        blank = ids.float()
        texts = tuple(str(start + n) for n in rows)
        return Rollout(
            ids, ids > -1, ids, ids > -1, row, 2, ids, blank, blank, blank, None, texts, ({},) * len(rows), 2, 10
        )

    merged, where = replaced(numbered(0, [4, 5, 6, 7, 8, 9]), numbered(100, [8, 9, 4, 5]), [1, 2])
    assert where == [5, 0]
    assert merged.row_ids.tolist() == [4, 5, 6, 7, 8, 9]
    assert merged.completion_ids[:, 0].tolist() == [104, 5, 6, 7, 8, 109]
    assert merged.completions == ("104", "5", "6", "7", "8", "109")
    assert (merged.num_forwards, merged.num_tokens_forward) == (4, 20)


# --------------------------------------------------------------------------------------------------------------- the loss


def test_of_given_tokens_the_least_certain_are_learnt_longhand() -> None:
    generator = torch.Generator().manual_seed(2)
    n, c, share = 4, 12, 0.3
    value = (-2 * torch.rand(n, c, generator=generator)).requires_grad_()
    old = LogProbs(value.detach() + 0.05 * torch.randn(n, c, generator=generator), torch.ones(n, c))
    mask = torch.arange(c) < torch.tensor([12, 9, 4, 12])[:, None]
    entropy, given = torch.rand(n, c, generator=generator), torch.rand(n, c, generator=generator) < 0.6
    given[3] = False
    weight = mask.float()
    inputs = LossInputs(
        LogProbs(value, weight), LogProbs(old.value, weight), None, torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.zeros(n),
        2, mask, entropy, float(weight.sum()), float(n), given,
    )  # fmt: skip
    loss, _ = GivenEntropyFilter(CLIPPED, share)(inputs)
    expected = torch.zeros(())
    for row in range(n):
        hinted = [k for k in range(c) if mask[row, k] and given[row, k]]
        hinted.sort(key=lambda k: -float(entropy[row, k]))
        left_out = hinted[max(1, int(share * len(hinted))) :]
        for k in range(c):
            if mask[row, k] and k not in left_out:
                ratio, advantage = torch.exp(value[row, k] - old.value[row, k]), inputs.advantages[row]
                expected = expected - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    torch.testing.assert_close(loss, expected / weight.sum())
    nothing = replace(inputs, given=None)
    assert float(GivenEntropyFilter(CLIPPED, share)(nothing)[0]) == float(CLIPPED(nothing)[0])
    with pytest.raises(ValueError, match=r"^loss\.share: .*Try: "):
        GivenEntropyFilter(CLIPPED, 0.0)


# ------------------------------------------------------------------------------------------------------ several processes


def collected(rank: int, world_size: int) -> dict[str, Tensor]:
    """What this rank's share of the prompts becomes; of two ranks only the second has a group to help."""
    order = [0, 3, 1, 2]
    prompts = four_prompts()
    prompts = PromptBatch(
        prompts.prompt_ids[order], prompts.prompt_mask[order], prompts.row_ids[order], tuple(prompts.examples[n] for n in order)
    )  # fmt: skip
    share = 4 // world_size
    strategy = SimpleNamespace(reduce=summed)
    stub = SimpleNamespace(world_size=world_size, global_rank=rank, strategy=strategy)
    module = module_with(None)
    module._trainer = stub
    (experience,) = module.collect(prompts.rows(rank * share, (rank + 1) * share), 0, 1)
    return {name: getattr(experience.rollout, name) for name in RECORDS} | {
        "advantages": experience.advantages, "rewards": experience.rewards, "units": torch.tensor(experience.num_units)
    }  # fmt: skip


def summed(value: Tensor, reduce_op: str) -> Tensor:
    dist.all_reduce(value)
    return value


@pytest.mark.slow
def test_two_processes_help_as_one_does(tmp_path: Path) -> None:
    root, here = Path(__file__).resolve().parents[1], Path.cwd()
    os.chdir(root)
    try:
        assert launch([sys.executable, "-m", "tests.test_inpainting", str(tmp_path)], 2) == 0
    finally:
        os.chdir(here)
    alone = collected(0, 1)
    assert bool((alone["commit_step"] == GIVEN).any())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in alone.items():
        together = first[name] if name == "units" else torch.cat([first[name], second[name]])
        if value.dtype == torch.int64:
            assert torch.equal(together, value), name
        else:
            torch.testing.assert_close(together, value, msg=name)


def test_training_rows_without_worked_answers_are_refused(tmp_path: Path) -> None:
    """Before any model is there; one row with pieces to give is enough."""
    file = tmp_path / "train.jsonl"
    bare = [{"nums": [1, 1, n], "target": n + 2} for n in range(2, 6)]
    worked = {"nums": [1, 1, 9], "target": 11, "solution_expression": "1+1+9", "worked_steps": "1+1=2\n2+9=11"}
    words = ["recipe=igpo", "task=countdown", f"task.train_data={file}", "task.val_rows=0", "task.num_builtin.test=4"]
    (config,) = compose_jobs("train", words).configs

    def plan(*rows: dict[str, Any]) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        build._task.cache_clear()  # a process reads a task's files once
        plan_run(config)

    none = r"^stages\.grpo\.module\.inpainting: no training row .*=countdown .* of 4 or more tokens.*Try: .*\[E207\]$"
    with pytest.raises(ConfigError, match=none):
        plan(*bare)
    plan(*bare, worked)


if __name__ == "__main__":
    me = join_world("cpu")
    torch.save(collected(me.rank, me.world_size), Path(sys.argv[1]) / f"{me.rank}.pt")
