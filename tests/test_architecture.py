"""The lines the project keeps: who may import whom, what start-up must not import, how large a file gets."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lmtrain"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Rooms from the bottom up; a module imports from its own room and from those before it.
LAYERS = [
    ("errors", "machine", "origin", "redaction"),
    ("config", "new_folder", "run_dir"),
    ("places",),
    ("data", "model", "tracking", "hardware", "console", "distributed", "training"),
    ("reading",),
    ("store",),
    ("initial_weights", "fitting", "compiling"),
    ("feeding", "room", "step_building", "threads"),
    ("session", "inference"),
    ("run_description", "shared_run"),
    ("run", "planning", "taking_part"),
    ("sweep", "api"),
    ("commands",),
    ("__main__",),
]
# Leaves of one layer know nothing of each other, but for these.
ACROSS = {
    ("training", "data"),  # the trainer is given batches
    ("training", "distributed"),
    ("training", "model"),
    ("training", "tracking"),
}

SEAM = ("lmtrain.config", "lmtrain.sweep.sweeper", "lmtrain.__main__")  # who may know Hydra
LIGHT = [  # what start-up may import
    module
    for module in MODULES
    if module.startswith("lmtrain.config")
    or module
    in ("lmtrain", "lmtrain.__main__", "lmtrain.errors", "lmtrain.machine", "lmtrain.origin", "lmtrain.redaction")
    or module in ("lmtrain.run_dir", "lmtrain.places", "lmtrain.commands", "lmtrain.sweep", "lmtrain.sweep.sweeper")
    or module in ("lmtrain.distributed", "lmtrain.distributed.placement")
]
HEAVY = {"torch", "mlflow", "datasets", "optuna", "numpy", "pandas", "matplotlib", "sentencepiece", "safetensors"}


def imports(path: Path, *, at_start_up: bool = False) -> Iterator[str]:
    """Full names of the modules a file imports; `at_start_up`: only those that are imported with it."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: write imports in full"
                names = (f"{child.module}.{alias.name}" for alias in child.names)
                yield from (name if name in MODULES else str(child.module) for name in names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue  # for type checkers only
            elif not (at_start_up and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
                yield from walk(child)

    return walk(ast.parse(path.read_text(encoding="utf-8")))


def room(module: str) -> str:
    """`lmtrain.data.prepare` → `data`."""
    return module.split(".")[1] if "." in module else ""


def layer(name: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if name in rooms)


@pytest.mark.parametrize("module", [module for module in MODULES if room(module)])
def test_dependencies_point_one_way(module: str) -> None:
    here = room(module)
    for imported in imports(MODULES[module]):
        there = room(imported)
        if not imported.startswith("lmtrain.") or there == here or (here, there) in ACROSS:
            continue
        assert layer(there) < layer(here), f"{module} imports {imported}"


def test_leaves_do_not_import_the_trainer() -> None:
    users = {module for module, path in MODULES.items() if "lmtrain.training.trainer" in imports(path)}
    assert {room(module) for module in users} <= {"session", "shared_run", "run", "taking_part", "sweep"}


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("hydra", SEAM),
        ("hydra_plugins", SEAM),
        ("omegaconf", SEAM),
        (
            "mlflow",
            (
                *("lmtrain.tracking.mlflow", "lmtrain.store.registry"),
                *("lmtrain.inference.serving", "lmtrain.inference.served_model"),
            ),
        ),
    ],
)
def test_a_library_is_known_in_one_place(library: str, allowed: tuple[str, ...]) -> None:
    users = [module for module, path in MODULES.items() if any(name.split(".")[0] == library for name in imports(path))]
    assert not [module for module in users if not module.startswith(allowed)]


@pytest.mark.parametrize("module", LIGHT)
def test_start_up_is_light(module: str) -> None:
    """What a light module imports at its top is light as well."""
    for imported in imports(MODULES[module], at_start_up=True):
        assert imported.split(".")[0] not in HEAVY, f"{module} imports {imported}"
        assert not imported.startswith("lmtrain.") or imported in LIGHT, f"{module} imports {imported}"


@pytest.mark.parametrize("module", MODULES)
def test_files_stay_readable(module: str) -> None:
    path = MODULES[module]
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "a module says what it owns"
    assert path.stem not in ("utils", "helpers", "common", "misc")
    assert len(text.splitlines()) <= 350
