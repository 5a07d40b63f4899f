"""The package as a whole: importing costs nothing, and imports go down the floors, one way only.

Every module is found in the tree; what is written here is the order of the folders (docs in
CONTRIBUTING.md, "Layout"). An import for types counts like any other.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

import fastppo

ROOT = pathlib.Path(__file__).parent.parent

# From the top down. A module imports what is in its own folder or on a floor below, never what is
# above or beside it on the same floor.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("benchmarks",),
    ("profiling",),
    ("ppo",),
    ("rollout",),
    ("rewards",),
    ("training",),
    ("models",),
    ("data",),
    ("checkpoint", "reporting"),
    ("ops",),
    ("options",),  # a module beside the folders
)
# Who may import these. ops calls _C for what torch cannot express well on a CPU, such as a
# recurrence over time: _C is to the CPU what fastppo_kernels is to a GPU, and both stay behind the
# one layer that dispatches by device. data packs with it. `fastppo profile` prints what the kernels
# compile to.
DOORS = {
    "fastppo_kernels": ("fastppo_kernels", "fastppo.ops", "fastppo.cli.profile"),
    "fastppo._C": ("fastppo.data", "fastppo.ops"),
}

Graph = dict[str, set[str]]


def python_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    files = {}
    for base, package in ((root, "fastppo"), (root / "kernels", "fastppo_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported(tree: ast.Module, module: str, is_package: bool, known: set[str]) -> set[str]:
    """The modules among `known` that a module imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                above = parents[: len(parents) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if base == "fastppo" and alias.name in fastppo._PUBLIC:
                    name = fastppo._PUBLIC[alias.name]
                found.add(name if name in known else base)
    return found & known - {module}


def import_graph(root: pathlib.Path) -> Graph:
    """Module → the modules of this project it imports."""
    files = python_files(root)
    known = {*files, "fastppo._C"}
    graph: Graph = {"fastppo._C": set()}
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[module] = imported(tree, module, path.name == "__init__.py", known)
    graph["fastppo"] = set()  # its public names are loaded when they are asked for
    return graph


def belongs(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def folder(module: str) -> str:
    """The folder of a module of fastppo; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def wrong_arrows(graph: Graph) -> list[str]:
    """Every import that goes up or sideways, or through a door that is not the module's."""
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    found = []
    for module, targets in graph.items():
        for target in sorted(targets):
            for door, allowed in DOORS.items():
                if belongs(target, door) and not any(belongs(module, name) for name in allowed):
                    found.append(f"{module} -> {target}")
            if not (belongs(module, "fastppo") and belongs(target, "fastppo")):
                continue
            here, there = folder(module), folder(target)
            known = {here, there} <= floor.keys()
            if known and here != there and floor[there] <= floor[here]:
                found.append(f"{module} -> {target}")
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules that import each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in graph[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            at = stack.index(module)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def test_every_folder_has_a_floor() -> None:
    modules = [name for name in python_files(ROOT) if belongs(name, "fastppo") and "." in name]
    found, placed = {folder(name) for name in modules}, {n for names in FLOORS for n in names}
    assert found == placed, "FLOORS in this file has each folder once, on the floor it stands on"


def test_imports_go_down() -> None:
    graph = import_graph(ROOT)
    assert wrong_arrows(graph) == []
    assert circles(graph) == []
    assert "fastppo._C" in graph["fastppo.data.sequences"]  # the walk sees what is there
    assert "fastppo.ops" in graph["fastppo.ppo.advantages"]


@pytest.mark.parametrize(
    ("module", "source", "arrow"),
    [
        ("data/x", "import fastppo.ppo.step", "fastppo.data.x -> fastppo.ppo.step"),
        ("ops/gae", "from fastppo import PPOStep", "fastppo.ops.gae -> fastppo.ppo.step"),
        (
            "ops/gae",
            "def f():\n    from ..ppo.step import x",
            "fastppo.ops.gae -> fastppo.ppo.step",
        ),
        (
            "checkpoint/x",
            "import fastppo.reporting",
            "fastppo.checkpoint.x -> fastppo.reporting",
        ),
        ("ppo/step", "from fastppo import _C", "fastppo.ppo.step -> fastppo._C"),
        ("ppo/step", "import fastppo_kernels.gae", "fastppo.ppo.step -> fastppo_kernels.gae"),
        (
            "data/x",
            "if TYPE_CHECKING:\n    from fastppo.ppo.step import PPOStep",
            "fastppo.data.x -> fastppo.ppo.step",
        ),
    ],
)
def test_a_wrong_arrow_is_found(
    tmp_path: pathlib.Path, module: str, source: str, arrow: str
) -> None:
    (tmp_path / "kernels" / "fastppo_kernels").mkdir(parents=True)
    (tmp_path / "kernels" / "fastppo_kernels" / "gae.py").write_text("")
    for name in ("__init__", "ppo/step", "data/x", "ops/gae", "reporting/__init__"):
        path = tmp_path / "fastppo" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert wrong_arrows(import_graph(tmp_path)) == []
    added = tmp_path / "fastppo" / f"{module}.py"
    added.parent.mkdir(exist_ok=True)
    added.write_text(source + "\n")
    assert wrong_arrows(import_graph(tmp_path)) == [arrow]


def test_a_circle_is_found(tmp_path: pathlib.Path) -> None:
    for name, source in (
        ("a", "from fastppo.ops import b"),
        ("b", "import fastppo.ops.c"),
        ("c", ""),
    ):
        path = tmp_path / "fastppo" / "ops" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert circles(import_graph(tmp_path)) == []
    (tmp_path / "fastppo" / "ops" / "c.py").write_text("if TYPE_CHECKING:\n    from .a import x\n")
    assert circles(import_graph(tmp_path)) == [["fastppo.ops.a", "fastppo.ops.b", "fastppo.ops.c"]]


def test_kernels_never_import_fastppo() -> None:
    for module, targets in import_graph(ROOT).items():
        if belongs(module, "fastppo_kernels"):
            assert not [t for t in targets if belongs(t, "fastppo")], module


def test_importing_fastppo_imports_nothing_heavy() -> None:
    program = (
        "import sys, fastppo\n"
        "heavy = {'torch', 'transformers', 'numpy', 'triton', 'matplotlib', 'rich', 'tyro'}\n"
        "print(sorted(heavy & set(sys.modules)), fastppo.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"[] {fastppo.__version__}\n"


def test_public_names_load() -> None:
    for name in fastppo.__all__:
        assert getattr(fastppo, name) is getattr(fastppo, name)
        assert name in dir(fastppo)
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainr'; public names"):
        _ = fastppo.PPOTrainr


def test_what_was_printed_once_says_where_it_is() -> None:
    with pytest.raises(ImportError, match=r"import PackedEngine from fastppo\.rollout"):
        importlib.import_module("fastppo.rollout.transformers")
    with pytest.raises(AttributeError, match="no attribute 'TransformersEngine'"):
        _ = importlib.import_module("fastppo.rollout").TransformersEngine


def test_one_version() -> None:
    assert importlib.metadata.version("fastppo") == fastppo.__version__
