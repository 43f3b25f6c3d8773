"""Runs kept in a file: what was done is known again, cut-off lines and other code are seen."""

from pathlib import Path

import pytest

from benchmarks.policies.jobs import Done, Job
from benchmarks.policies.journal import Journal, OtherCodeError, fingerprint


def done(seed: int, traces: Path | None = None) -> Done:
    job = Job("ABC", "llama", "llm-d", "mix", 1.0 / 3.0, seed, 20.0, traces=traces)
    return Done(job, {"goodput_per_s": 0.1 + seed}, 1.5)


def test_runs_are_known_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    made = [done(0), done(1, Path("traces"))]
    with Journal(path, "abc") as journal:
        assert journal.known == {}
        for each in made:
            journal.add(each)
    with Journal(path, "abc") as journal:
        assert journal.known == {each.job: each for each in made}
        journal.add(done(2))
    with Journal(path, "abc") as journal:
        assert len(journal.known) == 3


def test_a_line_that_was_cut_off_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with Journal(path, "abc") as journal:
        journal.add(done(0))
        journal.add(done(1))
    path.write_bytes(path.read_bytes()[:-20])
    with Journal(path, "abc") as journal:
        assert list(journal.known) == [done(0).job]
    assert path.read_bytes().endswith(b"\n")
    with Journal(path, "abc") as journal:
        journal.add(done(2))
    with Journal(path, "abc") as journal:
        assert list(journal.known) == [done(0).job, done(2).job]


def test_a_head_that_was_cut_off_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"code": "ab')
    with Journal(path, "abc") as journal:
        journal.add(done(0))
    with Journal(path, "abc") as journal:
        assert len(journal.known) == 1


def test_runs_of_other_code_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with Journal(path, "abc") as journal:
        journal.add(done(0))
    before = path.read_bytes()
    with pytest.raises(OtherCodeError, match=r"runs\.jsonl.*remove it"), Journal(path, "abd"):
        pass
    assert path.read_bytes() == before


def test_the_fingerprint_follows_code_and_workloads(tmp_path: Path) -> None:
    for name in ("pdcoord/core/x.py", "benchmarks/policies/workloads/a.yaml", "benchmarks/policies/page.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    found = fingerprint(tmp_path)
    (tmp_path / "benchmarks/policies/page.py").write_text("2")
    assert fingerprint(tmp_path) == found
    (tmp_path / "benchmarks/policies/workloads/a.yaml").write_text("2")
    second = fingerprint(tmp_path)
    (tmp_path / "pdcoord/core/x.py").write_text("2")
    assert len({found, second, fingerprint(tmp_path)}) == 3
