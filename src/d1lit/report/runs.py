"""Runs as they lie on the disk: what they were told, what they measured, what they wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from d1lit.report.events import event_files, read_scalars
from d1lit.security import redact

Row = Mapping[str, Any]
Scalars = Mapping[str, Sequence[tuple[int, float]]]

NOT_THE_EXPERIMENT = ("seed", "run_dir", "resume", "dry_run", "report", "callbacks", "logger", "hydra", "debug")
"""Keys that may differ between two runs of one experiment."""
ENTRY_KEYS = frozenset(
    {
        "stage",
        "task",
        "completion_length",
        "n",
        "correct",
        "accuracy",
        "interval",
        "effective_tokens",
        "truncated_fraction",
    }
)
"""What every evaluation in results.json says."""
ROW_KEYS = frozenset({"index", "id", "question", "answer", "completion", "strict", "d1", "extra"})
"""What every graded row says."""
_AS_WRITTEN = "the files as train.py wrote them, or leave this run out"
FINAL_LOG = "final"
"""Folder under logs/ that holds what was written at the end, and no curve."""


@dataclass(frozen=True)
class Run:
    """A finished run's folder; files are read when they are asked for."""

    folder: Path
    results: Mapping[str, Any]
    config: Mapping[str, Any]
    """The resolved configuration; empty where there is none (an evaluation on its own)."""
    environment: Mapping[str, Any]
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def evaluations(self) -> Sequence[Mapping[str, Any]]:
        """Entries of the results table."""
        return self.results["evaluations"]

    @property
    def tasks(self) -> list[str]:
        """Tasks that it was evaluated on: those of a mixture, one by one."""
        return list(dict.fromkeys(str(entry["task"]) for entry in self.evaluations))

    def grader(self, entry: Mapping[str, Any]) -> str:
        """Whose verdict counts in an evaluation; a mixture's tasks have each their own."""
        return str(entry.get("grader") or self.results.get("grader") or "strict")

    @cached_property
    def curves(self) -> dict[str, Scalars]:
        """Scalars of every stage that has event files, by tag, in the order of the stages."""
        logs = self.folder / "logs"
        names = [p.name for p in sorted(logs.iterdir()) if event_files(p)] if logs.is_dir() else []
        names = [name for name in names if name != FINAL_LOG]
        order = {name: place for place, name in enumerate(["base", *stage_names(self.config)])}
        names.sort(key=lambda name: order.get(name, len(order)))
        return {name: read_scalars(logs / name) for name in names}

    def rows(self, entry: Mapping[str, Any]) -> list[Row]:
        """Graded rows of one evaluation; none where its file is gone."""
        name = entry.get("rows_file")
        if not name:
            return []
        file = self.folder / name
        rows = read_lines(file)
        for row in rows:
            lacking = ROW_KEYS - set(row)
            if lacking:
                raise ValueError(f"run: {file} has a row without {min(lacking)}. Try: {_AS_WRITTEN} [E507]")
        return rows

    @cached_property
    def samples(self) -> list[Row]:
        """Completions written down while training."""
        return read_lines(self.folder / "samples.jsonl")

    @cached_property
    def recordings(self) -> list[Row]:
        """Groups of completions with every denoising step, for the player."""
        return read_json(self.folder / "recordings.json", [])

    @property
    def baselines(self) -> Mapping[str, Mapping[str, Any]]:
        """What answers without any model reach on the same rows, by their names."""
        return self.results.get("baselines") or {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted key to value, of everything that makes the experiment what it is; secrets are blanked."""
        seed = self.config.get("seed")
        return {
            key: value
            for key, value in flat(redact(dict(self.config))).items()
            if key.split(".")[0] not in NOT_THE_EXPERIMENT
            # the run's own seed, handed to a part; that of the evaluation is one by itself
            and not (key.endswith(".seed") and not key.startswith("evaluation.") and value == seed)
        }


def read_run(folder: Path | str) -> Run:
    """The run in a folder.

    Raises:
        ValueError: if it holds no finished run.
    """
    folder = Path(folder)
    file = folder / "results.json"
    if not file.is_file():
        cure = "a folder whose run has ended (train.py prints its results.json as its last line)"
        raise ValueError(f"run: {folder} holds no results.json. Try: {cure} [E504]")
    results = read_json(file, {})
    try:
        missing = {"evaluations", "recipe", "task", "model", "seed"} - set(results)
        missing |= {key for entry in results.get("evaluations", []) for key in ENTRY_KEYS - set(entry)}
        if missing:
            raise KeyError(min(missing))
    except (KeyError, TypeError) as error:
        raise ValueError(f"run: {file} is not a run's results ({error!r}). Try: another folder [E504]") from None
    source = folder
    if results["recipe"] == "evaluation" and results.get("run"):
        # An evaluation on its own speaks of the run it evaluated.
        source = Path(results["run"])
        trained = read_json(source / "results.json", {})
        results = {**results, "recipe": trained.get("recipe", "evaluation"), "seed": trained.get("seed", 0)}
    config_file = source / "config.yaml"
    config = _read(config_file, yaml.safe_load, dict, {})
    overrides = read_json(source / "overrides.json", [])
    environment = read_json(source / "environment.json", {})
    return Run(folder, results, config, environment, tuple(map(str, overrides)))


def read_runs(folders: Sequence[Path | str]) -> list[Run]:
    """Every run once, in the order given.

    Raises:
        ValueError: for a folder without a run, or for none at all.
    """
    seen: dict[Path, Run] = {}
    for folder in folders:
        seen.setdefault(Path(folder).resolve(), read_run(folder))
    if not seen:
        raise ValueError("run: no folder given. Try: the folders of one or more runs, such as outputs/* [E504]")
    return list(seen.values())


def stage_names(config: Mapping[str, Any]) -> list[str]:
    """Stages of the recipe in their order."""
    recipe = config.get("recipe") or {}
    return [str(name) for name in recipe.get("stages") or []]


def read_json(file: Path, otherwise: Any) -> Any:
    """What a JSON file says, or something else of the same kind where there is no such file.

    Raises:
        ValueError: for a file that is no JSON, or that says something of another kind.
    """
    return _read(file, json.loads, type(otherwise), otherwise)


def _read(file: Path, parse: Callable[[str], Any], kind: type, otherwise: Any) -> Any:
    if not file.is_file():
        return otherwise
    try:
        found = parse(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"run: {file} cannot be read ({cause}). Try: {_AS_WRITTEN} [E504]") from None
    if not isinstance(found, kind):
        what = f"holds a {type(found).__name__} where a {kind.__name__} belongs"
        raise ValueError(f"run: {file} {what}. Try: {_AS_WRITTEN} [E504]")
    return found


def read_lines(file: Path) -> list[Row]:
    """Rows of a JSON lines file; none where there is no file; a last line cut short by a crash is left out.

    Raises:
        ValueError: for a line that is no JSON object.
    """
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n"), start=1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError, RecursionError):
                cause = f"{file}:{number} is no row of JSON"
                raise ValueError(f"run: {cause}. Try: {_AS_WRITTEN} [E507]") from None
    return rows


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaves; lists stay whole."""
    if not isinstance(node, Mapping) or not node:
        return {prefix: node} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


# ------------------------------------------------------------------------------------------------------------- variants


def variants(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs that differ in nothing but their seed, together, each with a name that tells them apart.

    The name is the recipe's, followed by what was said on the command line where one recipe stands in several forms.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        what = {"recipe": run.results["recipe"], "task": run.results["task"], "settings": run.settings}
        groups.setdefault(json.dumps(what, sort_keys=True, default=str), []).append(run)
    found = list(groups.values())
    names = [_variant_name(group[0], [other[0] for other in found]) for group in found]
    # The same words may have composed to different values (another version, another YAML): number those.
    for place, name in enumerate(names):
        task = found[place][0].results["task"]
        twins = [i for i, other in enumerate(names) if other == name and found[i][0].results["task"] == task]
        if len(twins) > 1:
            for number, i in enumerate(twins, start=1):
                names[i] = f"{name} #{number}"
    # A mixture and one of its tasks by the same recipe meet on that task's rows.
    told = [
        f"{name} on {group[0].results['task']}" if _meets_namesake(place, names, found) else name
        for place, (name, group) in enumerate(zip(names, found, strict=True))
    ]
    return list(zip(told, found, strict=True))


def _meets_namesake(place: int, names: Sequence[str], groups: Sequence[Sequence[Run]]) -> bool:
    own = groups[place][0]
    others = [group[0] for i, group in enumerate(groups) if i != place and names[i] == names[place]]
    return any(set(own.tasks) & set(other.tasks) for other in others)


def _variant_name(run: Run, all_runs: Sequence[Run]) -> str:
    recipe = str(run.results["recipe"])
    same = [other for other in all_runs if other.results["recipe"] == recipe]
    same = [other for other in same if other.results["task"] == run.results["task"]]
    if len(same) == 1:
        return recipe
    words = [_words(other) for other in same]
    own = [word for word in _words(run) if not all(word in other for other in words)]
    return f"{recipe} ({', '.join(own)})" if own else recipe


def _words(run: Run) -> list[str]:
    passed_over = (*NOT_THE_EXPERIMENT, "recipe", "task")
    return [word for word in run.overrides if word.lstrip("+~").split("=")[0].split(".")[0] not in passed_over]


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Keys whose values are not the same in all runs, with the value of each run.

    A value that is interpolated into several places is listed once, under the shortest key.
    """
    keys = sorted({key for run in runs for key in run.settings}, key=lambda key: (key.count("."), len(key), key))
    stages = {".".join(key.split(".")[:2]) for key in keys if key.startswith("stages.")}
    partial = [s for s in stages if not all(any(key.startswith(f"{s}.") for key in run.settings) for run in runs)]
    found: dict[str, tuple[str, list[Any]]] = {}
    for stage in sorted(partial):
        present = [any(key.startswith(f"{stage}.") for key in run.settings) for run in runs]
        found[stage] = (stage, ["a stage" if there else "not set" for there in present])
    for key in keys:
        if any(key.startswith(f"{stage}.") for stage in partial):
            continue
        values = [run.settings.get(key, "not set") for run in runs]
        if all(value == values[0] for value in values):
            continue
        found.setdefault(json.dumps([key.rpartition(".")[2], values], default=str), (key, values))
    return sorted(found.values())
