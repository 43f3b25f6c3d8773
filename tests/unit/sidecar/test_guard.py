"""Whom the sidecar may dial, what it reads from headers and which of them it passes."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pdcoord.protocol.errors import RefusedError, RefuseReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, PlanHeader, PlannedLoad, PrefillTarget, encode_plan
from pdcoord.protocol.signing import Doubt, Steering
from sidecar.errors import SettingsError
from sidecar.guard import (
    PREFILLS_MAX,
    Allowlist,
    Guard,
    Headers,
    Peer,
    for_client,
    for_engine,
    normal_address,
    read_entry,
    read_target,
)

P1, P2, P3 = (HostPort(f"10.0.0.{n}:8000") for n in (1, 2, 3))
D1 = HostPort("10.0.1.1:8000")


def guard(*allowed: HostPort, dialect: DialectName = DialectName.NIXLV2, is_open: bool = False) -> Guard:
    return Guard(
        allowlist=Allowlist(map(read_target, allowed), is_open=is_open),
        dialect=dialect,
        is_colocated_allowed=True,
        prefill_deadline_ms=1_000.0,
        transfer_deadline_ms=500.0,
        make_request_id=lambda: "made",
        bootstrap_port=8998,
        kv_port=14579,
    )


def plan(*addresses: str, **more: object) -> tuple[bytes, bytes]:
    targets = tuple(PrefillTarget(address=HostPort(a)) for a in addresses)
    return (b"x-pdcoord-plan", encode_plan(PlanHeader(prefills=targets, **more)))  # type: ignore[arg-type]


def foreign(value: str) -> tuple[bytes, bytes]:
    return (b"x-prefiller-host-port", value.encode("latin-1"))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Pod.Example:80", "pod.example:80"),
        (" 10.0.0.1:8000 ", "10.0.0.1:8000"),
        ("pod.example.:80", "pod.example:80"),
        ("[FD00::1]:80", "[fd00::1]:80"),
    ],
)
def test_an_address_has_one_spelling(text: str, normal: str) -> None:
    assert normal_address(text) == normal


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":80",
        "host:0",
        "host:65536",
        "fd00::1:80",
        "a b:80",
        "ho\rst:80",
        "h\x00:80",
        "hö:80",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not host:port"):
        normal_address(text)


# The allowlist.


def test_an_empty_allowlist_allows_nothing_and_an_open_one_anything() -> None:
    assert not Allowlist().allows(P1)
    assert Allowlist(is_open=True).allows(P1)


class Told:
    """What coordinators name."""

    def __init__(self, *targets: PrefillTarget) -> None:
        self.by_address = {target.address: target for target in targets}

    def get(self, address: HostPort) -> PrefillTarget | None:
        return self.by_address.get(address)

    def targets(self) -> list[PrefillTarget]:
        return list(self.by_address.values())

    def has_decode(self, address: HostPort) -> bool:
        return address == D1


def test_what_coordinators_name_is_listed_too_and_what_is_given_goes_before_it() -> None:
    allowlist = Allowlist([PrefillTarget(address=P1, kv_port=1)])
    told = Told(PrefillTarget(address=P1, kv_port=2), PrefillTarget(address=P2, kv_port=3))
    assert not allowlist.allows(P2)
    allowlist.follow(told)
    assert allowlist.allows(P2)
    assert (allowlist.allows_decode(D1), allowlist.allows(D1)) == (True, False)
    assert [allowlist.kv_port(address) for address in (P1, P2, P3)] == [1, 3, None]
    assert {target.address: target.kv_port for target in allowlist.targets()} == {P1: 1, P2: 3}
    assert len(allowlist) == 2
    told.by_address.clear()
    assert not allowlist.allows(P2)


def test_a_plan_keeps_its_load_and_a_prefill_leg_is_counted_by_whoever_sent_it() -> None:
    load = PlannedLoad(replica="a/1", prompt_tokens=5)
    asked = guard(P1).read([plan(P1, load=load)])
    assert (asked.plan.load, asked.is_counted) == (load, True)
    assert guard().read([]).is_counted
    assert not guard().read([(b"x-pdcoord-leg", b"prefill")]).is_counted
    call = ("POST", "/v1/embeddings")
    assert guard().read_load(*call, [plan(load=load)]) == load
    assert guard().read_load(*call, []) is None
    assert guard().read_load(*call, [(b"x-pdcoord-plan", b"{")]) is None


def test_host_and_port_both_count() -> None:
    allowlist = Allowlist([read_target(P1)])
    assert allowlist.allows(P1)
    assert not allowlist.allows(HostPort("10.0.0.1:8001"))
    assert not allowlist.allows(P2)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("Pod:1", PrefillTarget(address=HostPort("pod:1"))),
        ("Pod:1/14600 ", PrefillTarget(address=HostPort("pod:1"), kv_port=14_600)),
        ("[FD00::1]:1/2", PrefillTarget(address=HostPort("[fd00::1]:1"), kv_port=2)),
    ],
)
def test_a_target_may_name_its_kv_port(text: str, target: PrefillTarget) -> None:
    assert read_target(text) == target


@pytest.mark.parametrize("text", ["pod:1/", "pod:1/0", "pod:1/65536", "pod:1/x", "pod:1/2/3", "pod/2", "/2"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not host:port"):
        read_target(text)


def test_the_file_goes_before_the_flags_and_each_target_is_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "allow"
    path.write_text(f"{P2}/9\n{P3}\n")
    allowlist = Allowlist([read_target(f"{P1}/7"), read_target(f"{P2}/8")], path=path)
    assert [(t.address, t.kv_port) for t in allowlist.targets()] == [(P1, 7), (P2, 9), (P3, None)]
    assert [allowlist.kv_port(p) for p in (P1, P2, P3, HostPort("other:1"))] == [7, 9, None, None]


def test_a_file_adds_to_the_flags_and_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "allow"
    path.write_text(f"# prefill pods\n{P2}  # second\n\n")
    allowlist = Allowlist([read_target(P1)], path=path)
    assert [allowlist.allows(p) for p in (P1, P2, P3)] == [True, True, False]
    assert len(allowlist) == 2
    assert allowlist.reload() is False
    path.write_text(f"{P3}\n")
    assert allowlist.reload() is True
    assert [allowlist.allows(p) for p in (P1, P2, P3)] == [True, False, True]


def test_a_replaced_file_is_seen_though_size_and_time_agree(tmp_path: Path) -> None:
    path, other = tmp_path / "allow", tmp_path / "other"
    path.write_text(f"{P1}\n")
    allowlist = Allowlist(path=path)
    other.write_text(f"{P2}\n")
    stat = path.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)
    assert allowlist.reload() is True
    assert allowlist.allows(P2)


def test_a_bad_file_leaves_the_last_good_list_and_is_reported_once(tmp_path: Path) -> None:
    path = tmp_path / "allow"
    path.write_text(f"{P1}\n")
    allowlist = Allowlist(path=path)
    path.write_text("ok:1\nnot an address\n")
    with pytest.raises(SettingsError, match=r"--allow-file .*line 2.*host:port/decode a line"):
        allowlist.reload()
    assert allowlist.reload() is False
    assert allowlist.allows(P1)
    path.unlink()
    with pytest.raises(SettingsError, match="cannot be read"):
        allowlist.reload()
    assert allowlist.allows(P1)


def test_a_file_that_cannot_be_read_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        Allowlist(path=tmp_path / "missing")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="UTF-8"):
        Allowlist(path=binary)


# What headers ask for.


def test_the_kv_port_is_the_plans_or_else_the_lists() -> None:
    reader = guard(HostPort(f"{P1}/7"), HostPort(f"{P2}/8"), P3)
    targets = tuple(PrefillTarget(address=p, kv_port=k) for p, k in ((P1, None), (P2, 9), (P3, None)))
    asked = reader.read([(b"x-pdcoord-plan", encode_plan(PlanHeader(prefills=targets)))])
    assert [target.kv_port for target in asked.plan.prefills] == [7, 9, None]
    asked = reader.read([foreign(f"{P1},{P3}")])
    assert [target.kv_port for target in asked.plan.prefills] == [7, None]


@pytest.mark.parametrize("port", [0, -1, 65_536])
def test_a_kv_port_that_is_none_is_refused(port: int) -> None:
    header = encode_plan(PlanHeader(prefills=(PrefillTarget(address=P1, kv_port=port),)))
    with pytest.raises(RefusedError, match="kv_port"):
        guard(P1).read([(b"x-pdcoord-plan", header)])


def test_a_foreign_pdcoord_request_may_fall_back_colocated() -> None:
    assert guard(P1, dialect=DialectName.PDCOORD).read([foreign(P1)]).plan.is_colocated_allowed


def test_without_routing_headers_nobody_asks_for_a_split() -> None:
    asked = guard(P1).read([(b"content-type", b"application/json")])
    assert asked.plan.prefills == ()
    assert not asked.is_prefill_leg


def test_a_foreign_header_names_candidates_in_order() -> None:
    asked = guard(P1, P2, P3).read([foreign(f"{P2}, {P1}"), foreign(f"{P3},{P2}")])
    assert [t.address for t in asked.plan.prefills] == [P2, P1, P3]
    assert asked.plan.is_colocated_allowed
    assert (asked.plan.prefill_deadline_ms, asked.plan.transfer_deadline_ms) == (1_000.0, 500.0)


def test_a_foreign_sglang_request_never_falls_back_colocated() -> None:
    asked = guard(P1, dialect=DialectName.SGLANG).read([foreign(P1)])
    assert asked.plan.dialect is DialectName.SGLANG
    assert not asked.plan.is_colocated_allowed


def test_a_foreign_header_that_names_a_target_not_allowed_is_refused_whole() -> None:
    with pytest.raises(RefusedError) as caught:
        guard(P1).read([foreign(f"{P1},{P2}")])
    assert (caught.value.refusal.status, caught.value.refusal.reason) == (
        403,
        RefuseReason.TARGET_NOT_ALLOWED,
    )


@pytest.mark.parametrize("value", ["nonsense", "10.0.0.1", "http://10.0.0.1:8000", "a:1 b:2", "h\xe9:1"])
def test_a_foreign_header_that_cannot_be_read_is_refused(value: str) -> None:
    with pytest.raises(RefusedError, match="x-prefiller-host-port") as caught:
        guard(is_open=True).read([foreign(value)])
    assert caught.value.refusal.status == 400


def test_foreign_candidates_are_bounded() -> None:
    names = ",".join(f"h{n}:1" for n in range(50))
    assert len(guard(is_open=True).read([foreign(names)]).plan.prefills) == PREFILLS_MAX


def test_our_plan_goes_before_a_foreign_header_and_keeps_what_is_not_allowed_as_refused() -> None:
    asked = guard(P1).read([foreign(P3), plan("10.0.0.1:8000", P2, dialect=DialectName.SGLANG)])
    assert [t.address for t in asked.plan.prefills] == [P1, P2]
    assert asked.refused == {P2}
    assert asked.plan.dialect is DialectName.SGLANG


def test_a_plan_keeps_its_deadlines_and_ports() -> None:
    sent = PlanHeader(
        prefills=(PrefillTarget(address=HostPort("POD:1"), bootstrap_port=9),),
        is_colocated_allowed=False,
        prefill_deadline_ms=7.0,
        transfer_deadline_ms=8.0,
    )
    read = guard(is_open=True).read([(b"x-pdcoord-plan", encode_plan(sent))]).plan
    assert (read.prefill_deadline_ms, read.transfer_deadline_ms, read.is_colocated_allowed) == (
        7.0,
        8.0,
        False,
    )
    assert read.prefills == (PrefillTarget(address=HostPort("pod:1"), bootstrap_port=9),)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-pdcoord-plan", b"nonsense")],
        [(b"x-pdcoord-plan", b'{"version":9}')],
        [plan("no-port")],
        [plan(*(f"h{n}:1" for n in range(PREFILLS_MAX + 1)))],
        [plan(P1, prefill_deadline_ms=1e12)],
        [plan(P1), plan(P1)],
        [(b"x-pdcoord-plan", b'{"prefills":[{"address":"h:1","bootstrap_port":70000}]}')],
    ],
)
def test_a_plan_that_cannot_be_executed_is_refused(headers: Headers) -> None:
    with pytest.raises(RefusedError, match="x-pdcoord-plan") as caught:
        guard(is_open=True).read(headers)
    assert caught.value.refusal.status == 400


def test_a_plan_s_decode_endpoints_are_kept_and_those_without_leave_are_known() -> None:
    peer, target = HostPort("d:1"), HostPort("p1:1")
    reader = replace(guard(), allowlist=Allowlist([PrefillTarget(address=target), Peer(peer)]))
    named = (HostPort("D.:1"), peer, target, HostPort("x:1"))
    asked = reader.read([plan(resumes=named, resume_tries_max=2, resume_age_ms_max=5.0, resume_stall_ms=7.0)])
    assert asked.plan.resumes == (peer, target, "x:1")
    assert asked.refused_resumes == {"x:1"}
    assert (asked.plan.resume_tries_max, asked.plan.resume_age_ms_max, asked.plan.resume_stall_ms) == (
        2,
        5.0,
        7.0,
    )
    assert reader.read([plan(is_resumed_above=True)]).plan.is_resumed_above
    assert not reader.allowlist.allows(peer)  # Streams may go on there, and no prefill leg.


@pytest.mark.parametrize(
    "more",
    [
        {"resumes": tuple(f"d{n}:1" for n in range(9))},
        {"resumes": ("no address",)},
        {"resume_tries_max": 17},
        {"resume_tries_max": -1},
        {"resume_stall_ms": 0.0},
        {"resume_stall_ms": 1e9},
        {"resume_age_ms_max": -1.0},
    ],
)
def test_more_resuming_than_is_done_here_is_refused(more: dict[str, object]) -> None:
    with pytest.raises(RefusedError) as caught:
        guard().read([plan(**more)])
    assert caught.value.refusal.reason is RefuseReason.INVALID_FIELD


def test_peers_are_listed_with_a_word_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "allow"
    path.write_text("d1:1/decode\np1:1/7\n")
    allowlist = Allowlist([read_entry("D2:1/decode")], path=path)
    assert [allowlist.allows_decode(HostPort(each)) for each in ("d1:1", "d2:1", "p1:1", "d3:1")] == [
        True,
        True,
        True,
        False,
    ]
    assert [each.address for each in allowlist.targets()] == ["p1:1"]


def test_a_prefill_leg_of_another_sidecar_is_known_by_its_header() -> None:
    assert guard().read([(b"x-pdcoord-leg", b"prefill")]).is_prefill_leg
    assert not guard(P1).read([(b"x-pdcoord-leg", b"prefill"), foreign(P1)]).is_prefill_leg


# Headers that pass.


@pytest.mark.parametrize("value", [b"abc-123", b"x" * 128])
def test_a_request_id_is_kept(value: bytes) -> None:
    assert guard().request_id([(b"x-request-id", value)]) == value


@pytest.mark.parametrize("value", [b"", b"a b", b"x" * 129, b"\xff", b"a\tb"])
def test_a_request_id_that_cannot_be_logged_is_replaced(value: bytes) -> None:
    assert guard().request_id([(b"x-request-id", value)]) == b"made"


def test_routing_headers_do_not_reach_an_engine() -> None:
    headers = [
        (b"x-prefiller-host-port", b"a:1"),
        (b"x-encoder-hosts-ports", b"a:1"),
        (b"x-data-parallel-host-port", b"a:1"),
        (b"x-kv-cache-source-host-port", b"a:1"),
        (b"x-gateway-destination-endpoint", b"a:1"),
        (b"x-pdcoord-plan", b"{}"),
        (b"x-pdcoord-anything", b"1"),
        (b"x-override-bootstrap-host", b"10.9.9.9"),
        (b"x-request-id", b"other"),
        (b"host", b"pod"),
        (b"accept-encoding", b"gzip"),
        (b"content-length", b"3"),
        (b"authorization", b"Bearer k"),
        (b"content-type", b"application/json"),
    ]
    assert for_engine(headers, b"r1") == [
        (b"authorization", b"Bearer k"),
        (b"content-type", b"application/json"),
        (b"x-request-id", b"r1"),
    ]


def test_an_engine_cannot_speak_for_the_sidecar() -> None:
    headers = [(b"x-pdcoord-served", b"{}"), (b"x-request-id", b"e"), (b"server", b"uvicorn")]
    assert for_client(headers) == [(b"server", b"uvicorn")]


def ported(kv_port: int | None, bootstrap_port: int | None = None) -> tuple[bytes, bytes]:
    target = PrefillTarget(address=P1, kv_port=kv_port, bootstrap_port=bootstrap_port)
    return (b"x-pdcoord-plan", encode_plan(PlanHeader(prefills=(target,))))


@pytest.mark.parametrize(
    ("listed", "kv_port", "bootstrap_port", "is_refused"),
    [
        ("", None, None, False),
        ("", 14579, 8998, False),
        ("", 6379, None, True),
        ("", None, 22, True),
        ("/14600", 14600, None, False),
        ("/14600", 14579, None, True),
        ("/14600", None, 22, True),
    ],
)
def test_an_unsigned_plan_names_listed_ports_only(
    listed: str, kv_port: int | None, bootstrap_port: int | None, *, is_refused: bool
) -> None:
    strict = guard(HostPort(f"{P1}{listed}"))
    headers = [ported(kv_port, bootstrap_port)]
    assert strict.read(headers).refused == ({P1} if is_refused else set())
    assert not guard(is_open=True).read(headers).refused
    assert not replace(strict, seal=Sealed()).read(headers).refused


def test_ports_that_coordinators_tell_are_listed() -> None:
    strict = guard(P1)
    strict.allowlist.follow(Named(PrefillTarget(address=P1, kv_port=14600, bootstrap_port=9000)))
    assert not strict.read([ported(14600, 9000)]).refused
    assert strict.read([ported(14579, 9000)]).refused == {P1}
    assert strict.read([ported(14600, 8998)]).refused == {P1}


class Sealed:
    """Believes everybody."""

    def doubt(self, _what: Steering, _signature: bytes | None) -> Doubt | None:
        return None


class Named:
    """One target, as a coordinator tells it."""

    def __init__(self, target: PrefillTarget) -> None:
        self.target = target

    def get(self, address: HostPort) -> PrefillTarget | None:
        return self.target if address == self.target.address else None

    def targets(self) -> list[PrefillTarget]:
        return [self.target]

    def has_decode(self, _address: HostPort) -> bool:
        return False
