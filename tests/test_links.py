"""Relative links and keys of the pages lead somewhere, headings included; the site's navigation has every page."""

import re
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from d1lit.app.composing import compose_jobs

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("experiments/*/README.md"),
        *ROOT.glob("benchmarks/README.md"),
    ]
)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`", lambda code: code[0].replace("[", " "), text)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links: lower case, words joined by hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower())) for heading in headings}


def links(page: Path) -> list[str]:
    return [link for link in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", link)]


def nav_pages(node: object) -> list[str]:
    if isinstance(node, str):
        return [node]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return [page for child in children for page in nav_pages(child)]


def test_the_pages_link_to_each_other():
    assert sum(len(links(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert ROOT in target.parents, f"{page.name}: {link} leaves the repository"
        if page.is_relative_to(ROOT / "docs"):
            assert target.is_relative_to(ROOT / "docs"), f"{page.name}: {link} leaves the site"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: no heading {anchor!r} in {target.name}"


def test_the_navigation_has_every_page_once():
    nav = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(
        page.relative_to(ROOT / "docs").as_posix()
        for kind in ("*.md", "*.ipynb")
        for page in (ROOT / "docs").rglob(kind)
    )


KEY = re.compile(r"`(\+?)([a-z_0-9]+(?:\.[a-z_0-9]+)+)=[^`]*`")
STANDS_FOR_ANY = {"key.sub"}
"""A word that stands for any key."""


@pytest.fixture(scope="module")
def configurations() -> list[DictConfig]:
    """Between them they have every key that a page may name."""
    asked = [
        ("train", ["recipe=d1"]),
        ("train", ["recipe=d1", "model=llada_8b"]),
        ("train", ["recipe=vrpo", "task=countdown"]),
        ("train", ["recipe=sft", "task=code"]),
        ("train", ["recipe=d1", "task=unified"]),
        ("train", ["recipe=spg"]),
        ("evaluate", ["task=sudoku"]),
    ]
    return [compose_jobs(name, words).configs[0] for name, words in asked]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_key_of_the_prose_is_there(page, configurations):
    """What is typed as `a.b=value` is taken as it stands; what is typed as `+a.b=value` is not there yet."""
    for plus, key in KEY.findall(page.read_text(encoding="utf-8")):
        if key.startswith("hydra.") or key in STANDS_FOR_ANY:
            continue
        *above, last = key.split(".")
        nodes = [OmegaConf.select(config, ".".join(above)) for config in configurations]
        has = [last in node for node in nodes if isinstance(node, DictConfig)]
        assert has, f"{page.name}: nothing has {key}"
        assert any(has) is (plus == ""), f"{page.name}: {plus}{key}"
