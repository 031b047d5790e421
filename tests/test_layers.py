"""Imports point down the layers, never sideways; Lightning and Hydra stay in their storeys."""

import ast
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "d1lit"

LAYERS: list[set[str]] = [
    {"errors", "types", "draws", "security", "processes", "attention"},
    {"schedules", "masking", "estimators", "advantages", "losses", "rewards", "statistics", "costs", "stopping"},
    {"models"},
    {"scoring", "sampling", "footprint"},
    {"tasks", "data", "exact", "joint_scoring"},
    {"evaluation", "quiet"},
    {"checkpoint"},
    {"strategies"},
    {"modules"},
    {"callbacks", "recipes", "report"},
    {"app.config_errors"},
    {"app.composing", "app.foreign"},
    {"app.components", "app.config_checks"},
    {"app.plan"},
    {"app.build"},
    {"app.run_policy"},
    {"app.task_evaluator", "app.workloads"},
    {"app.micro_batches"},
    {"app.dry_run"},
    {"app.trainer"},
    {"app.pinning"},
    {"app.tiny_base"},
    {"app.open_run"},
    {"app.export"},
    {
        "app.playing",
        "app.chatting",
        "app.consolidating",
        "app.doctor",
        "app.harness",
        "app.verify",
        "app.evaluate_command",
    },
    {"app.artifacts"},
    {"app.running", "app.sweeps"},
    {"app.refusing"},
    {"app.commands"},
    {"app.cli"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
HEAVY_FROM = {
    "lightning": LAYER["checkpoint"],
    "hydra": LAYER["app.config_errors"],
    "omegaconf": LAYER["app.config_errors"],
}


def room_of(file: Path) -> str:
    """Top-level module or package that a file belongs to; in `app` every module is a room of its own."""
    return room_named(file.relative_to(SOURCE).with_suffix("").parts)


def room_named(parts: Sequence[str]) -> str:
    """The same of a module's name without `d1lit`."""
    return ".".join(parts[:2]) if parts[0] == "app" else parts[0]


def imported(file: Path) -> set[str]:
    """Dotted names of all modules a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
    return names


FILES = sorted(
    file for file in SOURCE.rglob("*.py") if file not in (SOURCE / "__init__.py", SOURCE / "app" / "__init__.py")
)


def test_every_module_has_a_layer():
    rooms = {room_of(file) for file in FILES}
    assert rooms == set(LAYER), f"without a layer: {rooms - set(LAYER)}; no such module: {set(LAYER) - rooms}"


def test_imports_point_down():
    wrong = []
    for file in FILES:
        room = room_of(file)
        for name in imported(file):
            parts = name.split(".")
            if parts[0] != "d1lit" or len(parts) < 2 or (other := room_named(parts[1:])) == room:
                continue
            if LAYER[other] >= LAYER[room]:
                above, below = f"{room} (layer {LAYER[room]})", f"{other} (layer {LAYER[other]})"
                wrong.append(f"{above} imports {below} in {file.name}")
    assert not wrong, "\n".join(wrong)


def test_lightning_and_hydra_stay_in_their_storeys():
    wrong = [
        f"{file.relative_to(SOURCE)} imports {name}"
        for file in FILES
        for name in imported(file)
        if LAYER[room_of(file)] < HEAVY_FROM.get(name.split(".")[0], 0)
    ]
    assert not wrong, "\n".join(wrong)


def test_layer_one_needs_no_network_library():
    wrong = [
        f"{file.relative_to(SOURCE)} imports {name}"
        for file in FILES
        for name in imported(file)
        if LAYER[room_of(file)] <= 1 and name.split(".")[0] in {"transformers", "peft", "datasets", "torchmetrics"}
    ]
    assert not wrong, "\n".join(wrong)
