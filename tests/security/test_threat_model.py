"""The threat model's lines and the suite's tests are the same list."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "threat-model.md"
SUITE = sorted(set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)})


def lines() -> list[list[str]]:
    """The cells of each line of the tables of threats."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if len(row) == 4 and row[0] != "threat" and set(row[0]) != {"-"}]


def names_in(path: Path) -> list[str]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    found = (node for node in ast.parse(path.read_text()).body if isinstance(node, kinds))
    return [node.name for node in found if node.name.startswith("test_")]


def named() -> list[str]:
    return [name for row in lines() for name in re.findall(r"`([^`]+)`", row[3])]


def test_each_line_names_one_test() -> None:
    assert len(lines()) > 50
    assert [row[0] for row in lines() if re.fullmatch(r"`[^`]+`", row[3]) is None] == []
    assert [row[0] for row in lines() if not row[1] or not row[2]] == []


def test_the_lines_name_each_test_of_the_suite_once() -> None:
    suite = [name for path in SUITE for name in names_in(path)]
    own = [name for name in named() if "::" not in name]
    assert sorted(own) == sorted(suite)


def test_tests_that_are_elsewhere_are_there() -> None:
    elsewhere = [name.split("::") for name in named() if "::" in name]
    assert len(elsewhere) == len(set(map(tuple, elsewhere)))
    for path, name in elsewhere:
        assert name in names_in(ROOT / path), f"{path} has no {name}"
