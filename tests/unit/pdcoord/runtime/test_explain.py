"""The table that tells a person why."""

import io
from typing import Any

import pytest
from rich.console import Console

from pdcoord.core.events import DecodeFailed, Outcome, RequestEnded, ResponseBegan, StreamBroke
from pdcoord.core.plan import Why
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.plans import Mode, RungKind, RungTaken, ServedHeader
from pdcoord.runtime.explain import REASONS, UNREACHABLE, WIDTH_MAX, explain, render


def draw(view: Any, width: int = WIDTH_MAX) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render(view))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return text


def test_every_reason_has_its_words() -> None:
    assert set(REASONS) == set(Why)


def test_a_split_request_is_shown_beside_its_alternative_with_the_margin(bench: Any) -> None:
    plan = bench.arrive()
    served = ServedHeader(
        mode=Mode.SPLIT, prefill=plan.prefill.address, prefill_ms=91.2, transfer_ms=44.0, cached_tokens=128
    )
    bench.loop.handle(ResponseBegan(plan.request_id, served))
    bench.loop.handle(RequestEnded(plan.request_id, Outcome.OK))
    text = draw(bench.loop.decision_view("r-1"))
    assert "split because the prefill elsewhere saves more than the transfer costs (split-faster)" in text
    row = next(line for line in text.splitlines() if "= compared" in line)
    gain_ms = (plan.runner_up.figures.time_s - plan.chosen.figures.time_s) * 1e3
    assert f"{gain_ms:+,.1f} ms" in row
    assert plan.prefill.id in text
    assert plan.decode.id in text
    assert "91.2 ms" in text
    assert "128 tokens were cached" in text
    assert "Rungs taken: none" in text
    assert "Ladder: other-prefill" in text


def test_an_adapter_is_named_where_one_was_asked_for(bench: Any) -> None:
    bench.arrive("plain")
    bench.arrive("tuned", adapter="sql")
    assert "model m, prompt" in draw(bench.loop.decision_view("plain"))
    assert "model m, adapter sql, prompt" in draw(bench.loop.decision_view("tuned"))


def test_a_stream_that_went_on_elsewhere_says_where_it_broke_off_and_why(bench: Any) -> None:
    plan = bench.arrive()
    bench.loop.handle(ResponseBegan(plan.request_id, None))
    bench.loop.handle(StreamBroke(plan.request_id, RungReason.DECODE_STALLED, 1_234))
    text = draw(bench.loop.decision_view("r-1"))
    assert f"Broke off at {plan.decode.id} after 1,234 tokens: decode-stalled" in text
    assert "Attempt 2" in text


def test_rungs_taken_are_listed_with_their_reasons(bench: Any) -> None:
    plan = bench.arrive()
    taken = RungTaken(rung=RungKind.COLOCATED, reason=RungReason.PREFILL_TIMEOUT, target=plan.prefill.address)
    bench.loop.handle(ResponseBegan(plan.request_id, ServedHeader(mode=Mode.COLOCATED, rungs=(taken,))))
    text = draw(bench.loop.decision_view("r-1"))
    row = next(line for line in text.splitlines() if "prefill-timeout" in line)
    assert plan.prefill.id in row
    assert "colocated" in row
    assert "still being served" in text


def test_attempts_and_the_final_refusal_are_told_apart(bench: Any) -> None:
    plan = bench.arrive()
    for _ in range(2):
        bench.loop.handle(DecodeFailed(plan.request_id, RungReason.DECODE_UNREACHABLE))
    text = draw(bench.loop.decision_view("r-1"))
    assert "Attempt 1" in text
    assert "Attempt 2" in text
    assert "Failed at wide/d0: decode-unreachable" in text
    assert "Refused: ladder-exhausted" in text


def test_a_request_without_an_alternative_has_no_empty_columns(bench: Any) -> None:
    bench.arrive("short", tokens=10)
    text = draw(bench.loop.decision_view("short"))
    assert "runner-up" not in text
    assert "There was no other candidate" in text


def test_drops_are_named(make_bench: Any) -> None:
    bench = make_bench()
    bench.load()
    bench.ready("fast/p0", "wide/d0")
    bench.arrive()
    text = draw(bench.loop.decision_view("r-1"))
    assert "Not candidates: " in text
    assert "not-ready" in text


def test_it_stays_readable_on_a_narrow_screen(bench: Any) -> None:
    bench.arrive()
    draw(bench.loop.decision_view("r-1"), width=60)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://127.0.0.1:1", "give --admin-ca-file"),
        ("http://", "is neither http://host:port"),
        ("ftp://x", "is neither http://host:port"),
    ],
)
def test_an_address_that_cannot_be_asked_is_said_so(
    url: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain("r", url) == UNREACHABLE
    assert said in capsys.readouterr().err
