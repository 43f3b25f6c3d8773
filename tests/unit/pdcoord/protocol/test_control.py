"""The control stream's proofs: each side's own, of this stream, and of nothing else."""

from dataclasses import replace

from pdcoord.protocol.control import (
    CONTROL_VERSION,
    ControlVersionError,
    CoordinatorHello,
    SidecarHello,
    Target,
    coordinator_proof,
    is_proof,
    sidecar_proof,
)
from pdcoord.protocol.headers import HostPort

KEY = b"k" * 32
HELLO = SidecarHello(CONTROL_VERSION, "pod", HostPort("10.0.0.1:8000"), "e1", b"n" * 16)
ANSWER = CoordinatorHello(CONTROL_VERSION, "r/1", b"m" * 16, b"")


def test_a_proof_holds_for_its_key_its_side_and_its_stream_only() -> None:
    good = sidecar_proof(KEY, HELLO, ANSWER)
    assert is_proof(good, sidecar_proof(KEY, HELLO, ANSWER))
    others = [
        sidecar_proof(b"o" * 32, HELLO, ANSWER),
        sidecar_proof(KEY, replace(HELLO, address=HostPort("10.0.0.2:8000")), ANSWER),
        sidecar_proof(KEY, replace(HELLO, epoch="e2"), ANSWER),
        sidecar_proof(KEY, replace(HELLO, nonce=b"x" * 16), ANSWER),
        sidecar_proof(KEY, HELLO, replace(ANSWER, nonce=b"x" * 16)),
        coordinator_proof(KEY, HELLO, ANSWER.nonce, ANSWER.replica),
        b"",
    ]
    assert not any(is_proof(each, good) for each in others)
    told = coordinator_proof(KEY, HELLO, ANSWER.nonce, "r/1")
    assert not is_proof(told, coordinator_proof(KEY, HELLO, ANSWER.nonce, "r/2"))


def test_parts_of_a_proof_cannot_be_shifted_into_each_other() -> None:
    one = replace(HELLO, epoch="ab", name="c")
    other = replace(HELLO, epoch="a", name="bc")
    assert sidecar_proof(KEY, one, ANSWER) != sidecar_proof(KEY, other, ANSWER)


def test_without_a_key_a_proof_is_empty() -> None:
    assert sidecar_proof(b"", HELLO, ANSWER) == coordinator_proof(b"", HELLO, b"m", "r") == b""


def test_another_version_is_named_with_the_remedy() -> None:
    text = str(ControlVersionError(9))
    assert "version is 9, expected 1" in text
    assert "one release" in text


def test_a_path_is_shut_where_its_breaker_is_open_or_its_verdict_impossible() -> None:
    target = Target(HostPort("p:1"), "native", "", "half-open")
    assert not target.is_shut
    assert replace(target, breaker="open").is_shut
    assert replace(target, verdict="impossible").is_shut
