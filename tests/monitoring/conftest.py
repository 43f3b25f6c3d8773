"""promtool, which the rules are tried with."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def promtool() -> str:
    own = Path(__file__).resolve().parents[2] / ".venv-tools" / "bin" / "promtool"
    path = str(own) if own.exists() else shutil.which("promtool")
    assert path is not None, "promtool is not here: run `make tools`"
    return path
