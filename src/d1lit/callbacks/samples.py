"""What the policy writes, while it learns to: a few completions of the latest rollout with every reward part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typing_extensions import override

from d1lit.evaluation import append_records, keep_records
from d1lit.modules import DiffuGRPO


class SampleTable(L.Callback):
    """Writes some completions of a rollout to the console, to the logger as text, and to a JSON lines file.

    Args:
        stage: name of the stage, for the records.
        file: where the records go.
        console: where the table goes; None for no table.
        every_n_steps: optimizer steps between two tables.
        rows: completions in a table.
    """

    def __init__(self, stage: str, file: Path, console: Console | None, every_n_steps: int, rows: int) -> None:
        self.stage = stage
        self.file = file
        self.console = console
        self.every_n_steps = every_n_steps
        self.rows = rows
        self._next = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        """When the next table is due."""
        return {"next": self._next}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up."""
        self._next = state_dict["next"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop what an earlier attempt has written of rollouts that will be collected again."""
        if isinstance(pl_module, DiffuGRPO) and trainer.is_global_zero:
            first = -(-trainer.global_step // pl_module.num_inner_updates)
            keep_records(self.file, lambda record: record.get("stage") != self.stage or record["rollout"] < first)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the rollout that was just collected, if it is time."""
        if not isinstance(pl_module, DiffuGRPO) or batch.prompts is None or not trainer.is_global_zero:
            return
        if trainer.global_step < self._next:
            return
        self._next = (trainer.global_step // self.every_n_steps + 1) * self.every_n_steps
        records = self._records(pl_module, batch.step)
        try:
            append_records(self.file, records)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    text = _markdown(records)
                    logger.experiment.add_text(f"samples/{self.stage}", text, trainer.global_step - 1)
        except OSError as error:  # they are there to be looked at: no reason to end the run
            rank_zero_warn(f"samples of update {trainer.global_step} are not written: {error}")
        if self.console is not None:
            self.console.print(_table(records, f"{self.stage}, update {trainer.global_step}"))

    def _records(self, module: DiffuGRPO, number: int) -> list[dict[str, Any]]:
        rollout = module.experience[0].rollout
        spread = range(0, len(rollout.completions), max(1, len(rollout.completions) // self.rows))
        return [
            {
                "kind": "rollout",
                "stage": self.stage,
                "rollout": number,
                "id": rollout.examples[i].get("id"),
                "question": rollout.examples[i].get("question"),
                "answer": rollout.examples[i].get("answer"),
                "completion": rollout.completions[i],
                "reward": float(module.experience[0].rewards[i]),
                "advantage": float(module.experience[0].advantages[i].mean()),  # of edges or steps, the mean
                "parts": {
                    name: {"value": verdicts[i].value, "outcome": verdicts[i].outcome, "parsed": verdicts[i].parsed}
                    for name, verdicts in module.verdicts.items()
                },
                "example": dict(rollout.examples[i]),
            }
            for i in list(spread)[: self.rows]
        ]


def _cells(record: dict[str, Any]) -> list[str]:
    parts = " ".join(f"{name} {part['value']:g}" for name, part in record["parts"].items())
    parsed = next((part["parsed"] for part in record["parts"].values() if part["parsed"]), "")
    return [record["question"], record["completion"], parsed, str(record["answer"]), f"{record['reward']:.3g}", parts]


_HEADINGS = ("prompt", "completion", "parsed", "gold", "reward", "parts")


def _table(records: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold", max_width=48)
    for record in records:
        table.add_row(*(escape(str(cell)) for cell in _cells(record)))
    return table


def _markdown(records: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    for record in records:
        cells = (str(cell).replace("|", "\\|").replace("\n", " ⏎ ").replace("<", "&lt;") for cell in _cells(record))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
