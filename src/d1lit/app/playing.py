"""Recording how a policy fills a canvas, for the player, the report and the GIF."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from d1lit.app.components import build
from d1lit.app.config_errors import as_config_error
from d1lit.app.open_run import open_run
from d1lit.app.plan import Plan, decode
from d1lit.data import prompt_batch
from d1lit.draws import CounterDraws
from d1lit.errors import ConfigError
from d1lit.models import Policy
from d1lit.modules.stage_data import prompt_rows
from d1lit.report.animation import write_gif
from d1lit.report.page import player_page, write_page
from d1lit.report.recording import record_group
from d1lit.rewards.parts import RewardParts
from d1lit.tasks import graded_text

MOST_ROLLOUTS = 8


def record_rows(
    plan: Plan, policy: Policy, tokenizer: Any, numbers: Sequence[int], *, stage: str, split: str, group_size: int
) -> list[dict[str, Any]]:
    """One recorded group for each row, sampled as in training and judged by the run's reward.

    Args:
        plan: the run's.
        policy: whose completions.
        tokenizer: the policy's.
        numbers: places of the rows in their split.
        stage: what the policy is called.
        split: train, val or test.
        group_size: completions of each prompt.

    Raises:
        ConfigError: for a row that is not there.
    """
    rows = prompt_rows(plan.task, split, tokenizer)  # type: ignore[arg-type]
    wrong = [number for number in numbers if not 0 <= number < len(rows)]
    if wrong:
        raise ConfigError("--row", f"{split} has no row {wrong[0]}", f"0 to {len(rows) - 1}", "E110")
    try:
        reward = build(plan.config, "reward", RewardParts).judged_by(plan.task.counted)
    except ValueError as error:
        raise as_config_error(error, "reward") from None
    sampler = replace(plan.sampler, record_trace=True, tree=None)
    found = []
    for number in numbers:
        batch = prompt_batch([rows[number]], [number], policy.pad_token_id).to(plan.device)
        rollout = sampler(policy, batch, group_size, CounterDraws(plan.seed))
        completions = tuple(decode(tokenizer, policy.eos_token_id, ids) for ids in rollout.completion_ids.cpu())
        graded = [graded_text(plan.task.template, text) for text in completions]
        found.append(
            record_group(
                replace(rollout, completions=completions),
                reward.grade(graded, rollout.examples),
                reward.weights,
                partial(token_text, tokenizer),
                index=number,
                stage=stage,
                mask_token_id=policy.mask_token_id,
                eos_token_id=policy.eos_token_id,
                block_length=sampler.block_length,
            )
        )
    return found


def token_text(tokenizer: Any, token: int) -> str:
    """A single token as text; a byte that is no character by itself becomes the sign for such."""
    return tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def group_size_of(plan: Plan) -> int:
    """Rollouts of a group as the run trained with them, at most eight; four where it trained with none."""
    sizes = [
        stage.module.keywords["group_size"]
        for stage in plan.stages
        if isinstance(stage.module, partial) and "group_size" in stage.module.keywords
    ]
    return min(MOST_ROLLOUTS, sizes[-1]) if sizes else 4


def keep_recordings(plan: Plan, folder: Path, policy: Policy, tokenizer: Any, num_rows: int = 4) -> None:
    """recordings.json: a few rows of the split that the run is evaluated on, for the player in the report."""
    split = plan.config.evaluation.split
    available = len(plan.task.rows(split))
    numbers = list(range(min(num_rows, available)))
    stage = plan.stages[-1].name if plan.stages else "base"
    # Four completions a row are enough to see; more would make the report heavy.
    size = min(4, group_size_of(plan))
    recordings = record_rows(plan, policy, tokenizer, numbers, stage=stage, split=split, group_size=size)
    (folder / "recordings.json").write_text(json.dumps(recordings), encoding="utf-8")


def play(
    folder: Path,
    row: int,
    *,
    split: str = "test",
    group_size: int | None = None,
    gif: Path | None = None,
    html: Path | None = None,
    words: Sequence[str] = (),
    trusted: Sequence[str] = (),
) -> list[Path]:
    """`d1lit play`: sample one group of a run's final policy and write it as a page, and as a GIF on request.

    Returns:
        The files written.
    """
    run = open_run(folder, words, trusted)
    size = group_size or group_size_of(run.plan)
    recordings = record_rows(run.plan, run.policy, run.tokenizer, [row], stage=run.stage, split=split, group_size=size)
    title = f"{run.plan.config.recipe.name} on {run.plan.task.display_name}: {split} row {row}"
    written = [write_page(html or folder / f"player-{split}-{row}.html", player_page(title, recordings))]
    if gif is not None:
        write_gif(recordings[0], gif)
        written.append(gif)
    return written
