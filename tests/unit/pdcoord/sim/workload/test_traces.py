"""Traces: good rows are read, bad ones left out and named, and no file crashes a reader."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.workload import traces
from pdcoord.sim.workload.traces import TraceError, Window, read_azure, read_mooncake


def mooncake_row(at_ms: object = 0, prompt: object = 600, output: object = 5, ids: object = (1, 2)) -> str:
    row = {"timestamp": at_ms, "input_length": prompt, "output_length": output, "hash_ids": ids}
    return json.dumps({key: value for key, value in row.items() if value is not None})


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace"
    path.write_text("\n".join(lines) + "\n")
    return path


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def test_mooncake_rows_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    path = write(tmp_path, mooncake_row(1000), mooncake_row(4000, 512, 9, [7]), "", mooncake_row(2500))
    trace = read_mooncake(path, Window())
    assert [(row.at_s, row.prompt_tokens, row.output_tokens) for row in trace.rows] == [
        (0.0, 600, 5),
        (1.5, 600, 5),
        (3.0, 512, 9),
    ]
    assert trace.rows[2].hash_ids == (7,)
    assert trace.notes("trace") == []


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no JSON object"),
        ("[" * 100_000, "is not JSON"),
        (mooncake_row(None), "timestamp is missing, expected milliseconds of 0 or more"),
        (mooncake_row(-1), "timestamp is -1, expected milliseconds of 0 or more"),
        (mooncake_row(float("nan")), "timestamp is not finite, expected milliseconds of 0 or more"),
        (mooncake_row(True), "timestamp is a bool, expected milliseconds of 0 or more"),
        (mooncake_row(prompt=0), "input_length is 0, expected a whole number from 1 to 10000000"),
        (mooncake_row(prompt=1.5), "input_length is 1.5, expected a whole number from 1 to 10000000"),
        (mooncake_row(output=None), "output_length is missing, expected a whole number from 1 to 10000000"),
        (mooncake_row(output=10**30), "output_length is a number of more than 20 digits, expected"),
        (mooncake_row(ids=None), "hash_ids is missing, expected 2 ids for 600 tokens in blocks of 512"),
        (mooncake_row(ids=[1]), "hash_ids is a list of 1, expected 2 ids for 600 tokens in blocks of 512"),
        (mooncake_row(ids=[1, -2]), "hash_ids holds -2, expected whole numbers below 2^64"),
        (mooncake_row(ids=[1, "x"]), 'hash_ids holds "x", expected whole numbers below 2^64'),
    ],
)
def test_a_bad_mooncake_row_is_left_out_and_named(tmp_path: Path, row: str, why: str) -> None:
    trace = read_mooncake(write(tmp_path, mooncake_row(), row, mooncake_row(9)), Window())
    assert len(trace.rows) == 2
    assert trace.skipped_count == 1
    assert trace.notes("t.jsonl")[0].startswith(f"t.jsonl: row 2: {why}")


def test_azure_rows_are_read_by_column_names(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "\ufeffGeneratedTokens,TIMESTAMP,ContextTokens",
        "44,2023-11-16 18:15:46.6805900,374",
        "7,2023-11-16 18:15:47.6805900,20",
        "8,2023-11-16 18:15:48.680590+00:00,21",
    )
    trace = read_azure(path, Window())
    assert [(row.prompt_tokens, row.output_tokens) for row in trace.rows] == [(374, 44), (20, 7), (21, 8)]
    assert [row.at_s for row in trace.rows] == pytest.approx([0.0, 1.0, 2.0], abs=1e-5)
    assert trace.notes("t") == []


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("yesterday,1,2", 'TIMESTAMP is "yesterday", expected such as 2023-11-16 18:15:46.68'),
        ("2023-11-16 18:15:46,1", "has 2 columns, expected at least 3"),
        ("2023-11-16 18:15:46,0,2", 'ContextTokens is "0", expected a whole number from 1 to 10000000'),
        ("2023-11-16 18:15:46,1,-2", 'GeneratedTokens is "-2", expected a whole number from 1 to 10000000'),
        ("2023-11-16 18:15:46,1," + "9" * 5000, "GeneratedTokens is "),
        ("2001-11-16 18:15:46,1,2", "is earlier than the first row that can be used; sort the file by time"),
    ],
)
def test_a_bad_azure_row_is_left_out_and_named(tmp_path: Path, row: str, why: str) -> None:
    trace = read_azure(write(tmp_path, HEADER, "2023-11-16 18:15:46,1,2", row), Window())
    assert len(trace.rows) == 1
    assert trace.notes("t")[0].startswith(f"t: row 3: {why}")


def test_a_window_cuts_out_rows_and_starts_at_its_own_beginning(tmp_path: Path) -> None:
    path = write(tmp_path, *(mooncake_row(1000 * second) for second in range(10)))
    trace = read_mooncake(path, Window(from_s=2.0, until_s=8.0))
    assert [row.at_s for row in trace.rows] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert len(read_mooncake(path, Window(rows_max=3)).rows) == 3
    assert len(read_mooncake(path, Window(rows_max=3, from_s=8.0)).rows) == 2


def test_rows_that_are_too_long_for_the_engines_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, mooncake_row(), mooncake_row(1, 512, 5, [7]))
    trace = read_mooncake(path, Window(context_tokens_max=520))
    assert [row.prompt_tokens for row in trace.rows] == [512]
    assert trace.notes("t") == ["t: 1 rows were left out: more tokens than context_tokens_max"]


def test_of_many_bad_rows_the_first_are_named_and_all_counted(tmp_path: Path) -> None:
    trace = read_mooncake(write(tmp_path, mooncake_row(), *["x"] * 50), Window())
    notes = trace.notes("t")
    assert len(notes) == traces.NAMED_MAX + 1
    assert notes[-1] == "t: 50 rows were skipped, the first 20 are named"


def test_a_row_without_end_is_left_out_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "ROW_BYTES_MAX", 1_000)
    trace = read_mooncake(write(tmp_path, mooncake_row(), "x" * 5_500, mooncake_row(3)), Window())
    assert len(trace.rows) == 2
    assert trace.named == ["row 2: is longer than 1000 bytes"]


def test_a_trace_of_too_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "ROWS_MAX", 3)
    with pytest.raises(TraceError, match="has more than 3 rows; cut the file, or set first_rows"):
        read_mooncake(write(tmp_path, *[mooncake_row()] * 4), Window())
    assert len(read_mooncake(write(tmp_path, *[mooncake_row()] * 4), Window(rows_max=2)).rows) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column TIMESTAMP, ContextTokens, GeneratedTokens; its first line has none"),
        (
            "TIMESTAMP,Tokens\n",
            'has no column ContextTokens, GeneratedTokens; its first line has "TIMESTAMP"',
        ),
        (HEADER + "\nx,1,1\n", 'of which no row can be used: 1 are bad; row 2: TIMESTAMP is "x"'),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_azure(path, Window())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        read_mooncake(tmp_path / "none", Window())
    with pytest.raises(TraceError, match="cannot be read"):
        read_mooncake(tmp_path, Window())


@given(st.binary(max_size=300))
def test_no_bytes_crash_a_reader(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace"
    for head, read in ((b"", read_mooncake), (HEADER.encode() + b"\n", read_azure)):
        path.write_bytes(head + raw)
        try:
            trace = read(path, Window())
        except TraceError:
            continue
        assert trace.rows
