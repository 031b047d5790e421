"""The numbers of docs/8b.md are what its commands print."""

import re
from functools import cache
from pathlib import Path

import pytest

from d1lit.app import cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "8b.md"
COMMAND = ("recipe=d1", "task=gsm8k", "model=llada_8b", "evaluation.lengths=[128,256,512]", "dry_run=true")
OFFLINE = (
    "task.train_data=builtin",
    "task.test_data=builtin",
    "task.demonstration_data=task",
    "task.num_builtin.train=200",
    "task.num_builtin.test=1319",  # the rows of GSM8K's test split, which the page's command reads from the hub
)
CARD_24, CARD_80, CARDS_80 = (
    ("hardware=gpu_24gb", "sampler.rows_per_forward=16"),
    ("hardware=gpu_80gb",),
    ("hardware=gpu_80gb", "trainer.devices=8"),
)
FULL = "scale.sft.lora=null scale.grpo.lora=null"
NF4 = "scale.sft.lora.quantize=nf4 scale.grpo.lora.quantize=nf4"
OTHERS = {
    "1 x 24 GB, four bits: `" + NF4 + "`": ("hardware=gpu_24gb", *NF4.split()),
    "1 x 80 GB, micro-batches by memory: `scale.sft.micro_batch_size=null scale.grpo.micro_batch_size=null`": (
        *CARD_80,
        "scale.sft.micro_batch_size=null",
        "scale.grpo.micro_batch_size=null",
    ),
    "8 x 80 GB, shared prompt masks: `recipe=d1_shared`": (*CARDS_80, "recipe=d1_shared"),
    "8 x 80 GB, every weight (`fsdp`): `" + FULL + "`": (*CARDS_80, *FULL.split()),
}


@pytest.fixture(scope="module")
def printed():
    """What a command prints, each run once."""

    @cache
    def run(*words: str) -> str:
        import contextlib
        import io

        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert cli.train([*COMMAND, *OFFLINE, *words]) == 0
        return said.getvalue()

    return run


def stage(text: str, name: str) -> tuple[str, str, str]:
    """Memory, hours and disk of a stage, as printed."""
    part = text.split(f"\n{name}: ")[1]
    memory = re.search(r"GiB: ([\d.]+) at most", part)
    hours = re.search(r"operations, ([\d.]+) hours; checkpoints and weights ([\d.]+) GiB", part)
    assert memory and hours
    return memory[1], hours[1], hours[2]


def evaluation(text: str, length: int) -> tuple[str, str]:
    found = re.search(rf"at {length} tokens: 1319 rows, ([\d.]+) hours .*, ([\d.]+) GiB on each", text)
    assert found
    return found[2], found[1]


def main_rows(texts: list[str]) -> list[str]:
    def row(name, cells):
        return f"| {name} | {' | '.join(cells)} |"

    rows = [row("SFT", ["{} GiB, {} h".format(*stage(t, "sft")[:2]) for t in texts])]
    merges = [re.search(r"merging an adapter, or export: ([\d.]+) GiB", t) for t in texts]
    rows.append(row("merge", [f"{found[1]} GiB, minutes" for found in merges if found]))
    rows.append(row("GRPO", ["{} GiB, {} h".format(*stage(t, "grpo")[:2]) for t in texts]))
    for length in (128, 256, 512):
        rows.append(row(f"evaluation at {length}", ["{} GiB, {} h".format(*evaluation(t, length)) for t in texts]))
    disk = [f"{float(stage(t, 'sft')[2]) + float(stage(t, 'grpo')[2]):.3g} GiB" for t in texts]
    return [*rows, row("disk", disk)]


def other_row(name: str, text: str) -> str:
    sft, grpo = stage(text, "sft"), stage(text, "grpo")
    disk = f"{float(sft[2]) + float(grpo[2]):.3g} GiB"
    return f"| {name} | {sft[0]} GiB, {sft[1]} h | {grpo[0]} GiB, {grpo[1]} h | {disk} |"


def test_the_column_of_eight_cards_is_what_its_command_prints(printed):
    rows = main_rows([printed(*CARDS_80)])
    page = PAGE.read_text(encoding="utf-8")
    for row in rows:
        name, cell = [part.strip() for part in row.strip("|").split("|")]
        assert re.search(rf"\| {re.escape(name)} \|.*\| {re.escape(cell)} \|$", page, re.MULTILINE), row


@pytest.mark.slow
def test_the_table_is_what_the_commands_print(printed):
    rows = main_rows([printed(*words) for words in (CARD_24, CARD_80, CARDS_80)])
    page = PAGE.read_text(encoding="utf-8")
    assert [row for row in rows if row not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_ways_are_what_their_commands_print(name, printed):
    assert other_row(name, printed(*OTHERS[name])) in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_one_card_refuses_every_weight_and_says_what_would_do(capsys):
    assert cli.train([*COMMAND, *OFFLINE, *CARD_80, *FULL.split()]) == 2
    assert re.search(
        r"error: stages.sft: needs about [\d.]+ GiB on each device, which has 77.0. Try: strategy=fsdp",
        capsys.readouterr().err,
    )
