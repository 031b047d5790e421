"""The studies in experiments/: their sweeps compose, and their pages say what their committed results say."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

from d1lit.app.build import plan_run
from d1lit.app.composing import CONF, compose_jobs
from d1lit.statistics import student_quantile

HERE = Path(__file__).resolve().parents[1] / "experiments"


def loaded(file: Path) -> ModuleType:
    """A script of experiments/ as a module."""
    spec = importlib.util.spec_from_file_location(f"experiments_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


ablations = loaded(HERE / "ablations.py")
every = pytest.mark.parametrize("name", sorted(ablations.STUDIES))


def results_of(name: str) -> dict:
    return json.loads((HERE / name / "results.json").read_text())


@every
def test_the_sweep_is_what_was_run(name):
    """The arms and seeds of the YAML are those of the results, at least four seeds of each."""
    study = ablations.STUDIES[name]
    sweep = OmegaConf.load(CONF / "experiment" / f"{name}.yaml").hydra
    assert sweep.mode == "MULTIRUN"
    arms, seeds = (str(sweep.sweeper.params[key]).split(",") for key in (study.key, "seed"))
    asked = {(arm, int(seed)) for arm in arms for seed in seeds}
    assert asked == {(run["arm"], run["seed"]) for run in results_of(name)["runs"]}
    assert set(arms) == set(study.arms)
    assert len(seeds) >= 4


@pytest.mark.slow
@every
def test_the_sweep_composes(name):
    """Every arm composes and can be built; alone it would be too much for the quick tests."""
    study = ablations.STUDIES[name]
    jobs = compose_jobs("train", [f"experiment={name}", f"seed={results_of(name)['runs'][0]['seed']}"])
    assert jobs.is_multirun
    plans = [plan_run(config) for config in jobs.configs]
    assert len(plans) == len(study.arms)
    assert all(plan.stages[-1].name == study.stage for plan in plans)


@every
def test_the_page_says_what_the_results_say(name):
    """The table and the plot are written anew from results.json and must not move."""
    results = results_of(name)
    page = (HERE / name / "README.md").read_text()
    assert ablations.write_page(page, ablations.write_table(results)) == page
    assert ablations.write_plot(results) == (HERE / name / "plot.svg").read_text()
    assert f"python train.py experiment={name}" in page
    for heading in ("## What did not work", "## Hardware"):
        assert heading in page


@every
def test_arms_of_a_seed_share_their_start(name):
    """What is compared seed by seed starts from the same weights, judged on the same rows."""
    starts: dict[int, set[str]] = {}
    for run in results_of(name)["runs"]:
        if run["arm"] not in ablations.STUDIES[name].samples_otherwise:
            starts.setdefault(run["seed"], set()).add(json.dumps(run["start"]))
        lengths = {len(cells) for cells in (*run["start"].values(), *run["measures"].values())}
        assert len(lengths) == 1
    assert all(len(found) == 1 for found in starts.values())


def test_a_countdown_row_is_worth_its_reward():
    """As conf/reward/countdown.yaml pays it."""
    scale = ablations.COUNTDOWN_REWARD
    row = {"completion": "<answer>1+2</answer>", "strict": {"value": 1.0}}
    wrong = {"completion": "<answer>1+1</answer>", "strict": {"value": 0.0}}
    none = {"completion": "1+1", "strict": {"value": 0.0}}
    assert scale.percent("".join(str(scale.digit(one)) for one in (row, wrong, none, none))) == pytest.approx(27.5)


def test_runs_that_a_folder_lacks_stay(tmp_path):
    """New arms are added to a study's record where the packages are the same."""
    before = results_of("losses")
    kept = before["environment"]
    run = tmp_path / "loss=reinforce,seed=21"
    (run / "evaluations").mkdir(parents=True)
    row = {"index": 0, "extra": {"cell_accuracy": 0.5}}
    (run / "evaluations" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    entries = [{"stage": stage, "rows_file": "evaluations/rows.jsonl"} for stage in ("base", "grpo")]
    cost = {"stages": {"grpo": {"forwards": 1, "flops": 2}}}
    (run / "results.json").write_text(json.dumps({"evaluations": entries, "seed": 21, "cost": cost}))
    (run / "environment.json").write_text(json.dumps(kept))
    after = ablations.gather("losses", tmp_path, before)
    (new,) = [one for one in after["runs"] if (one["arm"], one["seed"]) == ("reinforce", 21)]
    assert new["measures"] == {"greedy": "4"}
    assert [one for one in after["runs"] if one is not new] == [
        one for one in before["runs"] if one["arm"] != "reinforce" or one["seed"] != 21
    ]
    (run / "environment.json").write_text(json.dumps(kept | {"packages": {"torch": "1.0"}}))
    with pytest.raises(AssertionError, match="other packages"):
        ablations.gather("losses", tmp_path, before)


def test_the_table_longhand(monkeypatch):
    """Two seeds of two rows, by hand: 9 and 8 of 16 cells against 4 and 5."""
    two = ablations.Study("loss", "clipped", {"clipped": "", "reinforce": ""}, ablations.GRPO, "grpo")
    monkeypatch.setitem(ablations.STUDIES, "two", two)
    runs = [
        {
            "arm": arm,
            "seed": seed,
            "start": {"greedy": "00"},
            "measures": {"greedy": cells},
            "forwards": 1,
            "flops": 2e12,
        }
        for arm, seed, cells in (
            ("clipped", 1, "22"),
            ("clipped", 2, "50"),
            ("reinforce", 1, "81"),
            ("reinforce", 2, "44"),
        )
    ]
    table = ablations.write_table({"study": "two", "runs": runs})
    (line,) = [line for line in table.splitlines() if line.startswith("| reinforce ")]
    first, second = 100 * (9 - 4) / 16, 100 * (8 - 5) / 16
    half = student_quantile(0.975, 1) * abs(first - second) / 2  # standard deviation / sqrt 2 of two values
    middle = (first + second) / 2
    assert f"| 56.2 | 50.0 | 53.1 | {middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}] | 2.00 |" in line


@pytest.mark.slow  # for its bootstraps
@pytest.mark.parametrize("name", ["papers", "papers_countdown"])
def test_the_papers_pages_say_what_was_tried_and_foretold(name, monkeypatch):
    """Rates, cosines and their plot are written anew; the rates of the sweep are the best of every recipe."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    analyse, folder = loaded(HERE / "papers" / "analyse.py"), HERE / name
    tuning, page = json.loads((folder / "tuning.json").read_text()), (folder / "README.md").read_text()
    rows = analyse.cosines(results_of(name), results_of("estimators"))
    assert analyse.write_page(page, analyse.rates_table(tuning), "rates") == page
    assert analyse.write_page(page, analyse.cosines_table(rows), "cosines") == page
    agreement = analyse.agreement_line(results_of("papers"), results_of("papers_countdown"))
    assert analyse.write_page(page, agreement, "agreement") == page
    assert analyse.plot(rows, ablations.STUDIES[name].scale.name) == (folder / "cosines.svg").read_text()
    assert tuning.keys() == ablations.STUDIES[name].arms.keys()
    configs = compose_jobs("train", [f"experiment={name}", f"seed={results_of(name)['runs'][0]['seed']}"]).configs
    assert {config.recipe.name: config.stages.grpo.optimizer.lr for config in configs} == analyse.chosen(tuning)


def test_the_unified_page_says_what_its_results_say(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    analyse, page = loaded(HERE / "unified" / "analyse.py"), (HERE / "unified" / "README.md").read_text()
    runs = results_of("unified")
    assert analyse.write_page(page, analyse.table(runs)) == page
    for task in analyse.MEASURES:
        assert runs["together"][task].keys() == runs["apart"][task].keys()


def test_the_bench_page_says_what_its_results_say():
    """Every table row of the estimators' page stands in the tables that results.json makes."""
    folder = HERE / "estimators"
    results = json.loads((folder / "results.json").read_text())
    tables = loaded(folder / "tables.py")
    main = "trained, low confidence, T 1.0"
    made = tables.tables_of(results, main)
    assert made == (folder / "tables.md").read_text()
    assert tables.plot_of(results, main) == (folder / "plot.svg").read_text()
    rows = re.findall(r"^\|.*\|$", (folder / "README.md").read_text(), re.MULTILINE)
    assert len(rows) > 35
    stray = [row for row in rows if row not in made.splitlines() and set(row) != set("|-")]
    assert not stray
