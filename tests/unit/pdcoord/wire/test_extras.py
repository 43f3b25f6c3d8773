"""An entry point names the extra that brings a missing package, and hides no defect of ours."""

import pytest

from pdcoord.wire.extras import missing_package, quiet_grpc


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("typer", "gateway"),
        ("opentelemetry.sdk", "tracing"),
        ("grpc_health.v1", "extproc"),
        ("kubernetes", "kubernetes"),
    ],
)
def test_the_extra_is_that_of_the_package_or_of_the_command(name: str, extra: str) -> None:
    said = missing_package("pdcoord serve", ModuleNotFoundError(name=name), "gateway")
    assert said == f"pdcoord serve needs {name}: pip install 'pdcoord[{extra}]'"


def test_a_module_of_ours_that_is_missing_is_raised() -> None:
    with pytest.raises(ModuleNotFoundError):
        missing_package("pdcoord", ModuleNotFoundError(name="pdcoord.nothing"), "gateway")


def test_grpc_is_quiet_unless_somebody_asks() -> None:
    silent: dict[str, str] = {}
    asked = {"GRPC_VERBOSITY": "debug"}
    quiet_grpc(silent)
    quiet_grpc(asked)
    assert (silent, asked) == ({"GRPC_VERBOSITY": "NONE"}, {"GRPC_VERBOSITY": "debug"})
