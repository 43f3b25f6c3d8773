"""A command says which extra brings a package that it needs."""

import pytest
import typer

from pdcoord.commands import _installed


def test_a_package_that_is_not_installed_is_named_with_its_extra(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, _installed("pdcoord plan", "study"):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy.optimize")
    assert caught.value.exit_code == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "pdcoord plan needs scipy.optimize: pip install 'pdcoord[study]'\n")


def test_a_module_of_ours_that_is_missing_is_a_defect() -> None:
    with pytest.raises(ModuleNotFoundError), _installed("pdcoord plan", "study"):
        raise ModuleNotFoundError("No module named 'pdcoord.x'", name="pdcoord.x")
