"""The control stream's messages: what is written is read again, and what nobody writes is refused by name."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.protocol import control_pb2 as pb
from pdcoord.protocol.control import (
    EVENTS_MAX,
    MESSAGE_BYTES_MAX,
    REQUESTS_MAX,
    TARGETS_MAX,
    ControlError,
    ControlLegKind,
    CoordinatorHello,
    CoordinatorMessage,
    Events,
    LegBegan,
    LegEnded,
    OutputBegan,
    PathFacts,
    RequestBegan,
    RequestEnded,
    SidecarHello,
    SidecarMessage,
    SidecarProof,
    Snapshot,
    Target,
    Targets,
    joined,
)
from pdcoord.protocol.control_codec import (
    RUNGS_MAX,
    TEXT_MAX,
    decode_notice,
    decode_report,
    encode_notice,
    encode_report,
)
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PATHS_MAX, PathReport
from pdcoord.protocol.plans import Mode, PlannedLoad, RungKind, RungTaken, ServedHeader

PROTOCOL = Path(__file__).resolve().parents[4] / "pdcoord" / "protocol"

texts = st.text(max_size=TEXT_MAX)
addresses = st.sampled_from([HostPort("10.0.0.1:8000"), HostPort("[::1]:1")])
wholes = st.integers(0, 1 << 50)
figures = st.floats(0.0, 1e12)
maybe_figures = st.none() | figures
times = wholes.map(lambda us: us / 1e6).filter(lambda s: round(s * 1e6) / 1e6 == s)
loads = st.builds(
    PlannedLoad,
    replica=texts,
    model=texts,
    prefill_us=wholes,
    prompt_tokens=wholes,
    landing_tokens=wholes,
    transfer_bytes=wholes,
)
requests = st.builds(
    RequestBegan, wholes, loads, st.none() | addresses, st.booleans(), st.booleans(), st.booleans(), times
)
rungs = st.builds(
    RungTaken, rung=st.sampled_from(RungKind), reason=st.sampled_from(RungReason), target=addresses
)
served = st.builds(
    ServedHeader,
    mode=st.sampled_from(Mode),
    prefill=st.none() | addresses,
    rungs=st.lists(rungs, max_size=3).map(tuple),
    prefill_ms=maybe_figures,
    transfer_ms=maybe_figures,
    cached_tokens=st.none() | wholes,
)
kinds = st.sampled_from(ControlLegKind)
legs = st.integers(1, 99)
events = st.one_of(
    requests,
    st.builds(LegBegan, wholes, legs, kinds, st.none() | addresses),
    st.builds(LegEnded, wholes, legs, kinds, st.none() | addresses, texts, times),
    st.builds(OutputBegan, wholes, served),
    st.builds(RequestEnded, wholes, texts, st.none() | served),
)
paths = st.builds(
    PathReport,
    target=addresses,
    kv_address=addresses,
    probe_count=wholes,
    age_s=times,
    failure=texts,
    detail=texts,
    verdict=texts,
    verdict_reason=texts,
    backend=texts,
    transport=texts,
    is_degraded=st.booleans(),
    latency_s=maybe_figures,
    bandwidth_bytes_per_s=maybe_figures,
)
reports: st.SearchStrategy[SidecarMessage] = st.one_of(
    st.builds(SidecarHello, st.integers(0, 99), texts, addresses, texts, st.binary(max_size=64)),
    st.builds(SidecarProof, st.binary(max_size=64)),
    st.builds(Snapshot, st.lists(requests, max_size=4).map(tuple), st.booleans()),
    st.builds(Events, st.lists(events, max_size=4).map(tuple)),
    st.builds(PathFacts, st.floats(0.1, 1e6), st.booleans(), st.lists(paths, max_size=3).map(tuple)),
)
ports = st.none() | st.integers(1, 65_535)
targets = st.builds(Target, addresses, texts, texts, texts, ports, ports)
notices: st.SearchStrategy[CoordinatorMessage] = st.one_of(
    st.builds(CoordinatorHello, st.integers(0, 99), texts, st.binary(max_size=64), st.binary(max_size=64)),
    st.builds(
        Targets,
        st.lists(targets, max_size=3).map(tuple),
        st.lists(addresses).map(tuple),
        st.booleans(),
        st.booleans(),
    ),
)


@given(reports)
def test_a_report_is_read_as_it_was_written(message: SidecarMessage) -> None:
    (raw,) = encode_report(message)
    assert decode_report(raw) == message


@given(notices)
def test_a_notice_is_read_as_it_was_written(message: CoordinatorMessage) -> None:
    (raw,) = encode_notice(message)
    assert decode_notice(raw) == message


WIDE = "\N{GRINNING FACE}" * (2 * TEXT_MAX)  # Four bytes each.
MOST = 1 << 50


def test_the_longest_snapshot_fits_in_parts_that_count_from_the_last_on() -> None:
    load = PlannedLoad(
        replica=WIDE,
        model=WIDE,
        prefill_us=MOST,
        prompt_tokens=MOST,
        landing_tokens=MOST,
        transfer_bytes=MOST,
    )
    request = RequestBegan(MOST, load, HostPort(WIDE), age_s=1e6, has_output=True)
    raw = encode_report(Snapshot((request,) * REQUESTS_MAX))
    assert len(raw) > 1
    assert max(map(len, raw)) < MESSAGE_BYTES_MAX
    parts = [decode_report(each) for each in raw]
    assert [isinstance(part, Snapshot) and part.has_more for part in parts] == [True] * (len(raw) - 1) + [
        False
    ]
    assert sum(len(part.requests) for part in parts if isinstance(part, Snapshot)) == REQUESTS_MAX


def test_the_longest_events_fit() -> None:
    rung = RungTaken(
        rung=RungKind.OTHER_PREFILL, reason=RungReason.PREFILL_UNREACHABLE, target=HostPort(WIDE)
    )
    served = ServedHeader(mode=Mode.SPLIT, prefill=HostPort(WIDE), rungs=(rung,) * (2 * RUNGS_MAX))
    told = Events(tuple(OutputBegan(number, served) for number in range(EVENTS_MAX)))
    raw = encode_report(told)
    assert max(map(len, raw)) < MESSAGE_BYTES_MAX
    parts = [decode_report(each) for each in raw]
    ordinals = [event.ordinal for part in parts if isinstance(part, Events) for event in part.events]
    assert ordinals == list(range(EVENTS_MAX))


def test_the_longest_list_of_probes_fits() -> None:
    at, wide = HostPort(WIDE), WIDE
    path = PathReport(
        target=at,
        kv_address=at,
        probe_count=1,
        failure=wide,
        detail=wide,
        verdict=wide,
        verdict_reason=wide,
        backend=wide,
        transport=wide,
        latency_s=1.0,
    )
    raw = encode_report(PathFacts(30.0, True, (path,) * PATHS_MAX))
    assert max(map(len, raw)) < MESSAGE_BYTES_MAX
    parts = [decode_report(each) for each in raw]
    assert sum(len(part.paths) for part in parts if isinstance(part, PathFacts)) == PATHS_MAX


def test_the_longest_list_of_targets_fits_in_parts_that_count_from_the_last_on() -> None:
    at = HostPort(WIDE)
    told = Targets(
        (Target(at, WIDE, WIDE, WIDE, 65_535, 65_535),) * TARGETS_MAX,
        (at,) * TARGETS_MAX,
        is_whole=True,
        decodes=(at,) * TARGETS_MAX,
        decodes_removed=(at,) * TARGETS_MAX,
    )
    raw = encode_notice(told)
    assert max(map(len, raw)) < MESSAGE_BYTES_MAX
    parts = [decode_notice(each) for each in raw]
    assert all(isinstance(part, Targets) and part.is_whole for part in parts)
    lists = [part for part in parts if isinstance(part, Targets)]
    assert joined(lists[:-1]) is None
    whole = joined(lists)
    assert whole is not None
    lengths = map(len, (whole.changed, whole.removed, whole.decodes, whole.decodes_removed))
    assert set(lengths) == {TARGETS_MAX}
    assert (whole.is_whole, whole.has_more) == (True, False)
    with pytest.raises(ControlError, match="more than 16384 targets"):
        joined([*lists[:-1], *lists])


@pytest.mark.parametrize(
    "message",
    [
        pb.SidecarReport(events=pb.Events(events=[pb.Event()] * (EVENTS_MAX + 1))),
        pb.SidecarReport(snapshot=pb.Snapshot(requests=[pb.RequestBegan()] * (REQUESTS_MAX + 1))),
        pb.SidecarReport(paths=pb.PathFacts(interval_s=1.0, paths=[pb.PathFact()] * (PATHS_MAX + 1))),
    ],
)
def test_a_list_is_bounded(message: pb.SidecarReport) -> None:
    with pytest.raises(ControlError, match="expected at most"):
        decode_report(message.SerializeToString())


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_control_error(raw: bytes) -> None:
    for decode in (decode_report, decode_notice):
        with contextlib.suppress(ControlError):
            decode(raw)


@pytest.mark.parametrize(
    ("report", "named"),
    [
        (pb.SidecarReport(), "no body"),
        (pb.SidecarReport(events=pb.Events(events=[pb.Event()])), "no body"),
        (pb.SidecarReport(snapshot=pb.Snapshot(requests=[pb.RequestBegan(age_us=1 << 60)])), "figure"),
        (pb.SidecarReport(paths=pb.PathFacts(interval_s=0.0)), "interval_s"),
        (pb.SidecarReport(paths=pb.PathFacts(interval_s=float("nan"))), "nan"),
        (pb.SidecarReport(events=pb.Events(events=[pb.Event(leg_began=pb.LegBegan(kind="x"))])), "'x'"),
        (
            pb.SidecarReport(
                events=pb.Events(events=[pb.Event(output_began=pb.OutputBegan(served=pb.Served(mode="y")))])
            ),
            "'y'",
        ),
    ],
)
def test_what_no_sidecar_tells_is_refused_by_name(report: pb.SidecarReport, named: str) -> None:
    with pytest.raises(ControlError, match=named):
        decode_report(report.SerializeToString())


def test_a_port_that_is_none_is_refused() -> None:
    notice = pb.CoordinatorNotice(targets=pb.Targets(changed=[pb.Target(address="a:1", kv_port=70_000)]))
    with pytest.raises(ControlError, match="70000"):
        decode_notice(notice.SerializeToString())


def test_a_rung_of_a_later_release_is_left_out_and_fields_of_one_are_ignored() -> None:
    told = pb.Served(mode="split", rungs=[pb.Rung(rung="new", reason="prefill-error", target="p:1")])
    report = pb.SidecarReport(
        events=pb.Events(events=[pb.Event(output_began=pb.OutputBegan(ordinal=1, served=told))])
    )
    unknown_field = b"\xfa\x06\x01x"  # Field 111, one byte long.
    message = decode_report(report.SerializeToString() + unknown_field)
    assert message == Events((OutputBegan(1, ServedHeader(mode=Mode.SPLIT)),))


def test_texts_are_cut() -> None:
    hello = SidecarHello(1, "n" * 10_000, HostPort("a:1"), "e", b"")
    read = decode_report(*encode_report(hello))
    assert isinstance(read, SidecarHello)
    assert len(read.name) == TEXT_MAX


def test_the_generated_code_is_that_of_the_proto_file(tmp_path: Path) -> None:
    root = PROTOCOL.parents[1]
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{root}"),
            *(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"),
            str(PROTOCOL / "control.proto"),
        ],
        check=True,
        cwd=root,
    )
    made = tmp_path / "pdcoord" / "protocol"
    assert (made / "control_pb2.pyi").read_text() == (PROTOCOL / "control_pb2.pyi").read_text()
    assert descriptor(made / "control_pb2.py") == descriptor(PROTOCOL / "control_pb2.py"), "run make docs"


def descriptor(path: Path) -> str:
    """The part that says what the messages are; the rest depends on the generator's version."""
    found = re.search(r"AddSerializedFile\((.*)\)", path.read_text())
    assert found is not None
    return found[1]
