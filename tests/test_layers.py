"""Imports point down the layers, never sideways; Lightning and Hydra stay in their storeys."""

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "d1lit"

LAYERS: list[set[str]] = [
    {"errors", "types", "draws", "security", "processes"},
    {"schedules", "masking", "estimators", "advantages", "losses", "rewards", "statistics", "costs", "stopping"},
    {"models"},
    {"scoring", "sampling", "footprint"},
    {"tasks", "data", "exact", "joint_scoring"},
    {"evaluation", "quiet"},
    {"checkpoint"},
    {"strategies"},
    {"modules"},
    {"callbacks", "recipes", "report"},
    {"wording"},
    {"composing", "foreign"},
    {"components", "values"},
    {"plan"},
    {"build"},
    {"handover"},
    {"evaluating", "workloads"},
    {"fitting_memory"},
    {"estimates"},
    {"fitting"},
    {"pinning"},
    {"bases"},
    {"opening"},
    {"playing", "chatting", "handing_on", "consolidating", "doctor", "harness", "verify", "evaluate_command"},
    {"presenting"},
    {"running", "sweeps"},
    {"commands"},
    {"cli"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
HEAVY_FROM = {"lightning": LAYER["checkpoint"], "hydra": LAYER["wording"], "omegaconf": LAYER["wording"]}


def room_of(file: Path) -> str:
    """Top-level module or package of the project that a file belongs to."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


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


FILES = sorted(file for file in SOURCE.rglob("*.py") if file.name != "__init__.py" or file.parent != SOURCE)


def test_every_module_has_a_layer():
    rooms = {room_of(file) for file in FILES}
    assert rooms == set(LAYER), f"without a layer: {rooms - set(LAYER)}; no such module: {set(LAYER) - rooms}"


def test_imports_point_down():
    wrong = []
    for file in FILES:
        room = room_of(file)
        for name in imported(file):
            parts = name.split(".")
            if parts[0] != "d1lit" or len(parts) < 2 or parts[1] == room:
                continue
            if LAYER[parts[1]] >= LAYER[room]:
                above, below = f"{room} (layer {LAYER[room]})", f"{parts[1]} (layer {LAYER[parts[1]]})"
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
