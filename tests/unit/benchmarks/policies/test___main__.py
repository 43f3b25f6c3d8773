"""What a run keeps of the file before it."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.policies.__main__ import kept

BEFORE = {
    "seed_table": ["rows"],
    "suite": {"mix": {"finals": 1}, "chat": {"finals": 2}},
    "adversity": {"rate": 3},
    "settings": {
        "seed_table": {"seeds": 10},
        "suite": {"mix": {"rivals": ["a"]}, "chat": {"rivals": ["b"]}},
        "adversity": {"seeds": 3},
    },
    "bars": [],
}


def options(path: Path, only: list[str] | None, workload: list[str] | None) -> Namespace:
    return Namespace(json=path, only=only, workload=workload)


def written(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "policies.json"
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("only", "workload", "keys"),
    [
        (None, None, set()),
        (["suite"], None, {"seed_table", "adversity"}),
        (["seed"], None, {"suite", "adversity"}),
        (["suite"], ["mix"], {"seed_table", "suite", "adversity"}),
        (None, ["mix"], {"suite"}),
        (["seed", "adversity"], ["mix"], {"suite"}),
    ],
)
def test_parts_and_workloads_that_are_not_run_are_kept(
    tmp_path: Path, only: list[str] | None, workload: list[str] | None, keys: set[str]
) -> None:
    found = kept(options(written(tmp_path, BEFORE), only, workload))
    assert found.keys() - {"settings", "bars"} == keys
    assert all(found[key] == BEFORE[key] for key in keys)


def test_settings_that_were_said_once_are_said_of_each_workload(tmp_path: Path) -> None:
    before = BEFORE | {"settings": {"suite": {"rivals": ["a"], "seeds": 3}}}
    found = kept(options(written(tmp_path, before), ["suite"], ["mix"]))
    of = {"rivals": ["a"], "seeds": 3}
    assert found["settings"]["suite"] == {"mix": of, "chat": of}


def test_settings_by_workload_stay_as_they_are(tmp_path: Path) -> None:
    assert kept(options(written(tmp_path, BEFORE), ["suite"], ["mix"]))["settings"] == BEFORE["settings"]


def test_nothing_is_kept_where_there_is_no_file(tmp_path: Path) -> None:
    assert kept(options(tmp_path / "none.json", ["suite"], None)) == {}
