"""Engines that are alike are one kind, whatever their names, ports and roles."""

from pathlib import Path

import pytest

from pdcoord.core.fleet import Role
from pdcoord.sim.advise.kinds import KINDS_MAX, AdviceError, kinds_of
from pdcoord.sim.fleetfile import load_fleet

HEAD = "apiVersion: pdcoord.io/v1alpha1\nkind: EmulatedFleet\nmodel: m\nengines:\n"


def write(tmp_path: Path, *engines: str) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(HEAD + "".join(f"  - {{{engine}}}\n" for engine in engines))
    return path


def test_engines_are_grouped_by_what_they_are(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "name: a, profile: nvidia-h100-8b, role: prefill, port: 0, cost_per_hour: 4",
        "name: b, profile: amd-mi300x-8b, port: 0",
        "name: c, profile: nvidia-h100-8b, role: decode, port: 0, cost_per_hour: 4",
        "name: d, profile: nvidia-h100-8b, port: 0, cost_per_hour: 4, link_gbit_per_s: 400",
    )
    kinds = kinds_of(load_fleet(path))
    assert [(kind.name, kind.vendor, kind.count) for kind in kinds] == [
        ("nvidia-h100-8b (a)", "nvidia", 2),
        ("amd-mi300x-8b", "amd", 1),
        ("nvidia-h100-8b (d)", "nvidia", 1),
    ]
    assert kinds[0].roles == (Role.PREFILL, Role.DECODE)
    assert [kind.cost_per_hour for kind in kinds] == [4.0, None, 4.0]
    assert kinds[1].kv_tokens == kinds[1].settings.block_total * 64


def test_too_many_kinds_are_refused(tmp_path: Path) -> None:
    engines = [
        f"name: e{n}, profile: nvidia-h100-8b, port: 0, link_gbit_per_s: {100 + n}"
        for n in range(KINDS_MAX + 1)
    ]
    with pytest.raises(AdviceError, match="engines are of 17 kinds, expected at most 16; give those"):
        kinds_of(load_fleet(write(tmp_path, *engines)))
