from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from pdcoord.sim.study.lines import decode_result, encode_result, read_results, write_results
from pdcoord.sim.study.results import CallResult, Fate

MakeResult = Callable[..., CallResult]


def test_a_result_survives_its_line(make_result: MakeResult) -> None:
    for result in (make_result(3), make_result(4, fate=Fate.SHED, first_s=None, ended_s=4.5, prefill="")):
        assert decode_result(encode_result(result)) == result


def test_noise_below_a_microsecond_is_not_written(make_result: MakeResult) -> None:
    noisy = make_result(0, first_s=0.1 + 0.2)
    assert encode_result(noisy) == encode_result(make_result(0, first_s=0.3))


def test_bad_lines_are_named_and_left_out(make_result: MakeResult, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_results(path, [make_result(0), make_result(1)])
    raw = path.read_bytes() + b'\n{"id": "x"}\nnot json\n\xff\xfe\n'
    results, bad = read_results(raw)
    assert [result.id for result in results] == [0, 1]
    assert [line.number for line in bad] == [4, 5, 6]
    assert all(line.why for line in bad)


def test_a_line_of_something_else_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_result(b"[1]")
