"""Settings name what is wrong with them; the table of them in the documents is fresh."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from transfer.errors import SettingError
from transfer.settings import RANGES, AgentSettings, read_key_file, settings_from_mapping

DOCUMENT = Path(__file__).parents[3] / "docs" / "transfer.md"


def refused(given: dict[str, Any], environ: dict[str, str] | None = None) -> SettingError:
    with pytest.raises(SettingError) as raised:
        settings_from_mapping(given, environ or {})
    return raised.value


def test_nothing_given_is_the_defaults() -> None:
    assert settings_from_mapping({}, {}) == AgentSettings()


@pytest.mark.parametrize("name", sorted(RANGES))
def test_every_number_has_its_bounds(name: str) -> None:
    low, high = RANGES[name]
    for value in (low - 1, high + 1):
        error = refused({name: int(value) if isinstance(getattr(AgentSettings(), name), int) else value})
        assert error.field == name
    assert low <= getattr(AgentSettings(), name) <= high


def test_numbers_without_bounds_there_are_none() -> None:
    numbers = {f.name for f in fields(AgentSettings) if isinstance(f.default, int | float)}
    assert numbers == set(RANGES)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prot": 1}, "prot"),
        ({"port": "x"}, "port"),
        ({"port": 1.5}, "port"),
        ({"port": True}, "port"),
        ({"lease_s": "soon"}, "lease_s"),
        ({"lease_s": "nan"}, "lease_s"),
        ({"lease_s": 5.0}, "transfer_timeout_s"),
        ({"backoff_first_s": 50.0}, "backoff_first_s"),
        ({"backends": []}, "backends"),
        ({"backends": "tcp,tcp"}, "backends"),
        ({"backends": [1]}, "backends"),
        ({"backend_options": {"nixl": 1}}, "backend_options"),
        ({"staging_device": ""}, "staging_device"),
        ({"advertise_host": 7}, "advertise_host"),
        ({"key_file": "/nowhere/key"}, "key_file"),
        ({"key_file": "a\0b"}, "key_file"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], field: str) -> None:
    assert refused(given).field == field


def test_the_environment_fills_what_was_not_given() -> None:
    environ = {"PDCOORD_KV_PORT": "7", "PDCOORD_KV_BACKENDS": "tcp, nixl", "PDCOORD_KV_LEASE_S": "30.5"}
    settings = settings_from_mapping({"port": 9}, environ | {"PDCOORD_KV_OTHER": "x"})
    assert (settings.port, settings.backends, settings.lease_s) == (9, ("tcp", "nixl"), 30.5)
    assert refused({}, {"PDCOORD_KV_PORT": "x"}).field == "port"


def test_the_key_is_read_from_a_file_that_is_not_everyones(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef0123\n")
    path.chmod(0o640)
    settings = settings_from_mapping({}, {"PDCOORD_KV_KEY_FILE": str(path)})
    assert settings.key == b"0123456789abcdef0123"
    assert "0123456789" not in repr(settings)
    path.chmod(0o644)
    assert "0644" in str(refused({"key_file": str(path)}))
    path.chmod(0o600)
    for text, word in (("short\n", "holds 5 bytes"), ("x" * 5_000, "longer")):
        path.write_text(text)
        with pytest.raises(SettingError, match=word):
            read_key_file(str(path))


def test_ports_of_ranks() -> None:
    assert AgentSettings(port=0).port_of_rank(3) == 0
    assert AgentSettings(port=65_530).port_of_rank(5) == 65_535
    with pytest.raises(SettingError, match="rank 6"):
        AgentSettings(port=65_530).port_of_rank(6)
    assert AgentSettings(tcp_port=10).tcp_port_of_rank(2) == 12


def settings_table() -> str:
    """The fields as a table, in the words of their own docstring."""
    text = (AgentSettings.__doc__ or "").partition("Attributes:")[2].partition("Raises:")[0]
    meanings = {}
    for line in text.splitlines():
        found = re.match(r" {8}(\w+): (.*)", line)
        if found:
            name = found[1]
            meanings[name] = found[2]
        elif line.strip():
            meanings[name] += " " + line.strip()
    rows = ["| Setting | Default | Range | Meaning |", "| --- | --- | --- | --- |"]
    for f in fields(AgentSettings):
        default = getattr(AgentSettings(), f.name)
        shown = ", ".join(default) if isinstance(default, tuple) else "" if f.name == "key" else default or ""
        shown = default if isinstance(default, int | float) else shown
        bounds = "..".join(f"{bound:.10g}" for bound in RANGES.get(f.name, ()))
        name = "key_file" if f.name == "key" else f.name
        rows.append(f"| `{name}` | {shown} | {bounds} | {meanings[f.name]} |")
    return "\n".join(rows) + "\n"


def test_the_table_in_the_documents_is_fresh() -> None:
    table = settings_table()
    assert table in DOCUMENT.read_text(), f"put this into docs/transfer.md:\n{table}"
