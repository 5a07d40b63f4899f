"""docs/faults.md keeps its word: every line names a test that exists."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| member")
]


def test_every_line_is_held_by_a_test() -> None:
    found: dict[str, set[str]] = {}
    for row in ROWS:
        assert len(row) == 3 and all(row), row
        for name in row[2].split(", "):
            file, _, test = name.strip("`").partition("::")
            path = ROOT / "tests" / file
            if file not in found:
                tree = ast.parse(path.read_text(encoding="utf-8"))
                defined = (ast.FunctionDef, ast.ClassDef)
                found[file] = {node.name for node in ast.walk(tree) if isinstance(node, defined)}
            assert test in found[file], f"{name} is not in {path}"
