"""Flags and their variables: what goes before what, and what a bad value is told."""

from pathlib import Path

import pytest

from pdcoord.protocol.plans import DialectName
from sidecar.errors import SettingsError
from sidecar.settings import ENV_PREFIX, FLAGS, Settings, parse


def test_defaults() -> None:
    settings = parse([], {})
    assert (settings.host, settings.port, settings.engine) == ("0.0.0.0", 8000, "127.0.0.1:8200")
    assert (settings.metrics_host, settings.metrics_port) == ("127.0.0.1", 9400)
    assert settings.dialect is DialectName.NIXLV2
    assert (settings.allow, settings.allow_file, settings.allow_any) == ((), None, False)
    assert (settings.drain_s, settings.stream_idle_ms) == (30.0, 60_000.0)
    assert settings.fallback_colocated is True


def test_each_flag_is_one_attribute() -> None:
    assert [flag.attribute for flag in FLAGS] == list(Settings.__annotations__)


def test_the_command_line_goes_before_the_environment() -> None:
    environment = {ENV_PREFIX + "PORT": "1", ENV_PREFIX + "DIALECT": "sglang"}
    settings = parse(["--port", "2"], environment)
    assert (settings.port, settings.dialect) == (2, DialectName.SGLANG)


def test_allow_is_repeatable_takes_lists_and_is_normal() -> None:
    settings = parse(["--allow", "Pod-A:1,[FD00::2]:2", "--allow", "c:3"], {ENV_PREFIX + "ALLOW": "d:4"})
    assert [t.address for t in settings.allow] == ["pod-a:1", "[fd00::2]:2", "c:3"]
    assert [t.address for t in parse([], {ENV_PREFIX + "ALLOW": "d:4,e:5"}).allow] == ["d:4", "e:5"]


def test_coordinators_are_listed_once_each() -> None:
    settings = parse(["--control", "a:1,b:2", "--control", "A:1", "--control-address", "c:3"], {})
    assert settings.control == ("a:1", "b:2")
    assert settings.control_address == "c:3"
    assert parse([], {}).control == ()


def test_an_allowed_target_may_name_its_kv_port() -> None:
    assert [target.kv_port for target in parse(["--allow", "a:1/2,b:3"], {}).allow] == [2, None]


def test_what_is_probed_and_how() -> None:
    settings = parse([], {})
    assert (settings.kv_port, settings.kv_agent, settings.kv_key_file) == (14_579, None, None)
    settings = parse(["--kv-agent", "127.0.0.1:14579", "--kv-key-file", "k", "--probe-interval-s", "5"], {})
    assert (settings.kv_agent, settings.kv_key_file) == ("127.0.0.1:14579", Path("k"))
    assert settings.probe_interval_s == 5.0


def test_a_switch_takes_no_value_on_the_command_line() -> None:
    assert parse(["--allow-any"], {}).allow_any is True
    assert parse([], {ENV_PREFIX + "ALLOW_ANY": "yes"}).allow_any is True


def test_a_file_is_a_path() -> None:
    assert parse(["--allow-file", "etc/allow"], {}).allow_file == Path("etc/allow")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "x"], r"--port is 'x': give a port in 0\.\.65535"),
        (["--port", "65536"], "--port"),
        (["--bootstrap-port", "0"], r"--bootstrap-port is '0': give a port in 1\.\.65535"),
        (["--engine", "localhost"], "--engine is 'localhost': give host:port"),
        (["--dialect", "nixl"], "--dialect is 'nixl': give one of nixlv2, sglang, pdcoord"),
        (["--allow", "a:1,b"], "--allow is 'a:1,b': give host:port"),
        (["--drain-s", "nan"], "--drain-s is 'nan': give a number of seconds"),
        (["--drain-s", "-1"], "--drain-s"),
        (["--stream-idle-ms", "0"], "--stream-idle-ms"),
        (["--answer-ms", "soon"], "--answer-ms is 'soon'"),
        (["--body-bytes-max", "12"], "--body-bytes-max is '12': give a whole number of bytes"),
        (["--fallback-colocated", "maybe"], "--fallback-colocated is 'maybe': give yes or no"),
        (["--log-level", "loud"], "--log-level is 'loud': give one of debug, info, warning, error"),
        (["--host", "a b"], "--host is 'a b'"),
        (["--metrics-host", ""], "--metrics-host is ''"),
        (["--allow-any", "--allow", "a:1"], "--allow-any"),
        (
            ["--allow", "a:1/b"],
            "--allow is 'a:1/b': give host:port, such as 10.0.0.1:8000, host:port/kv_port",
        ),
        (["--allow-any", "--kv-agent", "a:1"], "--kv-agent is 'a:1': with --allow-any no target is known"),
        (["--control", "a"], "--control is 'a': give host:port"),
        (["--control-address", "a"], "--control-address is 'a': give host:port"),
        (
            ["--allow-from-control", "--control", "a:1"],
            "--allow-from-control is 'yes': give --control-key-file",
        ),
        (
            ["--allow-from-control", "--control-key-file", "k"],
            "--allow-from-control is 'yes': give --control ",
        ),
        (["--control-cert-file", "c"], "--control-cert-file is 'c': certificate and key go together"),
        (["--control-cert-key-file", "c"], "--control-cert-key-file is 'c': certificate and key"),
        (
            ["--control-cert-file", "c", "--control-cert-key-file", "k"],
            "--control-cert-file is 'c': give --control-ca-file",
        ),
        (["--kv-agent", "a"], "--kv-agent is 'a': give host:port"),
        (["--kv-port", "0"], "--kv-port is '0'"),
        (["--probe-interval-s", "0.5"], "--probe-interval-s"),
        (["--host", "h", "--metrics-host", "h", "--port", "5", "--metrics-port", "5"], "--metrics-port is 5"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--port"], "--port"),
        (["--metrics-p", "1"], "--metrics-p"),
    ],
)
def test_a_bad_value_is_named_with_its_remedy(arguments: list[str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse(arguments, {})


def test_a_bad_variable_is_named_itself() -> None:
    with pytest.raises(SettingsError, match="PDCOORD_SIDECAR_PORT is 'x'"):
        parse([], {ENV_PREFIX + "PORT": "x"})
