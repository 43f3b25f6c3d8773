"""The emulated fleet file: what it compiles to, and how it is refused."""

import re
from pathlib import Path

import pytest

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.values import Spec
from pdcoord.sim.faults import FaultSpec
from pdcoord.sim.fleetfile import EngineSpec, Placement, PlacementError, load_fleet
from pdcoord.sim.profiles import PROFILES
from pdcoord.sim.settings import LoadFailurePolicy
from transfer.layout import KvDtype, KvLayout, Order
from transfer.verdict import Connector

HEAD = """\
apiVersion: pdcoord.io/v1alpha1
kind: EmulatedFleet
seed: 7
model: demo/llama-8b
engines:
"""
EXAMPLES = Path(__file__).resolve().parents[4] / "deploy" / "emulator"


def write(tmp_path: Path, *engines: str, head: str = HEAD) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(head + "".join(f"  - {engine}\n" for engine in engines))
    return path


def problems(path: Path) -> list[tuple[int | None, str, str]]:
    with pytest.raises(PolicyError) as caught:
        load_fleet(path)
    from pdcoord.policy.errors import format_key_path

    return [(p.line, format_key_path(p.key_path), p.message) for p in caught.value.problems]


def test_a_fleet_compiles_to_engines_of_its_profiles(tmp_path: Path) -> None:
    loaded = load_fleet(
        write(
            tmp_path,
            "{name: a, profile: nvidia-h100-8b, role: prefill, port: 18101, side_channel_port: 18601}",
            "{name: b, profile: intel-gaudi3-8b, engine: sglang, role: decode, port: 0}",
        )
    )
    fleet = loaded.fleet
    first, second = [engine.settings(fleet.model, fleet.seed) for engine in fleet.engines]
    h100 = PROFILES["nvidia-h100-8b"]
    assert first.speed == h100.speed
    assert (first.layout, first.block_total) == (h100.layout, h100.block_total)
    assert (first.role, first.connector, first.model_seed) == (Role.PREFILL, Connector.PDCOORD, 7)
    assert first.link_bytes_per_s == 12.5e9
    assert (second.engine, second.connector) == (EngineKind.SGLANG, Connector.SGLANG)


def test_what_is_written_wins_over_the_profile(tmp_path: Path) -> None:
    loaded = load_fleet(
        write(
            tmp_path,
            "{name: a, profile: amd-mi300x-8b, port: 1, connector: nixl, link_gbit_per_s: 8, "
            "kv_blocks: 100, context_tokens_max: 3200, kv_load_failure_policy: recompute, "
            "stock_silent_corruption: true, layout: {block_tokens: 32, order: NHD, dtype: float16}, "
            "speed: {prefill_ms_per_token: 1.5}, step_tokens_max: 2048, running_max: 8, queued_max: 9, "
            "lease_s: 3, handshake_s: 5, pull_timeout_s: 6, prefix_caching: false, step_jitter_share: 0.1}",
        )
    )
    (spec,) = loaded.fleet.engines
    settings = spec.settings("m", 0)
    assert settings.layout == KvLayout(32, Order.NHD, KvDtype.FLOAT16)
    assert settings.speed.prefill_s_per_token == 0.0015
    assert settings.speed.step_base_s == PROFILES["amd-mi300x-8b"].speed.step_base_s
    assert (settings.block_total, settings.context_tokens_max) == (100, 3_200)
    assert settings.link_bytes_per_s == 1e9
    assert settings.load_failure_policy is LoadFailurePolicy.RECOMPUTE
    assert settings.is_silent_corruption_stock
    assert (settings.step_tokens_max, settings.running_max, settings.queued_max) == (2_048, 8, 9)
    assert (settings.lease_s, settings.handshake_s, settings.pull_s_max) == (3.0, 5.0, 6.0)
    assert not settings.is_prefix_caching
    assert settings.jitter_share == 0.1


def test_engines_are_chosen_by_name(tmp_path: Path) -> None:
    loaded = load_fleet(
        write(tmp_path, *(f"{{name: {n}, profile: amd-mi300x-8b, port: 0}}" for n in ("a", "b", "c")))
    )
    assert [engine.name for engine in loaded.chosen([])] == ["a", "b", "c"]
    assert [engine.name for engine in loaded.chosen(["c", "a", "c"])] == ["c", "a"]
    with pytest.raises(PolicyError, match='no engine "x"'):
        loaded.chosen(["a", "x"])


@pytest.mark.parametrize(
    ("engine", "key", "message"),
    [
        ("{name: a, profile: tpu, port: 1}", "profile", "expected one of nvidia-h100-8b"),
        (
            "{name: a, profile: amd-mi300x-8b, port: 1, sidechannel_port: 2}",
            "sidechannel_port",
            "did you mean",
        ),
        ("{name: a, profile: amd-mi300x-8b}", "port", "is missing"),
        ("{name: a, profile: amd-mi300x-8b, port: 70000}", "port", "from 0 to 65535"),
        ("{name: a, profile: amd-mi300x-8b, port: '1'}", "port", "whole number"),
        ("{name: A!, profile: amd-mi300x-8b, port: 1}", "name", "lower-case"),
        ("{name: a, profile: amd-mi300x-8b, port: 1, connector: sglang}", "connector", "with engine vllm"),
        (
            "{name: a, profile: amd-mi300x-8b, port: 1, engine: sglang, connector: nixl}",
            "connector",
            "with engine sglang",
        ),
        (
            "{name: a, profile: amd-mi300x-8b, port: 1, engine: sglang, role: prefill}",
            "bootstrap_port",
            "is missing",
        ),
        ("{name: a, profile: amd-mi300x-8b, port: 1, bootstrap_port: 2}", "bootstrap_port", "sglang's"),
        (
            "{name: a, profile: amd-mi300x-8b, port: 1, kv_events_replay_port: 2}",
            "kv_events_replay_port",
            "without kv_events_port",
        ),
        (
            "{name: a, profile: amd-mi300x-8b, port: 1, stock_silent_corruption: true}",
            "stock_silent_corruption",
            "connector: nixl",
        ),
        (
            "{name: a, profile: amd-mi300x-8b, port: 1, kv_blocks: 4}",
            "context_tokens_max",
            "at most the 256 tokens",
        ),
        ("{name: a, profile: amd-mi300x-8b, port: 1, handshake_s: .nan}", "handshake_s", "handshake_s"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_by_line_and_key(
    tmp_path: Path, engine: str, key: str, message: str
) -> None:
    found = problems(write(tmp_path, "{name: fine, profile: amd-mi300x-8b, port: 0}", engine))
    if message == key:
        assert found  # Not a number: refused one way or another.
        return
    assert (7, f"engines[1].{key}") in {(line, path) for line, path, _ in found}
    assert any(message in text for _, _, text in found)


def test_names_and_ports_are_used_once(tmp_path: Path) -> None:
    engine = "{name: a, profile: amd-mi300x-8b, port: 1800}"
    found = problems(write(tmp_path, engine, engine))
    assert {path for _, path, _ in found} == {"engines[1].name", "engines[1].port"}
    taken = problems(write(tmp_path, engine, head=HEAD.replace("engines:", "admin: {port: 1800}\nengines:")))
    assert taken[0][1:] == ("engines[0].port", "is 1800, which admin.port has; change one")


def test_a_count_stands_for_engines_alike_with_ports_in_a_row(tmp_path: Path) -> None:
    pods = (
        "{name: pod, count: 3, profile: amd-mi300x-8b, port: 1800, kv_events_port: 1900, labels: {tier: new}}"
    )
    loaded = load_fleet(write(tmp_path, pods, "{name: last, profile: nvidia-h100-8b, port: 1803}"))
    found = [(e.name, e.port, e.side_channel_port, e.kv_events_port, e.labels) for e in loaded.fleet.engines]
    assert found == [
        ("pod-0", 1800, 0, 1900, {"tier": "new"}),
        ("pod-1", 1801, 0, 1901, {"tier": "new"}),
        ("pod-2", 1802, 0, 1902, {"tier": "new"}),
        ("last", 1803, 0, None, {}),
    ]
    assert [engine.name for engine in loaded.chosen(["pod-1"])] == ["pod-1"]
    assert all(engine.settings("m", 0).name == engine.name for engine in loaded.fleet.engines)


@pytest.mark.parametrize(
    ("engines", "path", "message"),
    [
        (["{name: a, count: 3, port: 1800"], "engines[0].count", None),
        (["{name: a, port: 1801", "{name: b, count: 3, port: 1800"], "engines[1].port", "is 1801, which"),
        (["{name: a-1, port: 1", "{name: a, count: 2, port: 3"], "engines[1].name", 'is "a-1", which'),
        (
            ["{name: a, count: 600, port: 0", "{name: b, count: 500, port: 0"],
            "engines[0].count",
            "1100 engines",
        ),
        (["{name: a, count: 0, port: 0"], "engines[0].count", "count"),
        (["{name: a, count: 9, port: 65530"], "engines[0].port", "with its count, expected at most 65535"),
        (["{name: a, count: 2, port: 1800, side_channel_port: 1801"], "engines[0].port", "is 1801, which"),
    ],
)
def test_counts_are_refused_where_they_are_written(
    tmp_path: Path, engines: list[str], path: str, message: str | None
) -> None:
    file = write(tmp_path, *(f"{engine}, profile: amd-mi300x-8b}}" for engine in engines))
    if message is None:
        assert len(load_fleet(file).fleet.engines) == 3
        return
    found = {where: text for _, where, text in problems(file)}
    assert path in found
    assert message in found[path] or message == "count"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "engines: [",
        HEAD,
        HEAD + "  []\n",
        HEAD.replace("EmulatedFleet", "PoolPolicy") + "  - {name: a, profile: amd-mi300x-8b, port: 1}\n",
        (HEAD + "  - {name: a, profile: amd-mi300x-8b, port: 1}\n---\n") * 2,
    ],
)
def test_what_is_no_fleet_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    assert problems(path)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_fleets(path: Path) -> None:
    loaded = load_fleet(path)
    for engine in loaded.fleet.engines:
        engine.settings(loaded.fleet.model, loaded.fleet.seed)


def rows_of(spec: type[Spec]) -> list[str]:
    """The rows that docs/emulator.md has of a class."""
    rows = []
    for name, info in spec.model_fields.items():
        default = getattr(info.default, "value", info.default)
        text = str(default).lower() if isinstance(default, bool) else str(default)
        shown = "none" if default is None else f"`{text}`"
        rows.append(f"| `{name}` | {'required' if info.is_required() else shown} | {info.description} |")
    return rows


@pytest.mark.parametrize("spec", [EngineSpec, FaultSpec])
def test_the_page_has_every_key_with_its_default_and_meaning(spec: type[Spec]) -> None:
    page = (EXAMPLES.parents[1] / "docs" / "emulator.md").read_text().splitlines()
    missing = [row for row in rows_of(spec) if row not in page]
    assert missing == [], "docs/emulator.md lacks these rows"


def test_there_are_examples() -> None:
    assert len(list(EXAMPLES.glob("*.yaml"))) >= 3


def test_one_engine_runs_elsewhere_than_its_file_says() -> None:
    two = load_fleet(EXAMPLES / "stock-nixl.yaml")
    chosen = two.chosen(["h100-decode-32"])
    placed = Placement(host="0.0.0.0", port=8200, advertise_host="10.0.0.7").of(chosen)
    (spec,) = placed
    assert (spec.host, spec.port, spec.told_host) == ("0.0.0.0", 8200, "10.0.0.7")
    unplaced = ("host", "port", "advertise_host")
    assert spec.model_dump(exclude={*unplaced}) == chosen[0].model_dump(exclude={*unplaced})
    assert Placement().of(two.fleet.engines) is two.fleet.engines


@pytest.mark.parametrize(
    ("names", "placement", "message"),
    [
        ([], Placement(port=8200), "--port: for one engine, not 4; choose it with --engine"),
        (["h100-decode"], Placement(port=70_000), "--port is 70000: "),
        (["h100-decode"], Placement(advertise_host="a b"), "--advertise-host is 'a b': "),
    ],
)
def test_a_place_that_cannot_be_names_the_option(
    names: list[str], placement: Placement, message: str
) -> None:
    fleet = load_fleet(EXAMPLES / "stock-nixl.yaml")
    with pytest.raises(PlacementError, match=re.escape(message)):
        placement.of(fleet.chosen(names))
