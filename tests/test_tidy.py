"""Holds the shape of the code: sizes, module docstrings, empty __init__ files, mirrored tests, leftovers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pdcoord", "sidecar", "transfer")
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 50
# Each is split by a bar, so that this file does not find itself.
LEFTOVERS = tuple(
    word.replace("|", "") for word in ("TO|DO", "FIX|ME", "XX|X", "NotImplemented|Error", "breakpoint|()")
)


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def all_python() -> list[Path]:
    own = [ROOT / "tests", ROOT / "benchmarks"]
    return modules() + sorted(path for folder in own for path in folder.rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", modules(), ids=named)
def test_a_module_says_what_it_is_and_is_not_too_long(path: Path) -> None:
    text = path.read_text()
    if path.name == "__init__.py":
        assert not text.strip(), "an __init__ imports and defines nothing"
        return
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "a module opens with one sentence"
    assert docstring.splitlines()[0].rstrip().endswith((".", ":", ",")) or "\n" in docstring
    assert len(text.splitlines()) <= MODULE_LINES_MAX


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", modules(), ids=named)
def test_a_function_fits_a_screen(path: Path) -> None:
    for function in functions(ast.parse(path.read_text())):
        first = function.body[0]
        has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        body = function.body[1:] if has_docstring and len(function.body) > 1 else function.body
        line_count = (function.end_lineno or 0) - body[0].lineno + 1
        assert line_count <= FUNCTION_LINES_MAX, f"{named(path)}:{function.lineno} {function.name}"


@pytest.mark.parametrize("path", all_python(), ids=named)
def test_no_leftovers(path: Path) -> None:
    text = path.read_text()
    assert [word for word in LEFTOVERS if word in text] == []


def test_unit_tests_mirror_the_packages() -> None:
    unit = ROOT / "tests" / "unit"
    strays = [
        named(path)
        for path in unit.rglob("test_*.py")
        if not (ROOT / path.parent.relative_to(unit) / path.name.removeprefix("test_")).exists()
    ]
    assert strays == [], "a unit test is named after the module it tests"


def test_every_pure_module_has_a_unit_test() -> None:
    folders = ("pdcoord/core", "pdcoord/protocol", "pdcoord/resume", "pdcoord/policy", "transfer")
    pure = [ROOT / folder for folder in folders]
    missing = []
    for path in (path for folder in pure for path in folder.glob("*.py") if path.name != "__init__.py"):
        text = path.read_text()
        only_names = not any(True for _ in functions(ast.parse(text)))
        relative = path.relative_to(ROOT)
        if not only_names and not (ROOT / "tests/unit" / relative.parent / f"test_{path.name}").exists():
            missing.append(str(relative))
    assert missing == []


def test_files_are_not_dead() -> None:
    """Every module is imported by another, or is a way in."""
    ways_in = {"pdcoord/cli.py", "sidecar/main.py"}
    texts = {named(path): path.read_text() for path in all_python()}
    for path in modules():
        name = named(path)
        if path.name in {"__init__.py", "__main__.py"} or name in ways_in:
            continue
        dotted = name.removesuffix(".py").replace("/", ".")
        package, _, module = dotted.rpartition(".")
        is_used = any(
            dotted in text or (f"from {package} import" in text and module in text)
            for other, text in texts.items()
            if other != name and not other.startswith("tests/")
        )
        assert is_used, f"{name} is imported by no module"
