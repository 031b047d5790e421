"""Tables over runs: numbers against longhand, names against what was said, forms against what reads them."""

import csv
import importlib.util
import io
import json
import math
import random
import re
import statistics
from typing import Any

import pytest
from scipy import stats

from d1lit.app import commands
from d1lit.report.comparing import compare, compare_pairs, scores_by_row
from d1lit.report.runs import differing_settings, read_run, read_runs, variants
from d1lit.report.tables import Table, as_csv, as_latex, as_markdown, differences_table, pairs_table, results_table
from d1lit.statistics import wilson_interval
from tests.real_runs import ROOT, add_evaluation, copy_of, known_run, probed, real_run

T, F = True, False


def test_a_single_seed_has_the_interval_of_its_rows(tmp_path):
    (cell,) = compare([read_run(known_run(tmp_path / "a", [T, T, F, F, F]))])
    expected = wilson_interval(2, 5)
    assert (cell.accuracy.value, cell.accuracy.low, cell.accuracy.high) == (0.4, expected.low, expected.high)
    assert cell.over == "5 rows"


def test_several_seeds_have_students_interval_of_their_accuracies(tmp_path):
    shares = [[T] * k + [F] * (20 - k) for k in (8, 10, 9, 11)]
    runs = [read_run(known_run(tmp_path / str(s), right, seed=s)) for s, right in enumerate(shares)]
    (cell,) = compare(runs)
    accuracies = [0.40, 0.50, 0.45, 0.55]
    half = stats.t.ppf(0.975, 3) * statistics.stdev(accuracies) / 2
    assert cell.seeds == (0, 1, 2, 3)
    assert cell.accuracy.value == pytest.approx(0.475)
    assert cell.accuracy.low == pytest.approx(0.475 - half)
    assert cell.accuracy.high == pytest.approx(0.475 + half)
    assert cell.seconds == pytest.approx(11.5)


def test_an_interval_of_accuracies_ends_at_zero_and_one(tmp_path):
    runs = [read_run(known_run(tmp_path / str(s), right, seed=s)) for s, right in enumerate([[F, F], [T, T]])]
    (cell,) = compare(runs)
    assert (cell.accuracy.low, cell.accuracy.high) == (0.0, 1.0)


def test_pairs_count_wins_and_losses_on_equal_rows(tmp_path):
    first = known_run(tmp_path / "a", [T, F, F, F, F, F, T, T, F, F], recipe="sft")
    second = known_run(tmp_path / "b", [F, T, T, T, T, T, T, T, F, F])
    (pair,) = compare_pairs(read_runs([first, second]))
    assert (pair.first, pair.second, pair.rows) == ("sft", "d1", 10)
    assert (pair.wins, pair.losses) == (5, 1)
    assert pair.difference.value == pytest.approx(0.4)
    assert pair.p_value == pytest.approx(stats.binomtest(1, 6).pvalue)
    assert pair.difference.low < 0.4 < pair.difference.high
    assert pair.over_seeds is None


def test_pairs_over_seeds_take_each_rows_mean_and_equal_seeds(tmp_path):
    first = [
        known_run(tmp_path / f"a{s}", right, recipe="sft", seed=s) for s, right in enumerate([[T, F, F], [T, F, T]])
    ]
    second = [known_run(tmp_path / f"b{s}", right, seed=s) for s, right in enumerate([[T, T, F], [T, T, F]])]
    (pair,) = compare_pairs(read_runs(first + second))
    # Row means: sft 1, 0, 1/2 and d1 1, 1, 0.
    assert (pair.wins, pair.losses, pair.seeds) == (1, 1, 2)
    assert pair.difference.value == pytest.approx((0 + 1 - 0.5) / 3)
    assert pair.over_seeds is not None
    assert pair.over_seeds.value == pytest.approx(statistics.mean([1 / 3, 0.0]))


def test_holm_is_the_longhand_correction(tmp_path):
    rights = {"a": [T] * 12, "b": [F] * 12, "c": [T] * 7 + [F] * 5}
    pairs = compare_pairs(read_runs([known_run(tmp_path / n, r, recipe=n) for n, r in rights.items()]))
    ordered = sorted(pairs, key=lambda pair: pair.p_value)
    floor = 0.0
    for place, pair in enumerate(ordered):
        floor = max(floor, min(1.0, (3 - place) * pair.p_value))
        assert pair.p_holm == pytest.approx(floor)


def test_runs_that_differ_in_more_than_the_seed_are_not_pooled(tmp_path):
    folders = [
        known_run(tmp_path / "a", [T, F], seed=0, settings={"loss": {"beta": 0.0}}),
        known_run(tmp_path / "b", [T, T], seed=1, settings={"loss": {"beta": 0.0}}),
        known_run(tmp_path / "c", [F, F], seed=0, settings={"loss": {"beta": 0.1}}, overrides=["loss.beta=0.1"]),
    ]
    named = variants(read_runs(folders))
    assert [(name, len(group)) for name, group in named] == [("d1", 2), ("d1 (loss.beta=0.1)", 1)]
    assert differing_settings([group[0] for _, group in named]) == [("loss.beta", [0.0, 0.1])]


def test_a_seed_that_a_part_takes_from_the_run_is_no_setting(tmp_path):
    evaluation = {"seed": 0}
    own = [
        known_run(tmp_path / f"own{s}", [T], seed=s, settings={"advantage": {"seed": s}, "evaluation": evaluation})
        for s in (0, 1)
    ]
    other = known_run(tmp_path / "other", [T], seed=2, settings={"advantage": {"seed": 7}, "evaluation": evaluation})
    assert [len(group) for _, group in variants(read_runs([*own, other]))] == [2, 1]


def test_equal_words_with_other_values_get_numbers(tmp_path):
    folders = [known_run(tmp_path / str(b), [T], settings={"loss": {"beta": b}}) for b in (0.0, 0.1)]
    assert [name for name, _ in variants(read_runs(folders))] == ["d1 #1", "d1 #2"]


def test_a_value_interpolated_into_many_places_is_listed_once(tmp_path):
    folders = [
        known_run(tmp_path / str(b), [T], settings={"loss": {"beta": b}, "stages": {"grpo": {"loss": {"beta": b}}}})
        for b in (0.0, 0.1)
    ]
    runs = read_runs(folders)
    assert [key for key, _ in differing_settings(runs)] == ["loss.beta"]


def test_secrets_are_not_compared_in_the_open(tmp_path):
    folders = [known_run(tmp_path / str(i), [T], settings={"hub": {"token": f"hf_{'abcdef'[i] * 34}"}}) for i in (0, 1)]
    shown = str(differences_table(read_runs(folders)))
    assert "hf_a" not in shown
    assert "hf_b" not in shown


def test_csv_holds_every_digit(tmp_path):
    runs = read_runs([known_run(tmp_path / "a", [T, F, F])])
    (line,) = csv.DictReader(io.StringIO(as_csv(compare(runs))))
    assert float(line["accuracy"]) == 1 / 3
    assert (line["recipe"], line["stage"], line["rows"], line["seeds"]) == ("d1", "grpo", "3", "0")


def test_markdown_and_latex_have_as_many_cells_as_columns():
    table = Table("A | title_", ("name", "a_b", "50 %"), (("x|y", "1.0", "<b>"), ("z", "2.5", "&")), "Note $x$.")
    body = [line for line in as_markdown(table).splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 4 for line in body)
    assert "<b>" not in as_markdown(table)
    latex = as_latex(table)
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3
    assert all(row.replace(r"\&", "").count("&") == 2 for row in rows)
    assert r"a\_b & 50 \%" in latex
    assert "{lrl}" in latex


@pytest.mark.slow
def test_the_command_prints_the_real_runs_numbers(tmp_path, capsys):
    run = real_run()
    assert commands.compare([str(run), "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    entries = read_run(run).evaluations
    assert [line["stage"] for line in lines] == [entry["stage"] for entry in entries] == ["base", "sft", "grpo"]
    assert [float(line["accuracy"]) for line in lines] == [entry["accuracy"] for entry in entries]
    reward = [value for _, value in read_run(run).curves["grpo"]["rollout/reward"]]
    assert float(lines[-1]["rollout/reward"]) == pytest.approx(reward[-1])
    for form in ([], ["--markdown"], ["--latex"]):
        assert commands.compare([str(run), str(copy_of(run, tmp_path / f"copy{len(form)}{form[:1]}")), *form]) == 0
        assert "sudoku" in capsys.readouterr().out


STAGES = {
    "sft": ["sft"],
    "sft_more": ["sft", "sft_more"],
    "grpo": ["grpo"],
    "grpo_shuffled": ["sft", "grpo"],
    "d1": ["sft", "grpo"],
}


def study_run(folder, recipe: str, seed: int) -> None:
    """A run of experiments/recipes with cell accuracies, probes, baselines and cost drawn at random."""
    rng = random.Random(f"{recipe} {seed}")
    known_run(folder, [F] * 12, recipe=recipe, seed=seed)
    results = json.loads((folder / "results.json").read_text())
    (entry,), entries, asked = results["evaluations"], [], []
    rows = [json.loads(line) for line in (folder / entry["rows_file"]).read_text().splitlines()]
    for stage in ["base", *STAGES[recipe]]:
        right = [float(rng.random() < 0.3) for _ in rows]
        for row, good in zip(rows, right, strict=True):
            row["extra"], row["strict"]["value"] = {"cell_accuracy": rng.random()}, good
        file = f"evaluations/{stage}.jsonl"
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
        entries.append({**entry, "stage": stage, "rows_file": file, "accuracy": sum(right) / len(rows)})
        forced, passed = probed(rng.random() / 2, stage)
        forced["extra"] = {"cell_accuracy": {"mean": rng.random()}}
        passed["pass_at_k"] = {k: {"mean": rng.random(), "interval": [0.0, 1.0]} for k in ("1", "16")}
        asked += [forced, passed]
    baseline = {"n": 12, "accuracy": 0.25, "interval": [0.0, 1.0], "extra": {"cell_accuracy": {"mean": 0.4975}}}
    more = {"evaluations": entries, "probes": asked, "baselines": {"row_fill": baseline}}
    more["cost"] = {"seconds": 1.0, "flops": 2.03e12}
    (folder / "results.json").write_text(json.dumps({**results, **more}))


def markdown_tables(text: str) -> list[dict[str, dict[str, str]]]:
    """Row to column to cell, of every pipe table."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip().strip("*").replace("&lt;", "<") for cell in line.strip("|").split("|")])
        elif rows:
            head, _, *body = rows
            found.append({row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body})
            rows = []
    return found


def the_analysis() -> Any:
    """experiments/recipes/analyse.py."""
    module = importlib.util.spec_from_file_location("analyse", ROOT / "experiments" / "recipes" / "analyse.py")
    assert module is not None and module.loader is not None
    analyse = importlib.util.module_from_spec(module)
    module.loader.exec_module(analyse)
    return analyse


def test_the_studys_page_shows_what_was_found(capsys):
    the_analysis().main([str(ROOT / "experiments" / "recipes" / "results.json")])
    told = capsys.readouterr().out
    page = (ROOT / "experiments" / "recipes" / "README.md").read_text()
    lines = [line for line in told.splitlines() if line.strip()]
    assert len(lines) > 20
    assert [line for line in lines if line not in page] == []


def test_measures_by_seed_are_the_studys_own_tables(tmp_path, capsys):
    """`d1lit compare --by-seed` and experiments/recipes/analyse.py read the same numbers out of the same runs."""
    analyse = the_analysis()
    for recipe in STAGES:
        for seed in (11, 12):
            study_run(tmp_path / f"recipe={recipe},seed={seed}", recipe, seed)
    analyse.main([str(tmp_path), "--keep", str(kept := tmp_path / "kept.json")])
    told = capsys.readouterr().out
    analyse.main([str(kept)])
    assert capsys.readouterr().out == told, "what is kept has everything"
    kept.unlink()
    cells, apart, solved = markdown_tables(told)
    # Every run drew its own base here; the study's column is the sft run's, and compare takes the first it is given.
    folders = [*map(str, sorted(tmp_path.glob("*sft,*"))), *map(str, sorted(tmp_path.iterdir()))]
    assert commands.compare([*folders, "--by-seed", "--metric", "cell_accuracy", "--markdown"]) == 0
    printed = capsys.readouterr().out
    own_cells, own_solved, starts, pairs, forced, at_1, at_16, baselines, cost = markdown_tables(printed)
    for seed in ("11", "12"):
        assert {name: cells[seed][name] for name in own_cells[seed]} == own_cells[seed]
        for column in ("base", "sft", "d1"):
            assert forced[seed][column] == cells[seed][f"forced-x: {column}"]
        assert starts[seed]["d1: grpo − sft"] == apart[seed]["d1: GRPO stage - its start"]
        assert starts[seed]["grpo: grpo − base"] == apart[seed]["grpo: GRPO stage - its start"]
        for other in ("grpo_shuffled", "sft_more"):
            there = (
                turned(pairs[seed][f"{other} − d1"]) if f"{other} − d1" in pairs[seed] else pairs[seed][f"d1 − {other}"]
            )
            assert there == apart[seed][f"d1 - {other}"]
        for name in ("sft", "grpo", "d1"):
            assert float(own_solved[seed][name]) == pytest.approx(float(solved[seed][name]), abs=0.051)
            assert float(at_1[seed][name]) == pytest.approx(float(solved[seed][f"pass@1 {name}"]), abs=0.051)
            assert float(at_16[seed][name]) == pytest.approx(float(solved[seed][f"pass@16 {name}"]), abs=0.051)
    assert f"row_fill {baselines['row_fill']['cell accuracy']} % of cells" in told
    assert cost["d1"]["FLOPs"] == "2.03e+12"


def turned(shown: str) -> str:
    """A difference with its interval, the other way round."""
    value, low, high = (float(number) for number in re.findall(r"[-+][\d.]+", shown))
    return f"{-value:+.1f} [{-high:+.1f}, {-low:+.1f}]"


def test_the_same_folder_twice_counts_once():
    run = real_run()
    assert len(read_runs([run, run / ".." / run.name])) == 1


def test_unfinished_runs_are_passed_over_by_name(tmp_path, capsys):
    (tmp_path / "half").mkdir()
    finished = known_run(tmp_path / "whole", [T])
    assert commands.compare([str(tmp_path / "half"), str(finished)]) == 0
    assert "half" in capsys.readouterr().err
    assert commands.compare([str(tmp_path / "half")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Try:" in error
    assert error.count("\n") == 1


def test_a_folder_with_other_json_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"hello": 1}')
    assert commands.compare([str(tmp_path)]) == 2
    assert "is not a run's results" in capsys.readouterr().err


def test_nothing_is_written_while_comparing():
    run = real_run()
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    runs = read_runs([run])
    results_table(compare(runs))
    pairs_table(compare_pairs(runs))
    assert before == {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}


def test_a_table_never_shows_an_endless_interval(tmp_path):
    cells = compare(read_runs([known_run(tmp_path / "a", [T, F])]))
    assert not any("inf" in cell for row in results_table(cells).rows for cell in row)
    assert math.isfinite(cells[0].accuracy.low)


def test_probes_have_columns_only_where_runs_have_them(tmp_path):
    plain = read_run(known_run(tmp_path / "a", [T, F], recipe="sft"))
    runs = [
        plain,
        *(read_run(known_run(tmp_path / str(s), [T, F], seed=s, probes=probed(0.2 + s / 5))) for s in (0, 1)),
    ]
    assert not {"pass@1", "pass@4"} & set(results_table(compare([plain])).columns)
    table = results_table(compare(runs))
    places = [table.columns.index(name) for name in ("pass@1", "pass@4", "forced <reasoning>x")]
    assert [[row[place] for place in places] for row in table.rows] == [["", "", ""], ["30.0", "60.0", "30.0"]]
    lines = list(csv.DictReader(io.StringIO(as_csv(compare(runs)))))
    assert lines[0]["probes"] == ""
    assert "pass@1=0.30" in lines[1]["probes"]


def test_mixtures_are_paired_task_by_task(tmp_path):
    folders = []
    for recipe, sums, grids in (("sft", [F, F, F, T], [T, T, F]), ("d1", [T, T, T, T], [F, T, F])):
        folders.append(known_run(tmp_path / recipe, sums, recipe=recipe))
        add_evaluation(folders[-1], grids, task="grids")
        results = json.loads((folders[-1] / "results.json").read_text())
        (folders[-1] / "results.json").write_text(json.dumps({**results, "task": "unified"}))
    pairs = compare_pairs(read_runs(folders))
    assert [(pair.task, pair.rows, pair.wins, pair.losses) for pair in pairs] == [
        ("count", 4, 3, 0),
        ("grids", 3, 0, 1),
    ]


def test_a_mixtures_tasks_are_each_judged_by_their_own_grader(tmp_path):
    run = known_run(tmp_path / "a", [F, F])
    results = json.loads((run / "results.json").read_text())
    results["evaluations"][0]["grader"] = "d1"
    (run / "results.json").write_text(json.dumps(results))
    file = run / "evaluations" / "final.jsonl"
    file.write_text(file.read_text().replace('"d1": {"value": 0.0', '"d1": {"value": 1.0'))
    found = read_run(run)
    assert set(scores_by_row(found, found.evaluations[0]).values()) == {1.0}


def test_a_mixture_and_its_task_by_one_recipe_have_names_of_their_own(tmp_path):
    folders = [known_run(tmp_path / name, [T, F]) for name in ("alone", "mixed", "elsewhere")]
    add_evaluation(folders[1], [T, T], task="grids")
    for folder, task in ((folders[1], "unified"), (folders[2], "other")):
        results = json.loads((folder / "results.json").read_text())
        entries = [entry | ({"task": task} if task == "other" else {}) for entry in results["evaluations"]]
        (folder / "results.json").write_text(json.dumps({**results, "task": task, "evaluations": entries}))
    assert [name for name, _ in variants(read_runs(folders))] == ["d1 on count", "d1 on unified", "d1"]


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("config.yaml", "seed: [1, 2", "E504"),
        ("config.yaml", "just words", "E504"),
        ("overrides.json", "[", "E504"),
        ("overrides.json", "{}", "E504"),
        ("environment.json", "[]", "E504"),
        ("results.json", "\x00", "E504"),
        ("results.json", "[1]", "E504"),
        (
            "results.json",
            '{"recipe": "a", "task": "b", "model": "c", "seed": 0, "evaluations": [{"task": "b"}]}',
            "E504",
        ),
        ("results.json", '{"recipe": "a", "task": "b", "model": "c", "seed": 0, "evaluations": 3}', "E504"),
        ("evaluations/final.jsonl", "{}\n", "E507"),
        ("evaluations/final.jsonl", "not JSON\n", "E507"),
        ("evaluations/final.jsonl", "3\n", "E507"),
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_one_line(tmp_path, capsys, name, text, code):
    runs = [known_run(tmp_path / recipe, [T, F], recipe=recipe) for recipe in ("sft", "d1")]
    (runs[1] / name).write_text(text)
    for command in (commands.compare, commands.report):
        assert (
            command([*map(str, runs), *(["-o", str(tmp_path / "page.html")] if command is commands.report else [])])
            == 2
        )
        error = capsys.readouterr().err
        assert error.startswith("error: run: ")
        assert error.rstrip().endswith(f"[{code}]")
        assert error.count("\n") == 1
        assert name in error


def test_csv_by_seed_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.compare([str(known_run(tmp_path / "a", [T])), "--csv", "--by-seed"])
    assert stopped.value.code == 2
    assert "[E110]" in capsys.readouterr().err
