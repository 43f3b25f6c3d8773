"""The errors of policy, cut by what the caller does next.

PolicyError   a file that a person wrote is refused: change nothing, show the problems
"""

from collections.abc import Iterable
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]
"""Where a value stands in a document: mapping keys and sequence indexes from the root."""

PROBLEMS_SHOWN_MAX = 100


def format_key_path(path: KeyPath) -> str:
    """Write a path as `pools[1].layout.block_tokens`; the root is the empty string."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isascii() and part.replace("_", "").replace("-", "").isalnum():
            text += f".{part}" if text else part
        else:
            text += f"[{quote(part)}]"  # A label such as llm-d.ai/role would read as two keys.
    return text


def quote(text: str, length_max: int = 80) -> str:
    """Write a person's text on one line, cut to `length_max` characters, in double quotes."""
    shown = text if len(text) <= length_max else text[:length_max] + "…"
    escaped = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in shown.replace("\\", "\\\\"))
    return '"' + escaped.replace('"', '\\"') + '"'


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one place of one file.

    Attributes:
        file: the file as the operator named it.
        line: counted from 1; None where the whole file is meant.
        key_path: the value at fault; empty where no key can be named.
        message: names the value and the remedy.
    """

    file: str
    line: int | None
    key_path: KeyPath
    message: str

    def __str__(self) -> str:
        return self.format()

    def format(self, label: str = "") -> str:
        """`FILE:LINE: key.path: message`, with a label such as `warning` after the place."""
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        parts = [place, label, format_key_path(self.key_path), self.message]
        return ": ".join(part for part in parts if part)


class PolicyError(Exception):
    """A policy, endpoints or fleet file is refused as a whole.

    Attributes:
        problems: everything found wrong, at least one, in the order of the file's lines.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.file, problem.line or 0)))
        super().__init__(self.problems)

    def __str__(self) -> str:
        """One line per problem, the first PROBLEMS_SHOWN_MAX of them."""
        lines = [str(problem) for problem in self.problems[:PROBLEMS_SHOWN_MAX]]
        left_out = len(self.problems) - len(lines)
        if left_out:
            lines.append(f"... and {left_out} more")
        return "\n".join(lines)
