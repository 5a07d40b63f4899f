"""The package as a whole: importing costs nothing, and modules depend on each other one way only.

The direction: cli → trainer → {step, rollout, rewards, checkpoint, metrics},
step → {policy, packing, ops}, ops → fastppo_kernels, {packing, ops} → _C.
"""

from __future__ import annotations

import ast
import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

import fastppo

ROOT = pathlib.Path(__file__).parent.parent

# A module (with its submodules) never reaches, through any chain of imports, another one on its
# own level or above. Modules not named here serve one of these and are followed on the way.
LEVELS = (
    ("fastppo_kernels", "fastppo._C"),
    ("fastppo.packing", "fastppo.ops"),
    ("fastppo.policy",),
    (
        "fastppo.step",
        "fastppo.rollout",
        "fastppo.rewards",
        "fastppo.checkpoint",
        "fastppo.metrics",
    ),
    ("fastppo.trainer",),
    ("fastppo.cli",),
)
# Who may import these directly. ops calls _C for what torch cannot express well on a CPU, such as a
# recurrence over time: _C is to the CPU what fastppo_kernels is to a GPU, and both stay behind the
# one layer that dispatches by device. profile prints what the kernels compile to.
DOORS = {
    "fastppo_kernels": ("fastppo_kernels", "fastppo.ops", "fastppo.profile"),
    "fastppo._C": ("fastppo.packing", "fastppo.ops"),
}

Graph = dict[str, set[str]]


def python_files(root: pathlib.Path) -> dict[str, pathlib.Path]:
    files = {}
    for base, package in ((root, "fastppo"), (root / "kernels", "fastppo_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported_names(tree: ast.Module, module: str, is_package: bool) -> set[str]:
    """Absolute names of everything a module imports at run time, wherever the statement stands."""
    typing_only = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.unparse(guard.test)
        for statement in guard.body
        for node in ast.walk(statement)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                above = parents[: len(parents) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def import_graph(root: pathlib.Path, public: dict[str, str]) -> Graph:
    """Module → the modules of this project it imports; `public` are fastppo's lazy names."""
    files = python_files(root)
    known = set(files) | {"fastppo._C"}
    graph: Graph = {"fastppo._C": set()}
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = imported_names(tree, module, path.name == "__init__.py")
        lazy = {public[n.removeprefix("fastppo.")] for n in names if n[8:] in public}
        graph[module] = (names | lazy) & known - {module}
    return graph


def belongs(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def reversed_arrows(graph: Graph) -> list[str]:
    """Every chain of imports that goes up or sideways, as "a -> b -> c"."""
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    found = []
    for start, height in level.items():
        forbidden = [n for n, i in level.items() if i >= height and n != start]
        chains = [[module] for module in graph if belongs(module, start)]
        seen = {chain[0] for chain in chains}
        while chains:
            chain = chains.pop()
            for target in sorted(graph[chain[-1]] - seen):
                seen.add(target)
                if any(belongs(target, name) for name in forbidden):
                    found.append(" -> ".join([*chain, target]))
                else:
                    chains.append([*chain, target])
    for door, allowed in DOORS.items():
        for module, targets in graph.items():
            if any(belongs(t, door) for t in targets) and not any(
                belongs(module, name) for name in allowed
            ):
                found.append(f"{module} -> {door}")
    return found


def test_no_arrow_is_reversed() -> None:
    graph = import_graph(ROOT, fastppo._PUBLIC)
    assert reversed_arrows(graph) == []
    assert "fastppo._C" in graph["fastppo.packing"]  # the walk sees what is there


@pytest.mark.parametrize(
    ("module", "source", "chain"),
    [
        ("packing", "import fastppo.trainer", "fastppo.packing -> fastppo.trainer"),
        ("ops/gae", "from fastppo import PackedBatch", "fastppo.ops.gae -> fastppo.packing"),
        ("ops/gae", "def f():\n    from ..packing import x", "fastppo.ops.gae -> fastppo.packing"),
        ("policy", "from fastppo.middle import y", "fastppo.policy -> fastppo.middle -> fastppo.s"),
        ("step", "from fastppo import _C", "fastppo.step -> fastppo._C"),
        ("rollout/x", "from fastppo import rewards", "fastppo.rollout.x -> fastppo.rewards"),
        ("step", "import fastppo_kernels.gae", "fastppo.step -> fastppo_kernels"),
    ],
)
def test_a_reversed_arrow_is_found(
    tmp_path: pathlib.Path, module: str, source: str, chain: str
) -> None:
    modules = ["__init__", "packing", "policy", "step", "rewards", "trainer", "ops/__init__"]
    (tmp_path / "kernels" / "fastppo_kernels").mkdir(parents=True)
    (tmp_path / "kernels" / "fastppo_kernels" / "gae.py").write_text("import fastppo_kernels\n")
    for name in [*modules, "rollout/__init__", module]:
        path = tmp_path / "fastppo" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "fastppo" / "middle.py").write_text("import fastppo.step\n")
    assert reversed_arrows(import_graph(tmp_path, fastppo._PUBLIC)) == []
    (tmp_path / "fastppo" / f"{module}.py").write_text(source + "\n")
    found = reversed_arrows(import_graph(tmp_path, fastppo._PUBLIC))
    assert any(arrow.startswith(chain) for arrow in found), found


def test_type_only_imports_are_no_arrows(tmp_path: pathlib.Path) -> None:
    for name in ("packing", "trainer"):
        path = tmp_path / "fastppo" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("if TYPE_CHECKING:\n    from fastppo.trainer import PPOTrainer\n")
    assert reversed_arrows(import_graph(tmp_path, {})) == []


def test_kernels_never_import_fastppo() -> None:
    graph = import_graph(ROOT, fastppo._PUBLIC)
    for module, targets in graph.items():
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


def test_one_version() -> None:
    assert importlib.metadata.version("fastppo") == fastppo.__version__
