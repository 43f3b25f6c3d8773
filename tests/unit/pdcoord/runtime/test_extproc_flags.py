"""The flags of the endpoint picker, its own and other pickers'."""

import pytest

from pdcoord.runtime.extproc import ExtprocSettings
from pdcoord.runtime.extproc_flags import IGNORED, FlagError, read_flags


def test_flags_are_written_as_go_takes_them() -> None:
    flags = read_flags(["--grpc-port", "9", "-metrics-port=8", "--secure-serving=false", "-policy", "p"], {})
    assert flags.settings["grpc_port"] == "9"
    assert flags.settings["metrics_port"] == "8"
    assert flags.settings["secure_serving"] == "false"
    assert flags.settings["policy"] == "p"
    assert flags.settings["cert_path"] is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--secure-serving"], "true"),
        (["--no-secure-serving"], "false"),
        (["--secure-serving=F"], "false"),
        (["--secure-serving", "true"], "true"),
        ([], None),
    ],
)
def test_a_switch_alone_is_on(flags: list[str], expected: str | None) -> None:
    assert read_flags(flags, {}).settings["secure_serving"] == expected


@pytest.mark.parametrize(
    ("flags", "environment", "pods", "policies"),
    [
        (["--pool-name=p"], {}, True, True),
        (["--pool-name=p", "--policy=f"], {}, True, None),
        (["--pool-name=p", "--endpoints=f"], {}, None, True),
        (["--pool-name=p"], {"PDCOORD_POLICY": "f"}, True, None),
        (["--policy=f"], {}, None, None),
    ],
)
def test_a_pool_means_kubernetes_unless_files_are_named(
    flags: list[str], environment: dict[str, str], pods: bool | None, policies: bool | None
) -> None:
    settings = read_flags([*flags, "--pool-namespace=n"], environment).settings
    assert settings.get("kubernetes_pods") is pods
    assert settings.get("kubernetes_policies") is policies
    assert settings["kubernetes_namespace"] == "n"


def test_flags_of_other_pickers_are_taken_and_named() -> None:
    flags = read_flags(["--zap-encoder", "json", "--enable-pprof=false", "-v", "4", "--tracing"], {})
    assert {each.split(":")[0] for each in flags.ignored} == {
        "--zap-encoder",
        "--enable-pprof",
        "--v",
        "--tracing",
    }
    for name in IGNORED:
        assert len(read_flags([f"--{name}=1"], {}).ignored) == 1


@pytest.mark.parametrize("flags", [["--nothing"], ["stray"], ["--grpc-port"], ["--secure-serving=maybe"]])
def test_what_is_not_known_is_named(flags: list[str]) -> None:
    with pytest.raises(FlagError, match=flags[0].split("=")[0].lstrip("-")):
        read_flags(flags, {})


def test_help_names_every_flag_of_ours_and_no_other() -> None:
    text = read_flags(["--help"], {}).help
    assert "--grpc-health-port" in text
    assert "--pool-name" in text
    assert "--zap-encoder" not in text


def test_every_setting_that_a_flag_stands_for_exists() -> None:
    settings = read_flags(["--pool-name=p"], {}).settings
    assert set(settings) <= set(ExtprocSettings.model_fields)
