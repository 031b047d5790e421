"""The unmasking player: what it shows at a step is what stood on the canvas then."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence

from d1lit.app import commands
from d1lit.app.open_run import open_run
from d1lit.app.playing import keep_recordings
from d1lit.draws import CounterDraws
from d1lit.models import build_policy
from d1lit.report.animation import write_gif
from d1lit.report.page import player_page
from d1lit.report.player import player
from d1lit.report.recording import END, record_group, shown_at, state_at
from d1lit.sampling import BlockSampler, EvenSchedule, FixedQuota, InverseCDF, TokenProbability
from d1lit.types import PromptBatch, Rollout, Verdict
from tests.real_runs import copy_of, real_run

TINY = {
    "width": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_width": 32,
    "rope_theta": 100.0,
    "max_length": 64,
    "init_std": 0.3,
}


def sampled(stop_at_eos: bool = False, group_size: int = 3) -> tuple[Rollout, int, int]:
    """A group from a real sampler with its trace; the ids of mask and end."""
    policy, tokenizer = build_policy(None, TINY, "float32", False, None, 0)
    sampler = BlockSampler(
        completion_length=12, num_steps=6, block_length=6, temperature=1.0, guidance=0.0, proposal=InverseCDF(),
        confidence=TokenProbability(), commit=FixedQuota(EvenSchedule()), stop_at_eos=stop_at_eos, record_trace=True,
    )  # fmt: skip
    ids = torch.tensor([tokenizer("2 + 2", add_special_tokens=False).input_ids])
    example = {"id": "r", "question": "2 + 2", "answer": "4"}
    prompts = PromptBatch(ids, torch.ones_like(ids).bool(), torch.tensor([0]), (example,))
    rollout = sampler(policy, prompts, group_size, CounterDraws(1))
    return replace(rollout, completions=("text",) * group_size), policy.mask_token_id, policy.eos_token_id


def recorded(rollout: Rollout, mask: int, eos: int, spell: Callable[[int], str] = str) -> dict:
    verdicts = {
        "solved": [Verdict(1.0, "ok", "4")] * len(rollout.row_ids),
        "form": [Verdict(0.5, "timeout")] * len(rollout.row_ids),
    }
    return record_group(
        rollout, verdicts, {"solved": 2.0, "form": 1.0}, spell,
        index=3, stage="grpo", mask_token_id=mask, eos_token_id=eos, block_length=6,
    )  # fmt: skip


def test_every_step_shows_the_canvas_of_that_step():
    rollout, mask, eos = sampled()
    assert rollout.trace is not None
    recording = recorded(rollout, mask, eos)
    assert recording["steps"] == len(rollout.trace)
    for step, canvas in enumerate(rollout.trace):
        for n, one in enumerate(recording["rollouts"]):
            shown = [shown_at(token, step) for token in one["tokens"]]
            assert shown == [None if t == mask else END if t == eos else str(t) for t in canvas[n].tolist()]


def test_the_trace_and_the_commit_steps_tell_the_same_story():
    rollout, mask, eos = sampled()
    with_trace, without = recorded(rollout, mask, eos), recorded(replace(rollout, trace=None), mask, eos)
    assert with_trace == without


def test_tokens_that_were_masked_again_are_seen_leaving():
    rollout, mask, eos = sampled(group_size=1)
    trace = torch.full((4, 1, 12), mask)
    trace[1:, 0, 0], trace[2, 0, 0] = 65, mask  # appears at step 1, goes at 2, comes back as another at 3
    trace[3, 0, 0] = 66
    trace[3, 0, 1:] = 67
    final = trace[3].clone()
    steps = torch.full((1, 12), 3)
    rollout = replace(rollout, trace=trace, completion_ids=final, commit_step=steps, completion_mask=final > 0)
    first = recorded(rollout, mask, eos)["rollouts"][0]["tokens"][0]
    assert [state_at(first, step) for step in range(-1, 4)] == ["masked", "masked", "new", "remasked", "new"]
    assert [shown_at(first, step) for step in range(4)] == [None, "65", None, "66"]
    page = str(player([recorded(rollout, mask, eos)]))
    assert 'data-s="2,-3,4"' in page
    assert 'data-was="65\u241f\u241f66"' in page


def test_tokens_that_were_edited_are_seen_changing():
    rollout, mask, eos = sampled(group_size=1)
    trace = torch.full((3, 1, 12), 67)
    trace[0, 0, 0], trace[1:, 0, 0] = 65, 66
    steps = torch.zeros(1, 12, dtype=torch.int64)
    steps[0, 0] = 1
    rollout = replace(rollout, trace=trace, completion_ids=trace[2], commit_step=steps)
    rollout = replace(rollout, completion_mask=torch.ones_like(rollout.completion_mask))
    first = recorded(rollout, mask, eos)["rollouts"][0]["tokens"][0]
    assert [state_at(first, step) for step in range(-1, 3)] == ["masked", "new", "edited", "fixed"]
    assert [shown_at(first, step) for step in range(3)] == ["65", "66", "66"]
    page = str(player([recorded(rollout, mask, eos)]))
    assert 'data-s="1,2"' in page
    assert 'data-was="65\u241f66"' in page


def test_places_never_reached_have_no_step():
    rollout, mask, eos = sampled()
    steps = rollout.commit_step.clone()
    steps[:, 6:] = -1
    ids = rollout.completion_ids.clone()
    ids[:, 6:] = eos
    tokens = recorded(replace(rollout, commit_step=steps, completion_ids=ids), mask, eos)["rollouts"][0]["tokens"]
    assert [state_at(token, 99) for token in tokens[6:]] == ["unreached"] * 6
    assert all(token["events"] == [] and token["confidence"] is None for token in tokens[6:])


def test_rewards_are_weighted_and_failed_judges_left_out():
    rollout, mask, eos = sampled()
    assert [one["reward"] for one in recorded(rollout, mask, eos)["rollouts"]] == [2.0] * 3


def test_shades_rise_with_confidence():
    rollout, mask, eos = sampled(group_size=1)
    values = torch.linspace(0.01, 0.999, 12)[None]
    shades = [t["shade"] for t in recorded(replace(rollout, confidence=values), mask, eos)["rollouts"][0]["tokens"]]
    assert shades == sorted(shades)
    assert (shades[0], shades[-1]) == (0, 4)
    negative = [
        t["shade"] for t in recorded(replace(rollout, confidence=values - 5), mask, eos)["rollouts"][0]["tokens"]
    ]
    assert (negative[0], negative[-1]) == (0, 4)
    endless = replace(rollout, confidence=torch.full((1, 12), -torch.inf))
    assert {t["shade"] for t in recorded(endless, mask, eos)["rollouts"][0]["tokens"]} == {None}


class Spans(HTMLParser):
    """Counts token elements and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = self.scripts = self.ranges = 0

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tokens += tag == "span" and "t" in (found.get("class") or "").split()
        self.scripts += tag == "script"
        self.ranges += tag == "input" and found.get("type") == "range"


def test_the_page_holds_every_token_and_one_script():
    rollout, mask, eos = sampled()
    hostile = lambda token: f"</script><b onx='{token}'>\x00\ud800"  # noqa: E731
    page = player_page("a </title> b", [recorded(rollout, mask, eos, hostile)])
    page.encode("utf-8")
    assert "\x00" not in page
    assert "<b onx" not in page
    seen = Spans()
    seen.feed(page)
    key = 10  # five shades and five states
    assert (seen.tokens, seen.scripts, seen.ranges) == (3 * 12 + key, 1, 1)


def test_the_gif_has_a_frame_before_and_after_every_step(tmp_path):
    rollout, mask, eos = sampled()
    recording = recorded(rollout, mask, eos, lambda token: chr(token) if token < 256 else "∎")
    write_gif(recording, tmp_path / "a.gif", seconds_per_step=0.2)
    with Image.open(tmp_path / "a.gif") as image:
        durations, pictures = [], []
        for frame in ImageSequence.Iterator(image):
            durations.append(frame.info["duration"])
            pictures.append(frame.convert("RGB").tobytes())
    assert durations == [200] * recording["steps"] + [2000]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.slow
def test_play_writes_a_page_and_a_gif_of_a_real_run(tmp_path, capsys):
    run = copy_of(real_run(), tmp_path / "run")
    words = [str(run), "--row", "3", "--group", "2", "--gif", str(tmp_path / "a.gif"), "sampler.temperature=0.7"]
    assert commands.play(words) == 0
    page, gif = capsys.readouterr().out.split()
    assert gif == str(tmp_path / "a.gif")
    text = Path(page).read_text(encoding="utf-8")
    assert len(re.findall("<h4>Rollout [12]: reward", text)) == 2
    assert commands.play([str(run), "--row", "100000"]) == 2
    error = capsys.readouterr().err
    assert "--row: test has no row 100000. Try: 0 to" in error


def test_a_finished_run_kept_recordings_for_its_report():
    recordings = json.loads((real_run() / "recordings.json").read_text())
    assert [recording["index"] for recording in recordings] == [0, 1, 2, 3]
    for recording in recordings:
        for one in recording["rollouts"]:
            assert all(state_at(token, recording["steps"]) in ("fixed", "unreached") for token in one["tokens"])
            assert len(one["tokens"]) == 40


def test_recordings_are_of_the_split_that_the_run_is_evaluated_on(tmp_path):
    run = open_run(real_run(), ["evaluation.split=val"])
    keep_recordings(run.plan, tmp_path, run.policy, run.tokenizer, num_rows=1)
    (kept,) = json.loads((tmp_path / "recordings.json").read_text())
    assert kept["id"] == next(iter(run.plan.task.rows("val")))["id"]
    assert kept["id"] not in {row["id"] for row in run.plan.task.rows("test")}


def test_play_refuses_a_folder_without_a_run(tmp_path, capsys):
    assert commands.play([str(tmp_path)]) == 2
    assert "holds no finished run. Try:" in capsys.readouterr().err


@pytest.mark.parametrize("group", ["0", "-1"])
def test_play_refuses_groups_of_none(group, capsys):
    assert commands.play([str(real_run()), f"--group={group}"]) == 2
    assert "--group" in capsys.readouterr().err
