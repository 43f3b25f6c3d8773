"""PoolPolicy objects of an API server to one policy in force, and to what each object is told of itself."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pdcoord.policy.advice import warnings_of
from pdcoord.policy.checks import Parts, Use, names_of, repeat_message
from pdcoord.policy.compile import CompiledPolicy, compile_policy
from pdcoord.policy.crd import CONDITION, MESSAGE_LENGTH_MAX
from pdcoord.policy.errors import PolicyError, Problem, format_key_path
from pdcoord.policy.forms import document_of
from pdcoord.policy.load import PolicyDocument, parts_of, read_policy

Given = Mapping[str, Any]
"""An object as the API server sent it."""


class Reason(StrEnum):
    """Why an object is in force or not; `reason` of its condition."""

    ACCEPTED = "Accepted"
    INVALID = "Invalid"
    CONFLICTED = "Conflicted"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be told of one object; the same in every process that sees the same objects.

    Attributes:
        generation: the one that was judged.
        pools: how many there are; None where the object is refused.
        message: one line: what is in force, or path, value and remedy of everything that is wrong.
        problems: the same for logs, each with the object's name; empty where it is accepted.
    """

    name: str
    generation: int
    reason: Reason
    pools: int | None
    message: str
    problems: tuple[Problem, ...] = ()

    @property
    def is_accepted(self) -> bool:
        return self.reason is Reason.ACCEPTED


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one look at all objects gave.

    Attributes:
        objects: those that were looked at, less those that are being deleted.
        verdicts: one for each of them, by name.
    """

    objects: Mapping[str, Given]
    verdicts: Mapping[str, Verdict]
    compiled: CompiledPolicy


class Standing(StrEnum):
    """How an object stood before, which says who keeps a name that two objects have; first come first."""

    ACCEPTED = "0 accepted as it is"
    CHANGED = "1 changed since it was accepted"
    NONE = "2 never accepted, or refused"


@dataclass(frozen=True, slots=True)
class _Known:
    """What is remembered of an object.

    Attributes:
        content: `apiVersion`, `kind` and `spec`, which decide with the name alone what the object means.
        policy: what it says now, if it is sound by itself.
        problems: why it is not.
        good: the last content that was accepted; None if none ever was.
    """

    uid: str
    content: tuple[Any, ...]
    policy: PolicyDocument | None
    problems: tuple[Problem, ...]
    good: PolicyDocument | None = None


class ObjectJudge:
    """Judges objects one by one and beside each other, and keeps the last good content of each.

    Of two objects that are sound by themselves but have a name in common (of a model, an alias, an adapter
    or a pool) the one keeps it that was accepted before; if that is true of both or neither, one that has not
    changed since, then the older. What was accepted before is read from the objects' own status, so that all
    processes, and one that starts anew, judge alike; what is remembered counts where there is no status.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._in_force: tuple[PolicyDocument, ...] = ()
        self._compiled = compile_policy(())

    def judge(self, objects: Mapping[str, Given]) -> Judgement:
        """Look at all objects there are; those that are gone take their content with them.

        The compiled policy is the same object as long as what is in force is the same.
        """
        live = {name: given for name, given in objects.items() if not _metadata(given, "deletionTimestamp")}
        self._known = {name: self._read(name, given) for name, given in live.items()}
        order = sorted(live, key=lambda name: self._rank(name, live[name]))
        held: dict[tuple[str, str], Use] = {}
        verdicts: dict[str, Verdict] = {}
        for name in order:
            verdicts[name] = self._verdict(name, generation_of(live[name]), held)
        in_force = {name: self._known[name].good for name in order if verdicts[name].is_accepted}
        for name in order:
            good = self._known[name].good
            if name not in in_force and good is not None and not any(_clashes(parts_of(good), held)):
                in_force[name] = good
                _hold(parts_of(good), held)
        self._use(tuple(good for _, good in sorted(in_force.items()) if good is not None))
        return Judgement(live, verdicts, self._compiled)

    def _use(self, documents: tuple[PolicyDocument, ...]) -> None:
        if len(documents) != len(self._in_force) or any(
            new is not old for new, old in zip(documents, self._in_force, strict=True)
        ):
            self._in_force, self._compiled = documents, compile_policy(documents)

    def _read(self, name: str, given: Given) -> _Known:
        uid = str(_metadata(given, "uid"))
        content = (given.get("apiVersion"), given.get("kind"), given.get("spec"))
        known = self._known.get(name)
        if known is not None and known.uid != uid:
            known = None  # Deleted and made anew.
        if known is not None and known.content == content:
            return known
        good = None if known is None else known.good
        try:
            return _Known(uid, content, read_policy(document_of(given)), (), good)
        except PolicyError as error:
            return _Known(uid, content, None, error.problems, good)

    def _rank(self, name: str, given: Given) -> tuple[Standing, str, str]:
        return self._standing(name, given), str(_metadata(given, "creationTimestamp")), name

    def _standing(self, name: str, given: Given) -> Standing:
        told = condition_of(given)
        if told is not None:
            if told.get("status") != "True":
                return Standing.NONE
            is_same = told.get("observedGeneration") == generation_of(given)
            return Standing.ACCEPTED if is_same else Standing.CHANGED
        known = self._known[name]
        if known.good is None:
            return Standing.NONE
        return Standing.ACCEPTED if known.good is known.policy else Standing.CHANGED

    def _verdict(self, name: str, generation: int, held: dict[tuple[str, str], Use]) -> Verdict:
        """Judge one object beside those that were accepted before it; if it is accepted, remember that."""
        known = self._known[name]
        if known.policy is None:
            return _refusal(name, generation, Reason.INVALID, known.problems)
        parts = parts_of(known.policy)
        clashes = tuple(_clashes(parts, held))
        if clashes:
            return _refusal(name, generation, Reason.CONFLICTED, clashes)
        _hold(parts, held)
        is_as_before = known.good is not None and known.good.spec == known.policy.spec
        good = known.good if is_as_before else known.policy
        self._known[name] = replace(known, policy=good, good=good)
        count = len(known.policy.spec.pools)
        serve = "1 pool serves" if count == 1 else f"{count} pools serve"
        told = [f"{serve} {known.policy.spec.model.name}"]
        told += [f"warning: {_in_object(warning)}" for warning in warnings_of([parts])]
        return Verdict(name, generation, Reason.ACCEPTED, count, _cut(told))


def condition_of(given: Given) -> Given | None:
    """What an object's status says of our condition; None where it says nothing."""
    status = given.get("status")
    conditions = status.get("conditions") if isinstance(status, Mapping) else None
    for condition in conditions if isinstance(conditions, list) else ():
        if isinstance(condition, Mapping) and condition.get("type") == CONDITION:
            return condition
    return None


def generation_of(given: Given) -> int:
    """`metadata.generation`, which a server counts up with every change of the spec; 0 if it does not."""
    generation = _metadata(given, "generation")
    return generation if isinstance(generation, int) else 0


def _metadata(given: Given, key: str) -> Any:
    metadata = given.get("metadata")
    return metadata.get(key, "") if isinstance(metadata, Mapping) else ""


def _clashes(parts: Parts, held: Mapping[tuple[str, str], Use]) -> Iterator[Problem]:
    """A problem for every name that an object has and another has already."""
    for use in names_of(parts):
        sort, name, document, path = use
        first = held.get((sort, name))
        if first is not None:
            yield document.problem(path, repeat_message(use, first))


def _hold(parts: Parts, held: dict[tuple[str, str], Use]) -> None:
    for use in names_of(parts):
        held.setdefault(use[:2], use)


def _refusal(name: str, generation: int, reason: Reason, problems: tuple[Problem, ...]) -> Verdict:
    message = _cut([_in_object(problem) for problem in problems])
    return Verdict(name, generation, reason, None, message, problems)


def _in_object(problem: Problem) -> str:
    """A problem where the object need not be named: its status."""
    path = format_key_path(problem.key_path)
    return f"{path}: {problem.message}" if path else problem.message


def _cut(told: Iterable[str]) -> str:
    """One line of at most MESSAGE_LENGTH_MAX characters; what does not fit is counted."""
    lines = list(told)
    text = ""
    for index, line in enumerate(lines):
        rest = f"; and {len(lines) - index} more"
        longer = f"{text}; {line}" if text else line
        if len(longer) + len(rest) > MESSAGE_LENGTH_MAX:
            return (text or line[: MESSAGE_LENGTH_MAX - len(rest)]) + rest
        text = longer
    return text
