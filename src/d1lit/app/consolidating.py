"""A checkpoint of a run, whoever wrote it and in however many shards, as one model folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from d1lit.app.export import refuse_taken, staged
from d1lit.app.open_run import plan_of_run
from d1lit.app.run_policy import policy_of_run
from d1lit.checkpoint import list_checkpoints, verify
from d1lit.checkpoint.shards import read_part
from d1lit.errors import ConfigError
from d1lit.models import Policy, export_model, merge_lora


def consolidate(
    run: Path,
    target: Path,
    stage: str | None = None,
    step: int | None = None,
    layout: Literal["d1lit", "official"] = "d1lit",
    trusted: Sequence[str] = (),
    words: Sequence[str] = (),
) -> Path:
    """Write the model that stands in a checkpoint as one folder that transformers reads, its adapter merged.

    Weights are read one at a time; optimizer state is not read at all.

    Args:
        run: the run's folder; the run need not have ended.
        target: is created; refused if it holds a model already.
        stage: whose checkpoint; None for the last stage that has one.
        step: of the checkpoint; None for the newest.
        layout: our own names, which d1lit and transformers read, or those of the model's family.
        trusted: packages whose components the run may name.
        words: KEY=VALUE that override the run's.

    Raises:
        ConfigError: if there is no such checkpoint, if it does not verify, or if the target is taken.
    """
    refuse_taken("consolidate", target)
    plan = plan_of_run(run, words, trusted)
    name, checkpoint = find_checkpoint(run, [parts.name for parts in plan.stages], stage, step)
    reason = verify(checkpoint)
    if reason is not None:
        raise ConfigError("consolidate", f"{checkpoint} is not whole ({reason})", "--step with an earlier one", "E508")
    policy, tokenizer = policy_of_run(plan, run, start_of=name)
    fill(policy, checkpoint)
    with staged(target) as staging:
        export_model(merge_lora(policy).network, staging, layout)
        tokenizer.save_pretrained(staging)
    return target


def find_checkpoint(run: Path, stages: Sequence[str], stage: str | None, step: int | None) -> tuple[str, Path]:
    """Stage and folder of the checkpoint asked for.

    Raises:
        ConfigError: if there is none, naming those that are there.
    """
    there = {name: list_checkpoints(run / "stages" / name / "checkpoints") for name in stages}
    names = [stage] if stage is not None else [name for name in stages if there[name]][-1:]
    for name in names:
        for path in there.get(name, ()):
            if step is None or path.name == f"step_{step}":
                return name, path
    known = [f"--stage {name} --step {re.sub(r'[^0-9]', '', p.name)}" for name in stages for p in there[name]]
    raise ConfigError(
        "consolidate", f"{run} holds no such checkpoint", "; ".join(known) or "a run that has saved one", "E508"
    )


@torch.no_grad()
def fill(policy: Policy, checkpoint: Path) -> None:
    """Take the trained weights out of a checkpoint.

    Raises:
        ConfigError: if one is missing.
    """
    stored = read_part(checkpoint, "state_dict")
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        if f"policy.{name}" not in stored:
            cause = f"{checkpoint} lacks {name}, so it is of another model"
            raise ConfigError("consolidate", cause, "the run's own configuration", "E508")
        parameter.copy_(stored[f"policy.{name}"]())
