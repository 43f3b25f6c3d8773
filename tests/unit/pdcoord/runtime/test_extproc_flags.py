"""The flags of the endpoint picker, its own and other pickers'."""

import pytest

from pdcoord.runtime.extproc import ExtprocSettings
from pdcoord.runtime.extproc_flags import IGNORED, FlagError, read_flags
from pdcoord.runtime.settings import SettingsError, load


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


def test_paths_to_let_pass_are_named_one_by_one() -> None:
    flags = read_flags(["--pass-paths", "/a", "--pass-paths=/v1/b"], {})
    settings = load(ExtprocSettings, {**flags.settings, "policy": "p"})
    assert settings.pass_paths == {"/a", "/v1/b"}
    assert load(ExtprocSettings, {"policy": "p"}).pass_paths == frozenset()


def test_paths_may_be_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDCOORD_PASS_PATHS", "/a, /b")
    assert load(ExtprocSettings, {"policy": "p"}).pass_paths == {"/a", "/b"}


@pytest.mark.parametrize("path", ["a", "/a/", "/%61", "/a?b=c"])
def test_a_path_that_no_call_can_have_stops_the_start(path: str) -> None:
    with pytest.raises(SettingsError, match=r"PDCOORD_PASS_PATHS.*is no path"):
        load(ExtprocSettings, {"policy": "p", "pass_paths": path})


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
