"""Several processes do what one does: gradients, weights, rollouts, resume, evaluation; and how they are started."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from d1lit.app.consolidating import consolidate
from d1lit.checkpoint import newest, read_facts, read_tree
from d1lit.errors import ConfigError
from d1lit.models import load_network
from d1lit.processes import launch
from tests.end_to_end.distributed_worker import Record, main, read

ROOT = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "tests.end_to_end.distributed_worker")
TOLERANCE = 1e-5


def together(num_processes: int, folder: Path, *names: str) -> None:
    """Train cases in several processes."""
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        assert launch([*WORKER, str(folder), *names], num_processes) == 0
    finally:
        os.chdir(here)


def alone(folder: Path, *names: str) -> None:
    """Train cases in this process."""
    threads = torch.get_num_threads()
    main(folder, names)
    torch.set_num_threads(threads)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference (of norms) of any tensor."""
    assert one.keys() == other.keys()
    assert one
    shares = []
    for name, value in one.items():
        norm = value.double().norm()
        shares.append(float((value.double() - other[name].double()).norm() / norm) if norm > 0 else 0.0)
    return max(shares)


def check_same(one: Record, other: Record, what: str, tolerance: float = TOLERANCE) -> None:
    """Same rollouts row for row; gradients of every update and final weights within the tolerance."""
    gradients, weights = difference(one.gradients, other.gradients), difference(one.weights, other.weights)
    print(f"{what}: largest relative difference of gradients {gradients:.1e}, of weights {weights:.1e}")
    for name, value in one.rollouts.items():
        if value.dtype == torch.int64:
            assert torch.equal(value, other.rollouts[name]), f"{what}: {name}"
        else:
            torch.testing.assert_close(value, other.rollouts[name])
    assert gradients <= tolerance
    assert weights <= tolerance


# ---------------------------------------------------------------------------------------------------------------- quick


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """Two processes train one small stage of each kind; the last is stopped within a cycle of inner updates."""
    folder = tmp_path_factory.mktemp("two")
    names = (
        "sft-full-ddp-float32-3",
        "grpo-lora-ddp-float32-4",
        "sft-lora-fsdp-float32-3",
        "grpo-full-fsdp-float32-4@3",
    )
    together(2, folder, *names)
    return folder


@pytest.mark.parametrize("name", ["sft-full-ddp-float32-3", "grpo-lora-ddp-float32-4", "sft-lora-fsdp-float32-3"])
def test_two_processes_are_one(name, quick, tmp_path):
    single = name.replace("ddp", "single").replace("fsdp", "single")
    alone(tmp_path, single)
    check_same(read(tmp_path / single), read(quick / name), name)


def test_one_process_goes_on_where_two_sharded_ones_stopped(quick, tmp_path):
    """The experience of both is cut anew for one, and the end is that of a run nobody stopped."""
    name = "grpo-full-fsdp-float32-4"
    checkpoint, refused = newest(quick / name / "stage" / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step_3"
    assert not refused
    assert read_facts(checkpoint)["world_size"] == 2
    alone(quick, name)
    single = "grpo-full-single-float32-4"
    alone(tmp_path, single)
    gap = difference(read(tmp_path / single).weights, read(quick / name).weights)
    print(f"resumed alone: weights differ by {gap:.1e}")
    assert gap <= TOLERANCE
    resumed = read(quick / name).gradients
    assert {step.split(".")[0] for step in resumed} == {"003"}, "one update was left, and no other was repeated"


def test_launcher_gives_every_process_its_place_and_returns_the_first_failure(tmp_path):
    # The one that fails waits for the others' files: a busy machine may start them later than it.
    script = (
        "import os, sys, time\nfrom pathlib import Path\nrank, place = os.environ['RANK'], Path(sys.argv[1])\n"
        "(place / rank).write_text(os.environ['WORLD_SIZE'] + os.environ['LOCAL_RANK'])\n"
        "while rank != '1' or sum(bool(file.read_text()) for file in place.iterdir()) < 3: time.sleep(0.01)\n"
        "sys.exit(7)"
    )
    started = time.monotonic()
    assert launch([sys.executable, "-c", script, str(tmp_path)], 3) == 7
    assert time.monotonic() - started < 20, "the others were ended"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"0": "30", "1": "31", "2": "32"}


# ----------------------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_processes_that_end_right_after_they_spoke_end_well():
    """The threads of gloo still run then; nine times of ten they aborted one of the processes."""
    script = (
        "import torch\nfrom d1lit.processes import join_world\njoin_world('cpu')\n"
        "for _ in range(20): torch.distributed.all_reduce(torch.ones(10))"
    )
    assert [launch([sys.executable, "-c", script], 2) for _ in range(3)] == [0, 0, 0]


KINDS = [f"{stage}-{trains}" for stage in ("sft", "grpo") for trains in ("full", "lora")]


@pytest.fixture(scope="module")
def singles(tmp_path_factory) -> Path:
    """One process, twenty updates of every kind."""
    folder = tmp_path_factory.mktemp("one")
    alone(folder, *[f"{kind}-single-float64-20" for kind in KINDS])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("fsdp_offload", marks=pytest.mark.nightly)])
def test_twenty_updates_in_two_processes_are_those_of_one(strategy, singles, tmp_path):
    names = [f"{kind}-{strategy}-float64-20" for kind in KINDS]
    together(2, tmp_path, *names)
    for name in names:
        check_same(read(singles / name.replace(strategy, "single")), read(tmp_path / name), name, 1e-12)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        pytest.param(s, k, marks=pytest.mark.slow if (s, k) == ("fsdp", "grpo-lora") else pytest.mark.nightly)
        for s in ("ddp", "fsdp", "fsdp_offload")
        for k in KINDS
    ],
)
def test_twenty_updates_in_float32_too(strategy, kind, tmp_path):
    name, single = f"{kind}-{strategy}-float32-20", f"{kind}-single-float32-20"
    together(2, tmp_path, name)
    alone(tmp_path, single)
    check_same(read(tmp_path / single), read(tmp_path / name), name)


@pytest.mark.slow
def test_one_process_that_offloads_is_one_that_does_not(singles, tmp_path):
    names = ("sft-lora-fsdp_offload-float64-20", "grpo-full-fsdp_offload-float64-20")
    together(1, tmp_path, *names)
    for name in names:
        check_same(read(singles / name.replace("fsdp_offload", "single")), read(tmp_path / name), name, 1e-12)


@pytest.mark.slow
def test_an_order_is_learnt_in_two_processes_as_in_one(tmp_path):
    """The head beside an adapter in every process, and cut with all other weights; the reference keeps its own."""
    names = ("grpo-lora-ddp-float64-3-order", "grpo-lora-fsdp-float64-3-order", "grpo-full-fsdp-float64-3-order")
    together(2, tmp_path, *names)
    alone(tmp_path, "grpo-lora-single-float64-3-order", "grpo-full-single-float64-3-order")
    for name in names:
        single = name.replace("ddp", "single").replace("fsdp", "single")
        check_same(read(tmp_path / single), read(tmp_path / name), name, 1e-12)
        assert any("order_head" in key for key in read(tmp_path / name).weights)


@pytest.mark.slow
def test_steps_are_judged_and_chosen_in_two_processes_as_in_one(tmp_path):
    """Advantages and choice are those of one process, also for one that goes on where two stopped within a rollout."""
    names = ("grpo-lora-ddp-float64-4-steps", "grpo-full-fsdp-float64-4-steps")
    together(2, tmp_path, names[0], f"{names[1]}@3")
    alone(tmp_path, names[1], *(name.replace("ddp", "single").replace("fsdp", "single") for name in names))
    lora, full = (read(tmp_path / name.replace("ddp", "single").replace("fsdp", "single")) for name in names)
    check_same(lora, read(tmp_path / names[0]), names[0], 1e-12)
    assert {value.shape[1:] for key, value in lora.rollouts.items() if key.endswith("advantages")} == {(4,)}
    assert difference(full.weights, read(tmp_path / names[1]).weights) <= 1e-12


@pytest.mark.slow
def test_four_processes_are_one(singles, tmp_path):
    names = ("grpo-full-ddp-float64-20", "grpo-lora-fsdp-float64-20")
    together(4, tmp_path, *names)
    for name in names:
        single = name.replace("ddp", "single").replace("fsdp", "single")
        check_same(read(singles / single), read(tmp_path / name), f"four, {name}", 1e-12)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k == "grpo-lora" else pytest.mark.nightly) for k in KINDS]
)
def test_a_run_may_change_its_number_of_processes_at_every_resume(kind, singles, tmp_path):
    """Two sharded processes, then four with whole copies, then one, then two again."""
    for strategy, processes, stop in (("fsdp", 2, "@5"), ("ddp", 4, "@9"), ("single", 1, "@13"), ("fsdp", 2, "")):
        name = f"{kind}-{strategy}-float64-20"
        if processes == 1:
            alone(tmp_path, name + stop)
        else:
            together(processes, tmp_path, name + stop)
        for other in ("fsdp", "ddp", "single"):  # the run's folder goes from hand to hand
            if stop and not (target := tmp_path / f"{kind}-{other}-float64-20").exists():
                target.symlink_to(tmp_path / name)
    gap = difference(
        read(singles / f"{kind}-single-float64-20").weights, read(tmp_path / f"{kind}-fsdp-float64-20").weights
    )
    print(f"{kind} through four worlds: weights differ by {gap:.1e}")
    assert gap <= 1e-12


@pytest.mark.slow
def test_bfloat16_trains_in_shards_as_alone(tmp_path):
    """Float32 adapters beside bfloat16 weights in one group, and float32 copies of sharded weights through a checkpoint."""
    lora, full = "sft-lora-fsdp-bfloat16-3", "sft-full-fsdp-bfloat16-4"
    together(2, tmp_path, lora, f"{full}@2")
    alone(tmp_path, full)  # goes on alone from the two shards
    (tmp_path / "one").mkdir()
    alone(tmp_path / "one", lora.replace("fsdp", "single"), full.replace("fsdp", "single"))
    for name, dtype in ((lora, torch.float32), (full, torch.bfloat16)):
        found, single = read(tmp_path / name), read(tmp_path / "one" / name.replace("fsdp", "single"))
        assert {value.dtype for value in found.weights.values()} == {dtype}
        gap = difference(single.weights, found.weights)
        print(f"{name}: weights differ by {gap:.1e}")
        assert gap <= 2**-8, "one rounding of bfloat16"


@pytest.mark.slow
def test_sharded_processes_may_score_and_validate_for_different_times(tmp_path):
    """One has more views, or more and longer validation rows, than the other; the numbers are those of one process."""
    names = ("grpo-full-fsdp-float32-3-val", "sft-lora-fsdp-float32-3-val")
    together(2, tmp_path, "unequal", *names)
    one = tmp_path / "one"
    alone(one, "unequal", *(name.replace("fsdp", "single") for name in names))
    gradients = (load_file(folder / "unequal" / "grads.safetensors") for folder in (one, tmp_path))
    assert difference(*gradients) <= TOLERANCE
    for name in names:
        single = one / name.replace("fsdp", "single")
        check_same(read(single), read(tmp_path / name), name)
        looks, expected = (json.loads((folder / "looks.json").read_text()) for folder in (tmp_path / name, single))
        assert [look["step"] for look in looks] == [2, 3]
        assert looks == [pytest.approx(look, rel=1e-4) for look in expected]
        assert ("val/loss" in looks[0]) == name.startswith("sft")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("grpo-lora-ddp-float32-8-back", marks=pytest.mark.nightly), "grpo-full-fsdp-float32-8-back"]
)
def test_two_processes_roll_back_as_one_does(name, tmp_path):
    """Update 6 begins with weights and optimizer of step 3 on every process."""
    together(2, tmp_path, name)
    single = name.replace("ddp", "single").replace("fsdp", "single")
    alone(tmp_path / "one", single)
    check_same(read(tmp_path / "one" / single), read(tmp_path / name), name)
    tree, _ = read_tree(tmp_path / name / "stage" / "checkpoints" / "step_8")
    (rollbacks,) = (c["rollbacks"] for key, c in tree["callbacks"].items() if key.startswith("CollapseAlarms"))
    assert rollbacks == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_muon_goes_on_in_shards(dtype, tmp_path):
    """Stopped and taken up: its momentum and AdamW's are cut as their weights, and float32 copies too."""
    name = f"sft-full-fsdp-{dtype}-4-muon"
    together(2, tmp_path, f"{name}@2")
    together(2, tmp_path, name)
    together(2, tmp_path / "undisturbed", name)
    assert difference(read(tmp_path / "undisturbed" / name).weights, read(tmp_path / name).weights) == 0.0


RUN = (
    *("task=sudoku", "debug=fast", "trainer.accelerator=cpu", "scale.evaluation.batch_size=64", "report=false"),
    "model.tiny={width:16,num_layers:1,num_heads:2,mlp_width:24}",
)


def program(*words: str, launcher: tuple[str, ...] = (sys.executable,), **options) -> subprocess.CompletedProcess[str]:
    """train.py as a user starts it."""
    command = [*launcher, str(ROOT / "train.py"), *RUN, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False, **options)


@pytest.mark.slow
def test_whole_recipe_in_two_processes(tmp_path):
    """One process, two by our launcher and two by torchrun end with the same table, row by row."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    found = {}
    for name, words, launcher in (
        ("one", (), (sys.executable,)),
        ("two", ("trainer.devices=2",), (sys.executable,)),
        ("torchrun", ("strategy=fsdp",), torchrun),
    ):
        done = program(f"run_dir={tmp_path / name}", *words, launcher=launcher)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.splitlines()[-1] == str(tmp_path / name / "results.json")
        assert done.stdout.count("results.json") == 1, "one process speaks"
        results = json.loads((tmp_path / name / "results.json").read_text())
        files = sorted((tmp_path / name / "evaluations").glob("*.jsonl"))
        rows = {f.name: [json.loads(line)["completion"] for line in f.read_text().splitlines()] for f in files}
        found[name] = ([(e["stage"], e["n"], e["correct"]) for e in results["evaluations"]], rows)
    assert found["one"] == found["two"]
    assert found["one"] == found["torchrun"]
    # The last checkpoint, written in two shards, is the final model as soon as it is put together.
    checkpoint, _ = newest(tmp_path / "torchrun" / "stages" / "grpo" / "checkpoints")
    assert checkpoint is not None and len(list(checkpoint.glob("shard-*.safetensors"))) == 2
    consolidate(tmp_path / "torchrun", tmp_path / "whole")
    whole, final = (load_network(str(tmp_path / name)) for name in ("whole", "torchrun/model"))
    assert all(torch.equal(p, final.get_parameter(name)) for name, p in whole.named_parameters())
    with pytest.raises(ConfigError, match=r"holds no such checkpoint. Try: .*--stage grpo --step 2"):
        consolidate(tmp_path / "torchrun", tmp_path / "other", step=99)


@pytest.mark.slow
def test_a_signal_stops_all_processes_with_a_checkpoint(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *RUN, "recipe=sft", "scale.sft.max_updates=100000"]
    command += ["trainer.devices=2", f"run_dir={tmp_path / 'run'}", "evaluation.base=false"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "run" / "logs" / "sft"
    deadline = time.monotonic() + 120
    while not (folder.exists() and any(folder.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors[-2000:]
    checkpoint, _ = newest(tmp_path / "run" / "stages" / "sft" / "checkpoints")
    assert checkpoint is not None
