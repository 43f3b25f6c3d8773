"""The emulated engine behind vLLM's command line: what it takes from it, and what it refuses."""

import json
from io import StringIO

import pytest

from pdcoord.sim.emulator_vllm import ServeError, fleet_of, main
from pdcoord.sim.settings import LoadFailurePolicy
from transfer.verdict import Connector

OURS = {
    "kv_connector": "PdcoordConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_port": 14_700,
    "kv_connector_extra_config": {"lease_s": 45.0, "backends": ["tcp"]},
}
IN_POD = {
    "PDCOORD_EMULATED_PROFILE": "intel-gaudi3-8b",
    "VLLM_HOST_IP": "10.0.0.7",
    "PDCOORD_KV_KEY_FILE": "/etc/pdcoord/keys/kv",
}


def serve(*flags: str, **environment: str):  # noqa: ANN201  # EngineSpec is of no interest here
    fleet = fleet_of(["serve", "acme/model", *flags], IN_POD | environment, "Gaudi-7f9c-x2")
    (engine,) = fleet.engines
    return fleet, engine


def test_a_pod_for_our_connector() -> None:
    fleet, engine = serve(
        "--served-model-name=llama",
        "--port=8200",
        "--block-size=128",
        "--max-model-len=8192",
        "--shutdown-timeout=30",
        f"--kv-transfer-config={json.dumps(OURS)}",
    )
    assert (fleet.model, engine.name) == ("llama", "gaudi-7f9c-x2")
    assert (engine.host, engine.port, engine.told_host) == ("0.0.0.0", 8200, "10.0.0.7")
    assert engine.connector_kind is Connector.PDCOORD
    assert (engine.kv_port, engine.kv_key_file) == (14_700, "/etc/pdcoord/keys/kv")
    assert (engine.lease_s, engine.context_tokens_max, engine.shutdown_timeout_s) == (45.0, 8192, 30.0)
    assert engine.kv_load_failure_policy is LoadFailurePolicy.RECOMPUTE
    assert engine.layout is None, "the profile's own block size"


def test_a_pod_for_the_stock_connector() -> None:
    config = {"kv_connector": "NixlConnector", "kv_connector_extra_config": {"kv_lease_duration": 20}}
    _, engine = serve(
        "--kv-transfer-config", json.dumps(config), "--block-size", "64", VLLM_NIXL_SIDE_CHANNEL_PORT="5700"
    )
    assert engine.connector_kind is Connector.NIXL
    assert (engine.side_channel_port, engine.kv_port, engine.lease_s) == (5700, None, 20.0)
    assert engine.layout is not None
    assert engine.layout.block_tokens == 64


def test_a_pod_that_moves_no_kv_and_one_that_tells_of_its_cache() -> None:
    events = {"enable_kv_cache_events": True, "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}
    fleet, engine = serve(f"--kv-events-config={json.dumps(events)}")
    assert fleet.model == "acme/model"
    assert engine.connector_kind is Connector.NONE
    assert (engine.kv_events_port, engine.kv_events_replay_port) == (5557, 5558)
    _, silent = serve(f"--kv-events-config={json.dumps(events | {'enable_kv_cache_events': False})}")
    assert silent.kv_events_port is None


def test_flags_that_mean_nothing_here_are_let_pass() -> None:
    _, engine = serve(
        "--tensor-parallel-size=2", "--dtype=bfloat16", "--attention-backend", "X", "--headless"
    )
    assert engine.port == 8000


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (
            [],
            {"PDCOORD_EMULATED_PROFILE": "tpu"},
            'PDCOORD_EMULATED_PROFILE is "tpu", expected one of nvidia-',
        ),
        (["--kv-transfer-config=[]"], {}, "argument --kv-transfer-config: is '[]', expected a JSON object"),
        (["--kv-transfer-config={"], {}, "argument --kv-transfer-config: invalid _json value"),
        (
            ['--kv-transfer-config={"kv_connector": "Moon"}'],
            {},
            "kv_connector is 'Moon', expected one of Pdcoord",
        ),
        (
            ['--kv-events-config={"enable_kv_cache_events": true, "endpoint": "ipc:///x"}'],
            {},
            "--kv-events-config names 'ipc:///x', expected tcp://HOST:PORT",
        ),
        (["--port=eighty"], {}, "argument --port: invalid int value: 'eighty'"),
        (["--max-model-len=99999999"], {}, "this makes no emulated engine: "),
    ],
)
def test_what_cannot_be_is_named(flags: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(ServeError) as refused:
        serve(*flags, **environment)
    assert message in str(refused.value)


def test_without_a_profile_nothing_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PDCOORD_EMULATED_PROFILE", raising=False)
    assert main(["serve", "acme/model"], StringIO()) == 2
    said = "pdcoord emulate-vllm: not started: PDCOORD_EMULATED_PROFILE is "
    assert capsys.readouterr().err.startswith(said)


def test_a_key_that_cannot_be_read_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (IN_POD | {"PDCOORD_KV_KEY_FILE": "/nowhere/key"}).items():
        monkeypatch.setenv(name, value)
    arguments = ["serve", "acme/model", f"--kv-transfer-config={json.dumps(OURS)}"]
    assert main(arguments, StringIO()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pdcoord emulate-vllm: not started: ")
    assert "/nowhere/key" in line
