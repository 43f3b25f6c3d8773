"""Files of keys are put in force, followed, and counted; a bad one leaves the last good in force."""

import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from pdcoord.front.keys import KEY_RANDOM_BYTES, KeyFault, digest_of, make_key
from pdcoord.front.rates import RateKind
from pdcoord.protocol.errors import RefusedError
from pdcoord.runtime.access import Access
from pdcoord.runtime.secured import SecretError
from pdcoord.runtime.settings import GatewaySettings

KEYS = {name: make_key(name.encode() * KEY_RANDOM_BYTES) for name in "ab"}


class Bench:
    """Access of a process with files in a folder, and what it logged."""

    def __init__(self, folder: Path, **settings: Path) -> None:
        self.folder = folder
        self.log = LogCapture()
        given: Any = {"policy": folder / "policy.yaml", **settings}
        self.access = Access(GatewaySettings(**given), structlog.wrap_logger(None, processors=[self.log]))

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o600)
        return path

    def write_keys(self, *names: str) -> Path:
        listed = [
            {"name": name, "sha256": digest_of(KEYS[name].encode()).hex(), "tenant": f"team-{name}"}
            for name in names
        ]
        document = {"apiVersion": "pdcoord.io/v1alpha1", "kind": "ApiKeys", "cache_salt_secret": "A" * 43}
        return self.write("keys.yaml", json.dumps(document | {"keys": listed}))

    def is_in(self, name: str) -> bool:
        try:
            self.access.gate.identify([(b"x-api-key", KEYS[name].encode())])
        except RefusedError:
            return False
        return True

    async def settle(self) -> list[str]:
        """Look until a change counts; the events that were logged."""
        self.log.entries.clear()
        for _ in range(2):
            await self.access.poll()
        return [entry["event"] for entry in self.log.entries]

    def metric(self, name: str, *labels: str) -> float:
        for spec, samples in self.access.samples():
            if spec.name == f"pdcoord_gateway_{name}":
                return dict(samples).get(labels, -1.0)
        raise AssertionError(name)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path, keys_file=tmp_path / "keys.yaml", admin_key_file=tmp_path / "admin")
    made.write("admin", "x" * 32)
    made.write_keys("a")
    made.access.load_first()
    return made


def test_without_files_everybody_is_let_in(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.access.load_first()
    assert (bench.access.gate.is_open, bench.access.admin_key, bench.metric("keys")) == (True, None, 0.0)


def test_a_process_does_not_start_with_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keys_file=tmp_path / "keys.yaml")
    with pytest.raises(SecretError, match=r"^PDCOORD_KEYS_FILE: .*keys\.yaml: cannot be read"):
        bench.access.load_first()


async def test_keys_come_and_go_with_the_file(bench: Bench) -> None:
    assert (bench.is_in("a"), bench.is_in("b"), bench.metric("keys")) == (True, False, 1.0)
    bench.write_keys("a", "b")
    assert await bench.settle() == ["keys.accepted"]
    assert (bench.is_in("a"), bench.is_in("b"), bench.metric("keys")) == (True, True, 2.0)
    bench.write_keys("b")
    await bench.settle()
    assert (bench.is_in("a"), bench.is_in("b")) == (False, True)
    assert bench.metric("key_reloads_total", "keys", "accepted") == 2.0
    assert bench.metric("auth_failures_total", "front", "unknown") == 2.0


async def test_a_bad_file_leaves_the_last_good_one_in_force(bench: Bench) -> None:
    bench.write("keys.yaml", "kind: [")
    bench.write("admin", "short")
    assert await bench.settle() == ["keys.refused", "keys.refused"]
    assert "keys.yaml" in bench.log.entries[0]["problems"][0]
    assert bench.is_in("a")
    assert bench.access.admin_key == b"x" * 32
    for file in ("keys", "admin-key"):
        assert bench.metric("keys_stale", file) == 1.0
        assert bench.metric("key_reloads_total", file, "refused") == 1.0
    assert await bench.settle() == []
    bench.write_keys("b")
    bench.write("admin", "y" * 32)
    assert await bench.settle() == ["keys.accepted", "keys.accepted"]
    assert (bench.is_in("b"), bench.access.admin_key) == (True, b"y" * 32)
    assert bench.metric("keys_stale", "keys") == 0.0


async def test_a_file_that_is_gone_locks_nobody_out(bench: Bench) -> None:
    (bench.folder / "keys.yaml").unlink()
    assert await bench.settle() == ["keys.refused"]
    assert bench.is_in("a")


async def test_the_engines_key_is_followed_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path, engine_key_file=tmp_path / "engine")
    bench.write("engine", "one\n")
    bench.access.load_first()
    assert bench.access.gate.engine_headers() == [(b"authorization", b"Bearer one")]
    bench.write("engine", "two\n")
    await bench.settle()
    assert bench.access.gate.engine_headers() == [(b"authorization", b"Bearer two")]


async def test_what_is_counted_of_a_key_goes_with_it(bench: Bench) -> None:
    bench.access.rate_limited("a", RateKind.REQUESTS)
    bench.access.admin_refused(KeyFault.MISSING)
    assert bench.metric("rate_limited_total", "a", "requests") == 1.0
    assert bench.metric("rate_limited_total", "a", "tokens") == 0.0
    assert bench.metric("auth_failures_total", "admin", "missing") == 1.0
    bench.write_keys("b")
    await bench.settle()
    assert bench.metric("rate_limited_total", "a", "requests") == -1.0
    bench.write_keys("a")
    await bench.settle()
    assert bench.metric("rate_limited_total", "a", "requests") == 0.0


async def test_no_key_is_in_a_log(bench: Bench) -> None:
    bench.is_in("b")
    bench.write("keys.yaml", KEYS["a"])
    await bench.settle()
    assert not [key for key in KEYS.values() if key[4:16] in json.dumps(bench.log.entries)]
