"""The policy in force: the last good content of a file that operators change while it is used."""

from dataclasses import dataclass
from pathlib import Path

from pdcoord.policy.compile import CompiledPolicy, compile_policy
from pdcoord.policy.errors import PolicyError, Problem
from pdcoord.policy.load import parse_policies
from pdcoord.policy.watch import FileWatch, Reading


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Nothing to do: the file is as it was, or holds what is in force again."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A new policy is in force.

    Attributes:
        refused: what of the change is not in force all the same, where parts are judged one by one.
    """

    compiled: CompiledPolicy
    refused: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The file changed to something that cannot be used; what was in force still is."""

    problems: tuple[Problem, ...]


class PolicyRegistry:
    """Reads a policy file and keeps its last good content.

    Attributes:
        compiled: what is in force; None until a policy was accepted.
        problems: why what the file holds now is not in force; empty when it is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._watch = FileWatch(path)
        self._digest: bytes | None = None
        self.compiled: CompiledPolicy | None = None
        self.problems: tuple[Problem, ...] = ()

    def load_first(self) -> CompiledPolicy:
        """Read the policy that a process starts with.

        Raises:
            PolicyError: if there is none that can be used.
        """
        return self._use(self._watch.read_now())

    def poll(self) -> Unchanged | Accepted | Refused:
        """Read the file again; each change is answered once, on the second poll that finds it."""
        reading = self._watch.poll()
        if reading is None:
            return Unchanged()
        if reading.digest == self._digest:
            self.problems = ()
            return Unchanged()
        try:
            return Accepted(self._use(reading))
        except PolicyError as error:
            return Refused(error.problems)

    def _use(self, reading: Reading) -> CompiledPolicy:
        try:
            if isinstance(reading.content, PolicyError):
                raise reading.content
            compiled = compile_policy(parse_policies(reading.content, str(self._path)))
        except PolicyError as error:
            self.problems = error.problems
            raise
        self.compiled, self.problems, self._digest = compiled, (), reading.digest
        return compiled
