"""The processes of a run: who they are, how they are started on one machine, and what the first decides for all.

A run of several processes starts all of them at its beginning, and each runs the whole program. They find each other
through torchrun's environment variables, whoever has set them: our own launcher (`trainer.devices=N`), torchrun, or
SLURM's `srun`, whose variables are translated.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others: one may pretrain the tiny base, or judge slowly, while they wait."""
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_GRACE_SECONDS = 30.0
_PARENT = "D1LIT_LAUNCHER"


@dataclass(frozen=True)
class Place:
    """Which of the run's processes this is."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Processes on this machine; every machine has as many."""

    @property
    def num_nodes(self) -> int:
        """Machines of the run."""
        return self.world_size // self.local_world_size


ALONE = Place(0, 1, 0, 1)


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """What torchrun, `srun` or our launcher say of this process; a process that nobody placed is alone.

    Raises:
        ValueError: if SLURM gives the machines different numbers of processes.
    """
    if int(environment.get("WORLD_SIZE", 1)) > 1 and "RANK" in environment:
        world_size = int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        return Place(int(environment["RANK"]), world_size, int(environment.get("LOCAL_RANK", 0)), local)
    # srun alone sets SLURM_STEP_NUM_TASKS; sbatch and salloc announce tasks that nobody has started yet.
    world_size = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if world_size == 1 or "SLURM_PROCID" not in environment:
        return ALONE
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", 1)))
    if world_size % nodes:
        raise ValueError(
            f"strategy: srun starts {world_size} processes on {nodes} machines, which is not the same number on each. "
            "Try: srun --ntasks-per-node=N [E601]"
        )
    return Place(int(environment["SLURM_PROCID"]), world_size, int(environment["SLURM_LOCALID"]), world_size // nodes)


def translate_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say in torchrun's words what SLURM said: rank, world, and where the processes meet."""
    if "RANK" in environment:
        return
    here = place(environment)
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "localhost"))
    job = int(re.sub(r"\D", "", environment.get("SLURM_JOB_ID", "0")) or 0)
    environment.update(
        RANK=str(here.rank),
        WORLD_SIZE=str(here.world_size),
        LOCAL_RANK=str(here.local_rank),
        LOCAL_WORLD_SIZE=str(here.local_world_size),
        GROUP_RANK=str(here.rank // here.local_world_size),
    )
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(20000 + job % 20000))


def slurm_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """The job (or task of an array) and step this process belongs to; the same after the job is queued again."""
    if "SLURM_JOB_ID" not in environment:
        return None
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    return f"{job}.{environment['SLURM_STEP_ID']}" if "SLURM_STEP_ID" in environment else job


def first_host(nodes: str) -> str:
    """The first machine of a SLURM node list: `gpu[07-09,12],login1` is `gpu07`."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^,]*)", nodes)
    assert match is not None
    return f"{match[1]}{match[2] or ''}{match[3]}"


# ------------------------------------------------------------------------------------------------------------- joining


def join_world(accelerator: str) -> Place:
    """Meet the other processes, once for the whole program; a process that is alone goes on alone.

    All but the first fall silent, errors apart. On a GPU machine each process takes the GPU of its local rank.
    """
    here = place()
    if here.world_size == 1 or dist.is_initialized():
        return here
    translate_slurm()
    end_with_parent()
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    device = None
    if on_gpu:
        device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    # A communication library that gives up ends the process from a thread of its own: then say where each one stood.
    faulthandler.enable(sys.__stderr__ or sys.stderr)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=device)
    if not on_gpu:  # gloo's threads abort a process that ends while they run; to leave NCCL may mean to wait
        atexit.register(_leave_world)
    if here.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
        warnings.filterwarnings("ignore")
    return here


def _leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> Place:
    """The place of this process among those that have met; alone until then."""
    return place() if dist.is_initialized() else ALONE


def is_first() -> bool:
    """Whether this process speaks and writes for all, before they have met as well as after."""
    return (dist.get_rank() if dist.is_initialized() else place().rank) == 0


def first_decides(decide: Callable[[], T]) -> T:
    """What the first process finds, on all of them; if it raises, all raise the same."""
    if not dist.is_initialized():
        return decide()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = decide()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def all_gather_objects(mine: T) -> list[T]:
    """Every process's object, in rank order, on all of them."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def gathered_rows(mine: Tensor) -> Tensor:
    """The rows of all processes below each other, in rank order; every process has as many."""
    if not dist.is_initialized():
        return mine
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine.contiguous())
    return torch.cat(parts)


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def end_with_parent() -> None:
    """Ask the kernel to end this process with its launcher, however that ends (Linux)."""
    parent = os.environ.get(_PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):  # it was gone before we asked
        os._exit(1)


# ----------------------------------------------------------------------------------------------------------- launching


def launch(command: Sequence[str], num_processes: int) -> int:
    """Run a command in several processes on this machine, under the variables that torchrun would set.

    Differs from torchrun: every signal goes to all processes, which have all the time they need to save (torchrun
    kills after 30 seconds and does not know SIGUSR1), and the exit status is the one of the process that ended first.
    When one fails, the others get SIGTERM and 30 seconds.

    Returns:
        0 if all ended well, else the status of the first that did not; 128 + signal for one that a signal ended.
    """
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT
    )
    shared = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher holds the store, so no port can be lost to another
        _PARENT: str(os.getpid()),
    }
    shared = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes)), **os.environ, **shared}
    children: list[subprocess.Popen[bytes]] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signum)

    before = {signum: signal.signal(signum, forward) for signum in _FORWARDED}
    try:
        for rank in range(num_processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A group of its own: Ctrl-C in a terminal then reaches it once, through us.
            children.append(subprocess.Popen(command, env={**shared, **own}, start_new_session=True))
        return _first_failure(children)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _first_failure(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; after the first failure the others are ended."""
    failure, deadline = 0, float("inf")
    while None in [child.poll() for child in children]:
        time.sleep(0.05)
        failed = [rank for rank, child in enumerate(children) if child.returncode not in (0, None)]
        if failed and not failure:
            failure, deadline = children[failed[0]].returncode, time.monotonic() + _GRACE_SECONDS
            _say_who_failed(failed[0], len(children), failure)
            for child in children:
                if child.poll() is None:
                    child.terminate()
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
    failure = failure or next((child.returncode for child in children if child.returncode), 0)
    return 128 - failure if failure < 0 else failure


def _say_who_failed(rank: int, num_processes: int, status: int) -> None:
    """One line: what the others say of lost connections is the consequence, and stands above or below it."""
    asked_to_stop = [128 + signum for signum in _FORWARDED]
    if status not in asked_to_stop:
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        print(f"error: process {rank} of {num_processes} ended first ({how}); ending the others", file=sys.stderr)
