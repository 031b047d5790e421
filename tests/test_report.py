"""report.html: whole, self-contained, safe whatever a model writes; its charts say what the numbers say."""

import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d1lit.app import commands
from d1lit.report.curves import HEIGHT, WIDTH, Series, chart, smoothed, thinned, ticks
from d1lit.report.events import event_files, read_scalars
from d1lit.report.hparams import final_metrics, write_hparams
from d1lit.report.markup import tag, text, visible
from d1lit.report.page import comparison_page, run_page
from d1lit.report.runs import FINAL_LOG, read_run, read_runs
from d1lit.report.sections import accuracy_by_flops, by_spending
from tests.real_runs import add_evaluation, copy_of, known_run, probed, real_run

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\x00\x01\x1b[31m",
    "\u202eevil\u2066",
    "\ud800 half a pair",
    '"><svg/onload=alert(1)>',
    "]]>--><!--",
    "é€🀄" * 10,
    "x" * 500_000,
)
VOID = {"br", "input", "meta", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Checks that elements close in order, and collects what matters."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ids += [str(value) for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def reaches_out(page: str) -> list[str]:
    """Whatever of a page could ask anything outside of it."""
    seen = Page(page)
    wrong = [f"{name} {key}={value}" for name, attrs in seen.elements for key, value in attrs.items()
             if key in ("src", "srcset", "data", "action", "poster", "background")
             or (key == "href" and not str(value).startswith("#")) or key.startswith("on")]  # fmt: skip
    wrong += [name for name, _ in seen.elements if name in ("link", "iframe", "object", "embed", "base", "img")]
    return wrong + re.findall(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", page)


def test_the_page_of_a_real_run_is_whole_and_alone():
    page = run_page(read_run(real_run()))
    seen = Page(page)
    assert seen.ids == ["main", "accuracy", "curves", "player", "samples", "rows", "cost", "repeat"]
    assert reaches_out(page) == []
    assert seen.count("script") == 1
    assert len(page.encode()) < 3_000_000
    policy = next(a["content"] for name, a in seen.elements if name == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in str(policy)
    assert seen.count("svg") >= 6


def test_the_run_itself_wrote_that_page():
    run = real_run()
    assert (run / "report.html").read_text(encoding="utf-8") == run_page(read_run(run))


def test_the_page_of_several_runs_is_whole_and_alone(tmp_path):
    sft = copy_of(real_run(), tmp_path / "sft")
    results = json.loads((sft / "results.json").read_text())
    (sft / "results.json").write_text(json.dumps({**results, "recipe": "sft", "seed": 1}))
    page = comparison_page(read_runs([real_run(), sft]))
    assert Page(page).ids == ["main", "accuracy", "pairs", "curves", "cost", "rows", "differences", "runs"]
    assert reaches_out(page) == []


def test_no_text_of_a_model_becomes_part_of_the_page(tmp_path):
    a = known_run(tmp_path / "a", [True] * len(HOSTILE), completions=HOSTILE)
    b = known_run(tmp_path / "b", [False] * len(HOSTILE), completions=HOSTILE, recipe="<i>sft</i>")
    (a / "samples.jsonl").write_text(
        "".join(
            json.dumps({"stage": t, "question": t, "answer": t, "completion": t, "reward": 0.5, "advantage": 0.1,
                        "parts": {t: {"value": 1.0, "outcome": "ok", "parsed": t}}}) + "\n"
            for t in HOSTILE
        )
    )  # fmt: skip
    for page in (run_page(read_run(a)), comparison_page(read_runs([a, b]))):
        page.encode("utf-8")
        assert len(page) < 3_000_000
        seen = Page(page)
        assert seen.count("script") == 1
        assert seen.count("i") == 0
        assert reaches_out(page) == []
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
        assert "more characters]" in page


@given(st.text(st.characters(exclude_categories=())))
def test_escaped_text_holds_no_markup_and_comes_back(value):
    seen = Page(tag("p", value))
    assert [name for name, _ in seen.elements] == ["p"]
    assert "".join(seen.words) == visible(value)
    text(value).encode("utf-8")


@given(st.text(st.characters(exclude_categories=())))
def test_escaped_attributes_stay_attributes(value):
    seen = Page(tag("p", "x", title=value))
    assert list(seen.elements[0][1].items()) == [("title", visible(value))]


FINITE = st.floats(-1e6, 1e6)


@given(st.lists(FINITE, min_size=1, max_size=600))
def test_every_point_is_drawn_inside_the_chart(values):
    figure = chart("title", [Series("a", list(enumerate(values)), 0)])
    assert figure is not None
    drawn = [tuple(map(float, p.split(","))) for line in re.findall(r'points="([^"]+)"', figure) for p in line.split()]
    assert drawn
    assert all(0 <= x <= WIDTH and -0.1 <= y <= HEIGHT for x, y in drawn)


def test_what_cannot_be_drawn_is_left_out():
    assert chart("t", [Series("a", [(0, math.nan), (1, math.inf)], 0)]) is None
    assert chart("t", []) is None
    figure = chart("t", [Series("a", [(0, math.nan), (1, 2.0), (2, 3.0)], 0)])
    assert figure is not None
    assert "nan" not in figure


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_cover_their_range_in_few_even_steps(low, width):
    found = ticks(low, low + width, 5)
    slack = 1e-6 * max(1.0, abs(low), width)
    assert found[0] <= low + slack
    assert found[-1] >= low + width - slack
    assert 2 <= len(found) <= 9


def test_smoothing_keeps_straight_lines_and_ends():
    line = [(float(i), 2.0 * i + 1) for i in range(100)]
    assert all(y == pytest.approx(2 * x + 1) for x, y in smoothed(line))
    noisy = [(float(i), float(i % 7)) for i in range(100)]
    assert smoothed(noisy)[0] == noisy[0]
    assert smoothed(noisy)[-1] == noisy[-1]


def test_thinning_keeps_the_mean():
    line = [(float(i), math.sin(i)) for i in range(960)]
    found = thinned(line, 240)
    assert len(found) == 240
    assert sum(y for _, y in found) / 240 == pytest.approx(sum(y for _, y in line) / 960)


def test_reward_at_equal_compute_counts_all_that_was_spent_so_far(tmp_path):
    run = read_run(known_run(tmp_path / "a", [True]))
    run.__dict__["curves"] = {
        "base": {"time/update_s": [(0, 99.0)], "cost/flops": [(0, 9e9)]},
        "sft": {"time/update_s": [(0, 4.0), (1, 6.0)], "cost/flops": [(0, 50.0)]},
        "grpo": {
            "time/rollout_s": [(0, 2.0), (1, 3.0)],
            "time/update_s": [(0, 1.0)],
            "cost/flops": [(0, 100.0), (1, 200.0)],
            "cost/update_flops": [(0, 1.0)],
            "rollout/reward": [(0, 0.1), (1, 0.4)],
        },
    }
    assert by_spending(run, "grpo", ("time/",)) == [(13.0, 0.1), (16.0, 0.4)]
    assert by_spending(run, "grpo", ("cost/flops",)) == [(150.0, 0.1), (350.0, 0.4)]
    assert accuracy_by_flops(run, "count") == [(350.0, 100.0)]


def test_pages_draw_reward_against_flops_and_seconds(tmp_path):
    other = copy_of(real_run(), tmp_path / "other")
    results = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps({**results, "recipe": "other"}))
    for page in (run_page(read_run(real_run())), comparison_page(read_runs([real_run(), other]))):
        axes = [attrs.get("data-x") for name, attrs in Page(page).elements if name == "figure"]
        assert {"FLOPs since the base", "seconds of rollouts and updates"} <= set(axes)


def test_wins_and_losses_are_the_rows_that_changed(tmp_path):
    a = known_run(tmp_path / "a", [True, True, False, False, False], recipe="sft")
    b = known_run(tmp_path / "b", [True, False, True, True, False])
    words = "".join(Page(comparison_page(read_runs([a, b]))).words)
    assert "Won: 2 of 5 rows" in words
    assert "Lost: 1 of 5 rows" in words
    assert "Not solved by either: 1 of 5 rows" in words


def test_the_page_shows_what_the_model_does_when_asked_otherwise(tmp_path):
    plain = known_run(tmp_path / "a", [True])
    assert "Asked otherwise" not in run_page(read_run(plain))
    asked = known_run(tmp_path / "b", [True], probes=probed(0.25))
    words = Page(run_page(read_run(asked))).words
    assert words[words.index("pass@4") :][:2] == ["pass@4", "50.0"]
    assert words[words.index("forced <reasoning>x") :][:2] == ["forced <reasoning>x", "25.0"]


def test_a_mixture_is_shown_task_by_task(tmp_path):
    run = known_run(tmp_path / "a", [True, True, False])
    add_evaluation(run, [False, False, False], stage="base")
    add_evaluation(run, [True, False], stage="base", task="grids")
    add_evaluation(run, [False, True], task="grids")
    words = "".join(Page(run_page(read_run(run))).words)
    assert "Won: 2 of 3 rows" in words
    assert "Won: 1 of 2 rows" in words
    assert "Lost: 1 of 2 rows" in words
    assert "of 0 rows" not in words
    assert "Final accuracy in per cent: count 66.7, grids 50.0." in words
    other = known_run(tmp_path / "b", [False, True, True], recipe="sft")
    add_evaluation(other, [True, True], task="grids")
    words = "".join(Page(comparison_page(read_runs([run, other]))).words)
    assert "sft against d1 on count" in words
    assert "sft against d1 on grids" in words
    metrics = final_metrics(read_run(run))
    assert metrics["final/accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["final/accuracy/grids/grpo"] == 0.5


def test_the_report_command_says_where_the_page_is(tmp_path, capsys):
    runs = [known_run(tmp_path / name, [True, False], recipe=name) for name in ("a", "b")]
    assert commands.report([str(runs[0])]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "report.html")
    assert commands.report([*map(str, runs), "--output", str(tmp_path / "c.html")]) == 0
    assert "Runs compared" in (tmp_path / "c.html").read_text()


def test_a_run_without_logs_rows_or_samples_still_has_a_page(tmp_path):
    run = known_run(tmp_path / "a", [True])
    shutil.rmtree(run / "evaluations")
    (run / "overrides.json").unlink()
    words = "".join(Page(run_page(read_run(run))).words)
    assert "This run kept no event files" in words


# --------------------------------------------------------------------------------------------------------- TensorBoard


def test_final_metrics_stand_once_and_match_the_results():
    run = real_run()
    scalars = read_scalars(run / "logs" / FINAL_LOG)
    last = json.loads((run / "results.json").read_text())["evaluations"][-1]
    assert [value for _, value in scalars["final/accuracy"]] == [pytest.approx(last["accuracy"])]
    assert len(scalars["final/accuracy"]) == 1, "no extra point at step 0"
    assert "final/reward" in scalars


def test_tensorboard_finds_settings_metrics_and_layout():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.plugins.hparams.plugin_data_pb2 import (
        HParamsPluginData,  # pyright: ignore[reportAttributeAccessIssue]
    )

    accumulator = EventAccumulator(str(real_run() / "logs" / FINAL_LOG)).Reload()
    content = accumulator.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["recipe"].string_value == "d1"
    assert start.hparams["seed"].number_value == 0
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert "final/accuracy" in {info.name.tag for info in experiment.metric_infos}
    (event,) = accumulator.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert "rollout/reward" in charts["rewards"]
    assert "train/clip_fraction" in charts["KL and clip fraction"]


def test_tensorboard_has_samples_as_text():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = read_run(real_run())
    accumulator = EventAccumulator(str(real_run() / "logs" / "grpo"), size_guidance={"tensors": 0}).Reload()
    written = [event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors("samples/grpo/text_summary")]
    assert written
    assert written[0].startswith("| prompt | completion | parsed | gold | reward | parts |")
    sampled = [row for row in run.samples if row["stage"] == "grpo"]
    assert sum(text.count("\n") - 1 for text in written) == len(sampled)
    assert all(any(row["question"].replace("\n", " ⏎ ") in text for text in written) for row in sampled)


def test_writing_the_final_metrics_again_replaces_them(tmp_path):
    run = copy_of(real_run(), tmp_path / "run")
    place = write_hparams(run)
    assert len(event_files(place)) == 1
    assert len(read_scalars(place)["final/accuracy"]) == 1


# ------------------------------------------------------------------------------------------------------------- browser


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    return found


WIDTHS = (1280, 390)
"""Of a desk's window and a phone's, in pixels."""
NARROWEST = 500
"""No window of Chromium is narrower; a frame in it can be."""


def opened(page: Path, width: int = 1280, extra: tuple[str, ...] = (), virtual_time: bool = True) -> tuple[str, str]:
    """The page's elements after its scripts ran, and what the browser said; in a narrow window, the frame's around it."""
    if width < NARROWEST:
        text = html.escape(page.read_text(encoding="utf-8"))
        page = page.with_name(f"framed-{page.name}")
        frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{text}"></iframe>'
        page.write_text(f'<!doctype html><meta charset="utf-8">{frame}', encoding="utf-8")
        width = 1280
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    words += ["--virtual-time-budget=3000"] if virtual_time else []
    words += [
        "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}",
        *extra,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run([chromium(), *words], capture_output=True, text=True, timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def pages(tmp_path: Path) -> list[Path]:
    run = real_run()
    other = known_run(tmp_path / "other", [True, False] * 10, completions=[HOSTILE[i % 8] for i in range(20)])
    found = [tmp_path / "one.html", tmp_path / "two.html"]
    found[0].write_text(run_page(read_run(run)), encoding="utf-8")
    found[1].write_text(comparison_page(read_runs([run, other])), encoding="utf-8")
    return found


def driven(page: Path, script: str, width: int = 1280) -> Any:
    """What a script that runs in the page, once it is loaded, leaves in `found`."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    words = f"(async () => {{ let found; {script}; top.document.title = 'FOUND' + JSON.stringify(found); }})();"
    file = page.with_name(f"driven-{page.name}")
    file.write_text(text.replace("</body>", f"<script>{words}</script></body>"), encoding="utf-8")
    elements, said = opened(file, width)
    title = re.search(r"<title>FOUND(.*?)</title>", elements, re.DOTALL)
    assert title is not None, said
    return json.loads(html.unescape(title[1]))


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_opens_the_pages_without_a_word(tmp_path, width):
    chromium()
    for page in pages(tmp_path):
        _, said = opened(page, width)
        assert "CONSOLE" not in said, said
        assert driven(page, "found = document.querySelectorAll('figure .cross').length", width) > 0


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_but_tables_is_wider_than_the_window(tmp_path, width):
    chromium()
    for page in pages(tmp_path):
        script = "for (const d of document.querySelectorAll('details')) d.open = true;"
        script += "found = [innerWidth, document.documentElement.scrollWidth]"
        inner, content = driven(page, script, width)
        assert inner == width
        assert content <= width


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_the_pages_open_within_a_second(tmp_path, width):
    """From the start of the navigation until everything is loaded, run and laid out, by the browser's own clock."""
    chromium()
    script = "top.document.title = 'OPEN' + (document.body.getBoundingClientRect().height && performance.now())"
    for page in pages(tmp_path):
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
        page.write_text(
            text.replace("</body>", f"<script>addEventListener('load', () => {{ {script} }})</script></body>"),
            encoding="utf-8",
        )
        elements, _ = opened(page, width, virtual_time=False)
        found = re.search(r"<title>OPEN([\d.]+)</title>", elements)
        assert found is not None
        print(f"{page.name}, {len(text) / 1e3:.0f} kB, {width} pixels: opened in {float(found[1]):.0f} ms")
        assert float(found[1]) < 1000


@pytest.mark.slow
def test_printed_pages_are_whole(tmp_path):
    """On paper: no controls, completions finished, short lists open; and the browser makes a PDF of it."""
    chromium()
    script = """
      for (const s of document.querySelectorAll(".scrub")) { s.value = 0; s.dispatchEvent(new Event("input")); }
      dispatchEvent(new Event("beforeprint"));
      const shown = (name) => [...document.querySelectorAll(name)].filter((e) => getComputedStyle(e).display !== "none").length;
      const closed = [...document.querySelectorAll("details")].filter((d) => !d.open && d.querySelectorAll("*").length < 400);
      found = [shown(".controls"), shown("nav"), shown(".readout"), document.querySelectorAll(".pane .masked").length, closed.length]
    """
    for page in pages(tmp_path):
        pdf = page.with_suffix(".pdf")
        opened(page, extra=(f"--print-to-pdf={pdf}",))
        assert pdf.read_bytes()[:5] == b"%PDF-"
        page.write_text(page.read_text(encoding="utf-8").replace("@media print", "@media all"), encoding="utf-8")
        assert driven(page, script) == [0, 0, 0, 0, 0]


@pytest.mark.slow
def test_charts_and_tokens_are_read_by_keyboard(tmp_path):
    chromium()
    script = """
      const press = (e, key) => e.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
      const svg = document.querySelector("figure.chart svg"), pane = document.querySelector(".pane");
      const said = (e) => e.querySelector(".readout").textContent;
      found = [svg.tabIndex, pane.tabIndex];
      press(svg, "Home"); found.push(said(svg.parentElement));
      press(svg, "ArrowRight"); found.push(said(svg.parentElement));
      press(svg, "Escape"); found.push(said(svg.parentElement).trim());
      press(pane, "ArrowRight"); press(pane, "End"); found.push(said(pane));
      press(pane, "Home"); found.push(said(pane));
    """
    found = driven(pages(tmp_path)[0], script)
    assert found[:2] == [0, 0]
    assert found[2].startswith("update 0: ")
    assert found[3].startswith("update 1: ")
    assert found[4] == ""
    assert re.match(r"token \d\d, ", found[5])
    assert re.match(r"token 1, .*: (fixed at step \d+.*, confidence [\d.e-]+|never reached)", found[6], re.DOTALL)


@pytest.mark.slow
def test_the_player_takes_tokens_away_and_gives_them_back(tmp_path):
    """The page's own script, driven inside the browser: at step 0 everything is masked, at the end nothing is."""
    chromium()
    script = """
      const count = () => document.querySelectorAll(".pane .t.masked").length;
      const all = document.querySelectorAll(".pane .t").length;
      found = [count()];
      for (const s of document.querySelectorAll(".scrub")) { s.value = 0; s.dispatchEvent(new Event("input")); }
      found.push(count() === all);
      for (const s of document.querySelectorAll(".scrub")) { s.value = s.max; s.dispatchEvent(new Event("input")); }
      found.push(count());
    """
    assert driven(pages(tmp_path)[0], script) == [0, True, 0]


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(tmp_path, scheme, width):
    """D1LIT_AXE names axe.min.js (npm install axe-core, outside the repository)."""
    chromium()
    axe = os.environ.get("D1LIT_AXE")
    if axe is None or not Path(axe).is_file():
        pytest.skip("D1LIT_AXE does not name axe-core's axe.min.js")
    script = (
        Path(axe).read_text(encoding="utf-8")
        + """;
      const r = await axe.run(document, {resultTypes: ["violations"]});
      found = r.violations.map((v) => [v.impact, v.id, v.nodes[0].html.slice(0, 200)]);
    """
    )
    for page in pages(tmp_path):
        if scheme == "dark":
            text = page.read_text(encoding="utf-8").replace("(prefers-color-scheme: dark)", "all")
            page.write_text(text, encoding="utf-8")
        faults = driven(page, script, width)
        print(f"{page.name} {scheme} {width}: {faults}")
        assert [fault for fault in faults if fault[0] in ("serious", "critical")] == []
