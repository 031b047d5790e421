"""Which rows, draws and masks each process sees; who it is; what becomes of an experience in another world."""

from functools import partial
from itertools import chain

import pytest
import torch

from d1lit.data import BatchPlan, CompletionRows, EncodedRow, PromptCycles, canvas_layout
from d1lit.draws import CounterDraws
from d1lit.estimators.one_step import OneStepEstimator
from d1lit.masking import BernoulliMask, UniformTimes
from d1lit.modules.experience import Experience, dealt
from d1lit.processes import ALONE, Place, first_host, place, slurm_job
from d1lit.schedules import LinearSchedule
from d1lit.strategies import FullySharded, Setting, auto, ddp, fsdp, single
from d1lit.types import Context, LogProbs, Rollout

PAD = EOS = 31
CPU = torch.device("cpu")


def rows(count: int = 24) -> list[EncodedRow]:
    """Prompts of different lengths, with completions."""
    return [EncodedRow(list(range(1, 3 + n % 5)), {"id": n}, list(range(5, 6 + n % 3))) for n in range(count)]


def worlds(world_size: int) -> list[BatchPlan]:
    return [BatchPlan(8, 1, world_size, rank) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_demonstrations_times_and_masks_are_those_of_one_process(world_size):
    def drawn(plans):
        found = {}
        for plan in plans:
            data = CompletionRows(rows(), plan, 3, partial(canvas_layout, completion_length=6), EOS, PAD, seed=3)
            for batch in (data[n] for n in range(len(data))):
                draws = CounterDraws(7).at(step=batch.update)
                t = UniformTimes(low=1e-3)(draws, batch.row_ids, batch.row_ids, batch.num_rows)
                masks = BernoulliMask()(draws, batch.row_ids, LinearSchedule().mask_prob(t), batch.is_target)
                for n, row in enumerate(batch.row_ids.tolist()):
                    found[batch.update, row] = [x[n].tolist() for x in (batch.ids, t, masks)]
                assert (batch.num_rows, batch.num_targets) == (8, 48)
        return found

    one = drawn(worlds(1))
    assert len(one) == 24
    assert drawn(worlds(world_size)) == one


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_prompts_and_their_masks_are_those_of_one_process(world_size):
    def drawn(plans):
        found = {}
        for plan in plans:
            data = PromptCycles(rows(), plan, 2, 6, PAD, seed=3)
            for batch in (data[n] for n in range(len(data))):
                if batch.prompts is None:
                    continue
                prompts, context = batch.prompts, _context(batch.prompts, batch.step)
                noised = OneStepEstimator(0.4, 1, share_within_group=False).corrupt(context).noised_ids
                for n, row in enumerate(prompts.row_ids.tolist()):
                    views = noised[2 * n : 2 * n + 2].tolist()
                    found[batch.step, row] = (prompts.prompt_ids[n].tolist(), prompts.examples[n]["id"], views)
        return found

    one = drawn(worlds(1))
    assert len(one) == 24
    assert drawn(worlds(world_size)) == one


def _context(prompts, step: int, group: int = 2) -> Context:
    rollout = _rollout(prompts.prompt_ids, prompts.prompt_mask, prompts.row_ids, group)
    return Context(rollout, torch.zeros(len(rollout.row_ids)), 0, 2, 30, CounterDraws(5).at(step=step))


def _rollout(prompt_ids, prompt_mask, row_ids, group: int) -> Rollout:
    count = len(row_ids) * group
    tokens, numbers = torch.full((count, 4), 9), torch.rand(count, 4)
    ids = (row_ids[:, None] * group + torch.arange(group)).flatten()
    repeated = [x.repeat_interleave(group, 0) for x in (prompt_ids, prompt_mask)]
    return Rollout(*repeated, tokens + ids[:, None], tokens > 0, ids, group, tokens, numbers, numbers, numbers,
                   trace=torch.rand(3, count, 4).mul(9).long(), completions=tuple(map(str, ids.tolist())),
                   examples=tuple({"id": n} for n in ids.tolist()))  # fmt: skip


def _experience(num_rows: int = 16) -> Experience:
    prompts = torch.arange(num_rows // 2)
    rollout = _rollout(prompts[:, None].expand(-1, 3), torch.ones(num_rows // 2, 3).bool(), prompts, 2)
    numbers = torch.arange(float(num_rows))
    logprobs = LogProbs(torch.rand(num_rows, 4), torch.rand(num_rows, 4), {"bound": torch.rand(num_rows)})
    return Experience(rollout, numbers, numbers + 1, (None, logprobs), (logprobs, logprobs), (9.0, 9.0), 16.0, step=3)


@pytest.mark.parametrize(("world_size", "num_micro"), [(1, 4), (2, 1), (4, 2), (8, 1)])
def test_experience_is_dealt_again_row_by_row(world_size, num_micro):
    whole = _experience()
    ((there,),) = dealt([[whole]], 1, 1)
    assert there is whole
    hands = dealt([[whole]], world_size, num_micro)
    assert [len(hand) for hand in hands] == [num_micro] * world_size
    (again,) = chain.from_iterable(dealt(hands, 1, 1))
    for name in ("advantages", "rewards"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    for name, value in vars(whole.rollout).items():
        same = torch.equal(vars(again.rollout)[name], value) if isinstance(value, torch.Tensor) else True
        assert same, name
    assert again.rollout.completions == whole.rollout.completions
    assert again.rollout.examples == whole.rollout.examples
    assert again.old[0] is None
    assert torch.equal(again.ref[1].parts["bound"], whole.ref[1].parts["bound"])
    assert hands[-1][-1].rollout.row_ids[-1] == 15
    assert hands[0][0].num_rollouts == 16.0, "counts of the whole update stay"


def test_experience_that_does_not_fit_together_names_the_way_out():
    one, other = _experience(), _experience()
    other = Experience(**{**vars(other), "advantages": torch.rand(16, 2)})
    with pytest.raises(ValueError, match=r"trainer.devices: .* Try: trainer.devices=2"):
        dealt([[one], [other]], 1, 1)


# --------------------------------------------------------------------------------------------------------- strategies


def test_auto_shards_only_a_large_model_that_trains_whole():
    assert auto(Setting(1, CPU, True)) == "auto"
    assert type(auto(Setting(2, CPU, False))).__name__ == "DDPStrategy"
    assert isinstance(auto(Setting(2, CPU, True)), FullySharded)
    assert ddp(Setting(1, CPU, True)) == fsdp(Setting(1, CPU, True), offload=False) == "auto"


def test_one_process_may_keep_its_weights_in_host_memory():
    strategy = fsdp(Setting(1, CPU, True), offload=True)
    assert isinstance(strategy, FullySharded)
    assert strategy.offload


def test_single_refuses_several():
    with pytest.raises(ValueError, match="Try: strategy=ddp"):
        single(Setting(2, CPU, False))


# ---------------------------------------------------------------------------------------------------- places


def test_place_from_each_scheduler():
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    srun = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"}
    assert place(torchrun) == place(srun) == Place(5, 8, 1, 4)
    assert place(srun).num_nodes == 2
    assert place({}) == ALONE
    assert place({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == ALONE, "sbatch has started one process only"
    with pytest.raises(ValueError, match="Try: srun --ntasks-per-node"):
        place({**srun, "SLURM_STEP_NUM_NODES": "3"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],x1", "gpu07"),
        ("a[1,3]-ib", "a1-ib"),
        ("n-[3]", "n-3"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_a_requeued_job_keeps_its_name():
    assert slurm_job({}) is None
    assert slurm_job({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}) == "12.0"
    assert slurm_job({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"
