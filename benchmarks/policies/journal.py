"""Runs that are done, kept in a file, so that a benchmark that was broken off goes on where it was."""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Self

from benchmarks.policies.jobs import Done, Job

ROOT = Path(__file__).resolve().parents[2]
CODE = (
    "pdcoord/**/*.py",
    "transfer/**/*.py",
    "benchmarks/policies/workloads/*.yaml",
    *(f"benchmarks/policies/{name}.py" for name in ("fleets", "jobs", "trouble", "workloads")),
)
"""What a run's outcome follows from, besides the job itself and traces."""


class OtherCodeError(Exception):
    """The file's runs were made by other code: remove it, or name another."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} has runs of other code than this: remove it or name another file")


def fingerprint(root: Path = ROOT) -> str:
    """Of the code and workloads that runs follow from."""
    whole = sha256()
    for path in sorted(path for pattern in CODE for path in root.glob(pattern)):
        whole.update(f"{path.relative_to(root)} {sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


class Journal:
    """One line for each run, below a line that says of which code; every line is written when its run ends.

    Raises:
        OtherCodeError: on entry, if the file is of other code.
    """

    def __init__(self, path: Path, code: str) -> None:
        self._path = path
        self._code = code
        self._file: BinaryIO | None = None
        self.known: dict[Job, Done] = {}

    def __enter__(self) -> Self:
        kept = self._read()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("r+b" if kept else "wb")
        if kept:
            # The last line is cut off where the run before was.
            self._file.seek(kept)
            self._file.truncate()
        else:
            self._write({"code": self._code})
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, done: Done) -> None:
        self.known[done.job] = done
        traces = None if done.job.traces is None else str(done.job.traces)
        self._write(
            {"job": asdict(done.job) | {"traces": traces}, "summary": done.summary, "wall_s": done.wall_s}
        )

    def _read(self) -> int:
        """How many bytes of the file are whole lines."""
        data = self._path.read_bytes() if self._path.exists() else b""
        kept = data.rfind(b"\n") + 1
        for index, line in enumerate(data[:kept].splitlines()):
            found: dict[str, Any] = json.loads(line)
            if index == 0:
                if found.get("code") != self._code:
                    raise OtherCodeError(self._path)
                continue
            of = found["job"]
            job = Job(**of | {"traces": None if of["traces"] is None else Path(of["traces"])})
            self.known[job] = Done(job, found["summary"], found["wall_s"])
        return kept

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError("the journal is written within its context only")
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
