"""The commands of `d1lit` besides train and evaluate. Nothing heavy is imported before the words are understood."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from d1lit.app.refusing import Parser, guarded
from d1lit.errors import ConfigError, explained

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells everybody, when imported, what it lacks on a CPU


def _parser(name: str, text: str) -> argparse.ArgumentParser:
    return Parser(prog=f"d1lit {name}", description=text, allow_abbrev=False)


def compare(words: Sequence[str]) -> int:
    """`d1lit compare RUN...`: tables over runs."""
    parser = _parser("compare", "Accuracy over seeds, paired differences and what differs, from the folders of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="the accuracies, with all their digits")
    form.add_argument("--markdown", action="store_true", help="all tables as Markdown")
    form.add_argument("--latex", action="store_true", help="all tables as LaTeX (booktabs)")
    parser.add_argument("--by-seed", action="store_true", help="a row for each seed, and differences for each seed")
    parser.add_argument("--metric", metavar="NAME", help="with --by-seed: a measure of the rows, such as cell_accuracy")
    given = parser.parse_args(list(words))
    if given.metric is not None and not given.by_seed:
        parser.error("argument --metric: stands with --by-seed only")
    if given.csv and given.by_seed:
        parser.error("argument --csv: has a line for each recipe and stage, and stands without --by-seed")

    def act() -> int:
        from d1lit.report import tables
        from d1lit.report.by_seed import seed_tables
        from d1lit.report.comparing import compare as compared
        from d1lit.report.comparing import compare_pairs
        from d1lit.report.runs import read_runs

        runs = read_runs(_finished(given.runs))
        cells = compared(runs)
        if given.csv:
            print(tables.as_csv(cells), end="")
            return 0
        if given.by_seed:
            shown = seed_tables(runs, given.metric)
        else:
            shown = [
                tables.results_table(cells),
                tables.pairs_table(compare_pairs(runs)),
                tables.differences_table(runs),
            ]
        shown = [table for table in shown if table.rows]
        if given.markdown or given.latex:
            print(
                "\n".join((tables.as_markdown if given.markdown else tables.as_latex)(table) for table in shown), end=""
            )
            return 0
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=200)
        for table in shown:
            console.print(tables.as_rich(table))
        return 0

    return guarded(act)


def _finished(folders: Sequence[Path]) -> list[Path]:
    """Without those that a shell's `outputs/*` picks up but that hold no results yet; they are named."""
    finished = [folder for folder in folders if (folder / "results.json").is_file()]
    if not finished or len(folders) == 1:
        return list(folders)
    for folder in folders:
        if folder not in finished:
            print(f"passed over, no results.json: {folder}", file=sys.stderr)
    return finished


def report(words: Sequence[str]) -> int:
    """`d1lit report RUN...`: report.html."""
    parser = _parser("report", "One self-contained page: of one run into its folder, of several into --output.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("-o", "--output", type=Path, help="default: RUN/report.html, or compare.html for several")
    given = parser.parse_args(list(words))

    def act() -> int:
        from d1lit.report.page import comparison_page, run_page, write_page
        from d1lit.report.runs import read_runs

        runs = read_runs(_finished(given.runs))
        page = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
        default = runs[0].folder / "report.html" if len(runs) == 1 else Path("compare.html")
        print(write_page(given.output or default, page))
        return 0

    return guarded(act)


def play(words: Sequence[str]) -> int:
    """`d1lit play RUN --row N`: the unmasking player."""
    parser = _parser("play", "Sample one group of completions with a run's model, and write how they came to be.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--row", type=int, default=0, help="place of the row in its split (default 0)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--group", type=int, help="completions of the prompt (default: as in training)")
    parser.add_argument("--gif", type=Path, metavar="FILE", help="write an animation too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="default: RUN/player-SPLIT-ROW.html")
    _add_open(parser)
    given = parser.parse_intermixed_args(list(words))
    _see(given.trust)

    def act() -> int:
        from d1lit.app.playing import play as played

        if given.group is not None and given.group < 1:
            raise ConfigError("--group", f"{given.group} completions make no group", "--group 4", "E110")
        files = played(
            given.run,
            given.row,
            split=given.split,
            group_size=given.group,
            gif=given.gif,
            html=given.html,
            words=given.words,
            trusted=given.trust,
        )
        print("\n".join(map(str, files)))
        return 0

    return guarded(act)


def _add_open(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="override the run's settings")
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package of yours that the run's parts come from",
    )


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="a package of yours the run uses"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="the folder of your own YAMLs that the run uses")


def _searched(folder: str | None) -> list[str]:
    return [] if folder is None else [f"--config-dir={folder}"]


def _see(trusted: Sequence[str]) -> None:
    """Let a trusted package that stands in the working folder be found; last, so that it hides nothing installed."""
    if trusted:
        sys.path.append(os.getcwd())


def chat(words: Sequence[str]) -> int:
    """`d1lit chat RUN`: talk to a trained model."""
    parser = _parser("chat", "Ask a run's model; on a terminal its unmasking is shown live, else one answer a line.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--temperature", type=float, help="of the answers (default: as in evaluation)")
    _add_open(parser)
    given = parser.parse_intermixed_args(list(words))
    _see(given.trust)

    def act() -> int:
        from d1lit.app.chatting import chat as talk

        if given.temperature is not None and given.temperature < 0:
            raise ConfigError("--temperature", f"{given.temperature} is below 0", "--temperature 0", "E110")
        return talk(given.run, temperature=given.temperature, words=given.words, trusted=given.trust)

    return guarded(act)


def doctor(words: Sequence[str]) -> int:
    """`d1lit doctor`: look at the machine; exit status 1 where a run would fail."""
    parser = _parser(
        "doctor", "Versions, devices, memory, disk, hub, model and write access; each fault with its cure."
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="look at a model too: a folder, a hub id, or a name such as llada_8b"
    )
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where runs will be written")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds to wait for the hub")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    given = parser.parse_args(list(words))

    def act() -> int:
        import json

        from rich.console import Console

        from d1lit.app.doctor import examine, facts
        from d1lit.app.doctor import report as tell

        findings = examine(given.model, given.outputs, given.timeout)
        if given.json:
            print(json.dumps(facts(findings), indent=2))
            return 1 if any(finding.level == "error" for finding in findings) else 0
        console = Console(highlight=False)
        return tell(findings, console if console.is_terminal else Console(highlight=False, width=160))

    return guarded(act)


def push(words: Sequence[str]) -> int:
    """`d1lit push RUN REPO --yes`: upload a model; without --yes nothing is sent."""
    parser = _parser(
        "push", "Upload RUN/model with its card to the hub. Without --yes it only says what it would send."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or what `d1lit export` wrote")
    parser.add_argument("repository", metavar="REPO", help="owner/name on the hub")
    parser.add_argument("--yes", action="store_true", help="really send")
    parser.add_argument("--public", action="store_true", help="a new repository is private unless this is said")
    given = parser.parse_args(list(words))

    def act() -> int:
        from d1lit.app.export import push as send

        print(send(given.run, given.repository, yes=given.yes, private=not given.public))
        return 0

    return guarded(act)


def export(words: Sequence[str]) -> int:
    """`d1lit export RUN FOLDER`: the final model as one whole."""
    parser = _parser("export", "Write a run's final model as one whole, adapters merged in float32.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="is created")
    parser.add_argument("--layout", choices=("d1lit", "official"), default="d1lit", help="names of the weights")
    _add_trust(parser)
    given = parser.parse_args(list(words))
    _see(given.trust)

    def act() -> int:
        from d1lit.app.export import export as write

        print(write(given.run, given.folder, given.layout, given.trust, _searched(given.config_dir)))
        return 0

    return guarded(act)


def consolidate(words: Sequence[str]) -> int:
    """`d1lit consolidate RUN FOLDER`: a checkpoint as one model folder."""
    parser = _parser("consolidate", "Write the model in a checkpoint, sharded or not, as one folder; adapters merged.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="is created")
    parser.add_argument("--stage", help="whose checkpoint (default: the last stage that has one)")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--layout", choices=("d1lit", "official"), default="d1lit", help="names of the weights")
    _add_trust(parser)
    given = parser.parse_args(list(words))
    _see(given.trust)

    def act() -> int:
        from d1lit.app.consolidating import consolidate as write

        print(
            write(
                given.run,
                given.folder,
                given.stage,
                given.step,
                given.layout,
                given.trust,
                _searched(given.config_dir),
            )
        )
        return 0

    return guarded(act)


def harness(words: Sequence[str]) -> int:
    """`d1lit harness TASK...`: generation tasks of lm-evaluation-harness."""
    parser = _parser("harness", "Generation tasks of lm-evaluation-harness (the extra `harness`) through our sampler.")
    parser.add_argument("tasks", nargs="+", metavar="TASK or KEY=VALUE", help="tasks, and settings (model.path=FOLDER)")
    parser.add_argument("--run", type=Path, metavar="RUN", help="folder of a finished run; else model=... names one")
    parser.add_argument("--include", type=Path, metavar="FOLDER", help="task YAMLs of your own")
    parser.add_argument("--limit", type=int, help="first rows of each task only")
    parser.add_argument("--no-chat", action="store_true", help="prompts without the model's chat template")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/harness"), help="default outputs/harness")
    given = parser.parse_intermixed_args(list(words))

    def act() -> int:
        from d1lit.app.harness import run_harness

        tasks = [word for word in given.tasks if "=" not in word]
        if not tasks:
            raise ConfigError("harness", "no task is named", "d1lit harness gsm8k --run RUN", "E803")
        print(
            run_harness(
                tasks,
                [word for word in given.tasks if "=" in word],
                run=given.run,
                include=given.include,
                limit=given.limit,
                chat=not given.no_chat,
                output=given.output,
            )
        )
        return 0

    return guarded(act)


def verify(words: Sequence[str]) -> int:
    """`d1lit verify model=llada_8b`: regenerate what d1 published."""
    parser = _parser("verify", "Generate d1's published rows again with LLaDA's weights, and compare (docs/verify.md).")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="model=llada_8b, model.path=FOLDER, ...")
    parser.add_argument("--published", type=Path, required=True, metavar="FOLDER", help="holds TASK_128.jsonl")
    parser.add_argument("--tasks", nargs="+", default=["countdown", "math500"], metavar="TASK")
    parser.add_argument("--rows", type=int, help="first rows of each task only")
    parser.add_argument("--prompt", action="append", default=[], metavar="TASK=FILE", help="the paper's own wording")
    parser.add_argument("--run-official-code", metavar="COMMIT", help="RUN the model repository's code at this commit")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/verify"), help="default outputs/verify")
    given = parser.parse_intermixed_args(list(words))

    def act() -> int:
        from d1lit.app.verify import run_verify

        wrong = next((word for word in given.prompt if "=" not in word), None)
        if wrong is not None:
            raise ConfigError("--prompt", f"{wrong!r} is not TASK=FILE", f"--prompt {given.tasks[0]}=FILE", "E110")
        print(
            run_verify(
                given.words,
                published=given.published,
                tasks=given.tasks,
                rows=given.rows,
                prompts=dict(word.split("=", 1) for word in given.prompt),
                official_revision=given.run_official_code,
                output=given.output,
            )
        )
        return 0

    return guarded(act)


def explain(words: Sequence[str]) -> int:
    """`d1lit explain CODE`: an entry of the catalogue of errors."""
    parser = _parser("explain", "What the code at the end of an error means, and what to do.")
    parser.add_argument("code", metavar="CODE", help="such as E103")
    given = parser.parse_args(list(words))

    def act() -> int:
        print(explained(given.code))
        return 0

    return guarded(act)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "compare": (compare, "tables over the folders of several runs: means over seeds, paired tests, what differs"),
    "report": (report, "report.html of one run, or one page over several"),
    "play": (play, "how completions came to be, step by step: a page, and a GIF"),
    "chat": (chat, "talk to a run's model, watching it unmask"),
    "harness": (harness, "tasks of lm-evaluation-harness through our sampler (an extra)"),
    "verify": (verify, "generate the paper's published rows again with LLaDA's weights, and compare"),
    "doctor": (doctor, "look at this machine: what is missing for a run, and the cure"),
    "explain": (explain, "what an error's code means, and the cure"),
    "export": (export, "write a run's final model as one whole, adapters merged"),
    "consolidate": (consolidate, "write the model in a checkpoint, sharded or not, as one folder"),
    "push": (push, "upload a run's model to the hub (only with --yes)"),
}
