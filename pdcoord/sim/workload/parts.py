"""The kinds of traffic that a workload is mixed of: what the n-th arrival begins, and what follows on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Protocol

from pdcoord.sim.workload.amounts import Amount
from pdcoord.sim.workload.arrivals import Times
from pdcoord.sim.workload.content import Content, chained
from pdcoord.sim.workload.draws import Shares, mix, unit, zipf
from pdcoord.sim.workload.traces import MOONCAKE_BLOCK_TOKENS, Row

TURNS_MAX = 1 << 20
"""Turns of one session; its number and turn make the id of a call."""

# What a draw is for, and what a part of a content is; beyond every number of a call, session or turn.
_FIRST_WORD = 1 << 40
_GROUP, _OPENING, _FIRST, _NEXT, _OUTPUT, _TURNS, _PAUSE, _PICK = range(_FIRST_WORD, _FIRST_WORD + 8)
_SHARED, _OWN, _ANSWER, _HISTORY = range(_FIRST_WORD + 8, _FIRST_WORD + 12)


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of a part.

    Attributes:
        number: of the session, or of the call where it stands alone.
        turn: from 0.
        keys_after: as in Call.
    """

    number: int
    turn: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    keys: tuple[int, ...]
    keys_after: tuple[int, ...] = ()


class Part(Protocol):
    """One kind of traffic; every method gives the same for the same arguments.

    Attributes:
        has_sessions: whether calls may follow on others.
    """

    @property
    def has_sessions(self) -> bool: ...

    @property
    def call_count(self) -> int:
        """Calls in all, those that follow included."""
        ...

    def turns(self) -> Iterator[Turn]:
        """Those whose time is known beforehand, in the order of time."""
        ...

    def after(self, done: Turn, ended_s: float) -> Turn | None:
        """The turn that follows on one that has ended; `done.at_s` is not looked at."""
        ...


@dataclass(frozen=True)
class SharedPrefix:
    """Groups of prompts that begin alike, a finite pool served round and round in one shuffled order.

    The semantics of inference-perf's shared_prefix, 0.6: with `is_multi_turn` each prompt of the pool is a
    user, whose next turn is sent at its time in the schedule, or when the answer before it has ended if
    that is later. A conversation that would outgrow `context_tokens_max` begins anew.
    """

    times: Times
    seed: int
    key_tokens: int
    groups: int
    prompts_per_group: int
    system_len: Amount
    question_len: Amount
    output_len: Amount
    is_multi_turn: bool
    context_tokens_max: int

    @property
    def has_sessions(self) -> bool:
        return self.is_multi_turn

    @property
    def call_count(self) -> int:
        return len(self.times)

    @cached_property
    def _order(self) -> list[int]:
        order = list(range(self.groups * self.prompts_per_group))
        Random(self.seed).shuffle(order)  # noqa: S311  # traffic is not a secret
        return order

    @cached_property
    def _systems(self) -> list[Content]:
        drawn = mix(self.seed, _OPENING)
        shared = mix(self.seed, _SHARED)
        return [
            Content(self.key_tokens).then(mix(shared, group), self.system_len.tokens(unit(drawn, group)))
            for group in range(self.groups)
        ]

    @cached_property
    def _schedule(self) -> list[float]:
        """Arrivals, which those who talk in turns have to wait for."""
        return list(self.times)

    def turns(self) -> Iterator[Turn]:
        users = len(self._order)
        for number, at_s in enumerate(self.times):
            if not self.is_multi_turn:
                yield self._single(number, at_s)
            elif number < users:
                yield self._first(number, 0, at_s)
            else:
                return

    def _lengths(self, prompt: int) -> tuple[int, int]:
        """Of question and answer."""
        question = self.question_len.tokens(unit(mix(self.seed, _FIRST), prompt))
        return question, self.output_len.tokens(unit(mix(self.seed, _OUTPUT), prompt))

    def _single(self, number: int, at_s: float) -> Turn:
        prompt = self._order[number % len(self._order)]
        question, output = self._lengths(prompt)
        content = self._systems[prompt // self.prompts_per_group]
        content = content.then(mix(mix(self.seed, _OWN), prompt), question)
        return Turn(number, 0, at_s, content.token_count, output, content.keys)

    def _first(self, user: int, turn: int, at_s: float) -> Turn:
        """A conversation's beginning."""
        prompt = self._order[user]
        question, _ = self._lengths(prompt)
        own = mix(mix(self.seed, _OWN), prompt)
        content = self._systems[prompt // self.prompts_per_group].then(own, question)
        return self._turn(user, turn, at_s, content)

    def _turn(self, user: int, turn: int, at_s: float, content: Content) -> Turn:
        _, output = self._lengths(self._order[user])
        keys_after: tuple[int, ...] = ()
        if user + (turn + 1) * len(self._order) < len(self._schedule):
            keys_after = content.then(mix(_ANSWER, turn), output).keys
        return Turn(user, turn, at_s, content.token_count, output, content.keys, keys_after)

    def after(self, done: Turn, ended_s: float) -> Turn | None:
        if not self.is_multi_turn:
            return None
        user, turn = done.number, done.turn + 1
        place = user + turn * len(self._order)
        if place >= len(self._schedule):
            return None
        at_s = max(self._schedule[place], ended_s)
        history = done.prompt_tokens + done.output_tokens
        question, output = self._lengths(self._order[user])
        if history + question + output > self.context_tokens_max:
            return self._first(user, turn, at_s)
        said = mix(mix(mix(self.seed, _HISTORY), user), turn)
        content = Content(self.key_tokens, history, said, done.keys_after).then(said, question)
        return self._turn(user, turn, at_s, content)


@dataclass(frozen=True)
class Sessions:
    """Conversations and agents: each call's prompt is the one before, its answer, and something new.

    Attributes:
        times: when sessions begin.
        openings: how many shared beginnings there are, and how often each.
        opening_len: of a shared beginning: system prompt, tool descriptions.
        first_len: what a session asks first.
        next_len: what each later call adds: a question, or what a tool said.
        pause_s: from an answer's end to the next call: a person thinks, or a tool runs.
        context_tokens_max: a session ends before a call of more tokens, prompt and answer together.
    """

    times: Times
    seed: int
    key_tokens: int
    openings: Shares
    opening_count: int
    opening_len: Amount
    first_len: Amount
    next_len: Amount
    output_len: Amount
    turn_count: Amount
    pause_s: Amount
    context_tokens_max: int

    @property
    def has_sessions(self) -> bool:
        return True

    @cached_property
    def call_count(self) -> int:
        return sum(self._calls_of(number) for number in range(len(self.times)))

    def _calls_of(self, number: int) -> int:
        count = 1
        prompt = self._beginning(number).token_count
        output = self._output(number, 0)
        while (added := self._added(number, count, prompt + output)) is not None:
            prompt += output + added
            output = self._output(number, count)
            count += 1
        return count

    @cached_property
    def _shared(self) -> list[Content]:
        drawn = mix(self.seed, _OPENING)
        name = mix(self.seed, _SHARED)
        return [
            Content(self.key_tokens).then(mix(name, index), self.opening_len.tokens(unit(drawn, index)))
            for index in range(self.opening_count)
        ]

    def _beginning(self, number: int) -> Content:
        own = mix(self.seed, number)
        shared = self._shared[self.openings.at(unit(own, _GROUP))]
        return shared.then(mix(own, _OWN), self.first_len.tokens(unit(own, _FIRST)))

    def _output(self, number: int, turn: int) -> int:
        return self.output_len.tokens(unit(mix(mix(self.seed, number), turn), _OUTPUT))

    def _added(self, number: int, turn: int, history: int) -> int | None:
        """What a turn adds to a history of so many tokens; None where the session has ended."""
        own = mix(self.seed, number)
        if turn >= min(self.turn_count.tokens(unit(own, _TURNS)), TURNS_MAX):
            return None
        added = self.next_len.tokens(unit(mix(own, turn), _NEXT))
        if history + added + self._output(number, turn) > self.context_tokens_max:
            return None
        return added

    def turns(self) -> Iterator[Turn]:
        for number, at_s in enumerate(self.times):
            yield self._turn(number, 0, at_s, self._beginning(number))

    def _turn(self, number: int, turn: int, at_s: float, content: Content) -> Turn:
        output = self._output(number, turn)
        keys_after: tuple[int, ...] = ()
        if self._added(number, turn + 1, content.token_count + output) is not None:
            keys_after = content.then(_ANSWER, output).keys
        return Turn(number, turn, at_s, content.token_count, output, content.keys, keys_after)

    def after(self, done: Turn, ended_s: float) -> Turn | None:
        turn = done.turn + 1
        history = done.prompt_tokens + done.output_tokens
        added = self._added(done.number, turn, history)
        if added is None:
            return None
        # Who has come so far in this session has its whole history, so its number and turn stand for that.
        own = mix(mix(self.seed, done.number), turn)
        content = Content(self.key_tokens, history, own, done.keys_after).then(mix(own, _HISTORY), added)
        return self._turn(done.number, turn, ended_s + self.pause_s.at(unit(own, _PAUSE)), content)


@dataclass(frozen=True)
class Documents:
    """Questions about long documents that many ask about, some documents more often than others.

    Attributes:
        per_question: documents in one prompt, in the order they were found in.
    """

    times: Times
    seed: int
    key_tokens: int
    document_count: int
    popularity: float
    per_question: int
    system_tokens: int
    document_len: Amount
    question_len: Amount
    output_len: Amount

    @property
    def has_sessions(self) -> bool:
        return False

    @property
    def call_count(self) -> int:
        return len(self.times)

    @cached_property
    def _shares(self) -> Shares:
        return zipf(self.document_count, self.popularity)

    @cached_property
    def _system(self) -> Content:
        return Content(self.key_tokens).then(mix(self.seed, _SHARED), self.system_tokens)

    def turns(self) -> Iterator[Turn]:
        lengths, names = mix(self.seed, _OPENING), mix(self.seed, _GROUP)
        for number, at_s in enumerate(self.times):
            own = mix(self.seed, number)
            content = self._system
            for place in range(self.per_question):
                document = self._shares.at(unit(mix(own, _PICK), place))
                length = self.document_len.tokens(unit(lengths, document))
                content = content.then(mix(names, document), length)
            content = content.then(mix(own, _OWN), self.question_len.tokens(unit(own, _FIRST)))
            output = self.output_len.tokens(unit(own, _OUTPUT))
            yield Turn(number, 0, at_s, content.token_count, output, content.keys)

    def after(self, done: Turn, ended_s: float) -> Turn | None:  # noqa: ARG002  # the protocol's
        return None


@dataclass(frozen=True)
class Recorded:
    """Rows of a trace at their times; without hash ids no prompt shares anything with another."""

    rows: list[Row]
    seed: int
    key_tokens: int
    rate_factor: float

    @property
    def has_sessions(self) -> bool:
        return False

    @property
    def call_count(self) -> int:
        return len(self.rows)

    def turns(self) -> Iterator[Turn]:
        for number, row in enumerate(self.rows):
            if row.hash_ids:
                keys = chained(row.hash_ids, MOONCAKE_BLOCK_TOKENS, row.prompt_tokens, self.key_tokens)
            else:
                keys = Content(self.key_tokens).then(mix(self.seed, number), row.prompt_tokens).keys
            at_s = row.at_s / self.rate_factor
            yield Turn(number, 0, at_s, row.prompt_tokens, row.output_tokens, keys)

    def after(self, done: Turn, ended_s: float) -> Turn | None:  # noqa: ARG002  # the protocol's
        return None
