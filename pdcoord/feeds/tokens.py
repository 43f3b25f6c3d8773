"""Token ids of prompts for models whose prefixes are precise, in time or not at all."""

import asyncio
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import assert_never

import xxhash

from pdcoord.core.fleet import Endpoint, EngineKind, ModelName
from pdcoord.core.model import Model, PrefixMode
from pdcoord.feeds.conversations import Ids
from pdcoord.feeds.rendering import (
    COMPLETION,
    TOKENIZE,
    ask,
    has_media,
    is_truncated,
    render_question,
    tokenize_question,
)
from pdcoord.feeds.scrapes import ScrapeFailure
from pdcoord.feeds.tokenizing import TEXT_BYTES_MAX, TextTokenizer, TokenizerFileError, Workers
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.openai import Call
from pdcoord.wire.client import Client


class TokenSource(StrEnum):
    """Where a prompt's tokens came from; closed, a label of metrics."""

    CALL = "call"
    LIBRARY = "library"
    ENGINE = "engine"
    RENDER = "render"
    NONE = "none"


class TokensMissing(StrEnum):
    """Why a prompt's tokens are not known; closed, a label of metrics."""

    DEADLINE = "deadline"
    BUSY = "busy"
    NO_SERVER = "no-server"
    FAILED = "failed"
    REFUSED = "refused"
    NO_TOKENIZER = "no-tokenizer"
    KIND = "kind"
    MEDIA = "media"
    MANY_PROMPTS = "many-prompts"
    TRUNCATED = "truncated"
    TOO_LONG = "too-long"
    NOT_TEXT = "not-text"


_OF_FAILURE: Mapping[ScrapeFailure, TokensMissing] = {
    ScrapeFailure.TIMEOUT: TokensMissing.DEADLINE,
    ScrapeFailure.STATUS: TokensMissing.REFUSED,
    ScrapeFailure.TOO_LARGE: TokensMissing.TOO_LONG,
    ScrapeFailure.UNREACHABLE: TokensMissing.FAILED,
    ScrapeFailure.DRAINING: TokensMissing.FAILED,
    ScrapeFailure.BROKEN: TokensMissing.FAILED,
    ScrapeFailure.UNREADABLE: TokensMissing.FAILED,
}


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """Bounds on tokenizing.

    Attributes:
        threads: texts tokenized at a time.
        queued_max: texts being and waiting to be tokenized; one more has no tokens.
        asked_max: questions to servers under way; one more is not asked.
        cache_bytes_max: of the texts kept per tokenizer, and of the servers' answers kept in all.
        refresh_s: how often tokenizer files and the list of ready engines are looked at.
        backoff_s_max: a server that fails is left alone for twice as long each time, up to this.
    """

    threads: int = 2
    queued_max: int = 256
    asked_max: int = 256
    cache_bytes_max: int = 64 << 20
    refresh_s: float = 0.5
    backoff_s_max: float = 30.0


@dataclass(slots=True)
class TokenHooks:
    """Who hears of it.

    Attributes:
        told: of every prompt of a precise model: where its tokens came from, or why there are none, and
            how long that took.
        file_failed: of a tokenizer file that cannot be used: path and reason, once per change of the file.
    """

    told: Callable[[ModelName, TokenSource, TokensMissing | None, float], None]
    file_failed: Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What became of a tokenizer file as it was at `stamp`."""

    stamp: tuple[int, int] | None
    tokenizer: TextTokenizer | None


@dataclass(slots=True)
class _Trouble:
    """A server that failed lately."""

    until_s: float
    count: int


class TokensFeed:
    """Tells the token ids of prompts; `run` keeps tokenizers and servers up to date.

    Args:
        models: those of the policy in force.
        ready: the endpoints of a model that may be asked.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        models: Callable[[], Iterable[Model]],
        ready: Callable[[ModelName], Iterable[Endpoint]],
        client: Client,
        clock: Callable[[], float],
        limits: TokenLimits,
        hooks: TokenHooks,
    ) -> None:
        self._models = models
        self._ready = ready
        self._client = client
        self._clock = clock
        self._limits = limits
        self._hooks = hooks
        self._workers = Workers(limits.threads, limits.queued_max)
        self._files: dict[str, _Loaded] = {}
        self._servers: dict[ModelName, list[HostPort]] = {}
        self._troubles: dict[HostPort, _Trouble] = {}
        self._answers = _Answers(limits.cache_bytes_max)
        self._turn = 0
        self._asked = 0

    async def run(self) -> None:
        """Keep up to date until cancelled, then let go of the threads."""
        try:
            while True:
                await self.refresh()
                await asyncio.sleep(self._limits.refresh_s)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the threads; what waits for them is given up."""
        self._workers.close()

    async def refresh(self) -> None:
        """Look at the policy, the tokenizer files and the ready engines once.

        A file is loaded in a thread, but the library parses it without letting go of the interpreter's
        lock: a large one holds up everything else for up to a second, when it is new or has changed.
        """
        precise = [model for model in self._models() if model.prefix_mode is PrefixMode.PRECISE]
        self._servers = {model.name: self._askable(model) for model in precise}
        asked = {address for addresses in self._servers.values() for address in addresses}
        self._troubles = {address: each for address, each in self._troubles.items() if address in asked}
        files = {model.tokenizing.file for model in precise} - {None}
        self._files = {file: loaded for file, loaded in self._files.items() if file in files}
        for file in sorted(file for file in files if file is not None):
            await self._reload(file)

    async def tokens(self, call: Call, model: Model) -> Ids | None:
        """The prompt's token ids within the model's deadline; None if they are not to be had."""
        began_s = self._clock()
        source, found = await self._find(call, model)
        missing = found if isinstance(found, TokensMissing) else None
        shown = source if missing is None else TokenSource.NONE
        self._hooks.told(model.name, shown, missing, self._clock() - began_s)
        return None if isinstance(found, TokensMissing) else found

    async def _find(self, call: Call, model: Model) -> tuple[TokenSource, Ids | TokensMissing]:
        prompt = call.body.get("prompt") if call.api.path == COMPLETION else None
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            (prompt,) = prompt
        refused = _not_tokenized(call, prompt)
        if refused is not None:
            return TokenSource.NONE, refused
        if isinstance(prompt, list):
            return TokenSource.CALL, array("I", prompt)
        tokenizer = self._tokenizer_of(model) if isinstance(prompt, str) else None
        try:
            if tokenizer is not None and isinstance(prompt, str):
                return TokenSource.LIBRARY, await self._tokenize(tokenizer, prompt, call, model)
            return await self._ask(call, model, prompt)
        except UnicodeError:  # Half a surrogate pair: JSON can hold it, UTF-8 cannot.
            return TokenSource.NONE, TokensMissing.NOT_TEXT
        except RecursionError:  # Nested as deep as could just be read, with less of the stack left by now.
            return TokenSource.NONE, TokensMissing.KIND

    def _tokenizer_of(self, model: Model) -> TextTokenizer | None:
        loaded = self._files.get(model.tokenizing.file or "")
        return loaded.tokenizer if loaded is not None else None

    async def _tokenize(
        self, tokenizer: TextTokenizer, prompt: str, call: Call, model: Model
    ) -> Ids | TokensMissing:
        has_specials = call.body.get("add_special_tokens") is not False
        future = self._workers.submit(tokenizer, prompt, has_specials=has_specials)
        if future is None:
            return TokensMissing.BUSY
        try:
            # Past the deadline the thread goes on: what it finds serves the next call of the conversation.
            async with asyncio.timeout(model.tokenizing.deadline_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            return TokensMissing.DEADLINE

    async def _ask(
        self, call: Call, model: Model, prompt: str | None
    ) -> tuple[TokenSource, Ids | TokensMissing]:
        if model.tokenizing.render is not None:
            source, target = TokenSource.RENDER, f"{call.api.path}/render"
            question: bytes | None = render_question(call, model.name)
        else:
            source, target = TokenSource.ENGINE, TOKENIZE
            question = tokenize_question(call, model.name, prompt)
        if question is None:
            return source, TokensMissing.KIND
        key = xxhash.xxh3_128_intdigest(question, seed=len(target))
        known = self._answers.get(key)
        if known is not None:
            return source, known
        address = self._next_server(model)
        if address is None:
            wanted = model.tokenizing.file is not None and isinstance(prompt, str)
            return source, TokensMissing.NO_TOKENIZER if wanted else TokensMissing.NO_SERVER
        if self._asked >= self._limits.asked_max:
            return source, TokensMissing.BUSY
        self._asked += 1
        try:
            answer = await ask(self._client, address, target, question, model.tokenizing.deadline_s)
        finally:
            self._asked -= 1
        self._note(address, answer)
        if isinstance(answer, ScrapeFailure):
            return source, _OF_FAILURE[answer]
        self._answers.keep(key, answer)
        return source, answer

    # Servers.

    def _askable(self, model: Model) -> list[HostPort]:
        """Whom to ask. SGLang 0.5.23 tokenizes prompts only, without the model's chat template."""
        if model.tokenizing.render is not None:
            return [model.tokenizing.render]
        return [each.address for each in self._ready(model.name) if each.pool.engine is EngineKind.VLLM]

    def _next_server(self, model: Model) -> HostPort | None:
        """The next in turn that is not in trouble."""
        addresses = self._servers.get(model.name)
        if not addresses:
            # The first may have become ready since the last look.
            addresses = self._servers[model.name] = self._askable(model)
        now_s = self._clock()
        for _ in addresses:
            self._turn += 1
            address = addresses[self._turn % len(addresses)]
            trouble = self._troubles.get(address)
            if trouble is None or trouble.until_s <= now_s:
                return address
        return None

    def _note(self, address: HostPort, answer: Ids | ScrapeFailure) -> None:
        """Leave a server alone that fails. A late answer or a refusal may be the question's own fault."""
        match answer:
            case array():
                self._troubles.pop(address, None)
            case ScrapeFailure.TIMEOUT | ScrapeFailure.STATUS | ScrapeFailure.TOO_LARGE:
                pass
            case (
                ScrapeFailure.UNREACHABLE
                | ScrapeFailure.DRAINING
                | ScrapeFailure.BROKEN
                | ScrapeFailure.UNREADABLE
            ):
                before = self._troubles.get(address)
                count = before.count + 1 if before is not None else 0
                pause_s = min(2.0 ** min(count, 16), self._limits.backoff_s_max)
                self._troubles[address] = _Trouble(self._clock() + pause_s, count)
            case _:
                assert_never(answer)

    # Files.

    async def _reload(self, file: str) -> None:
        path = Path(file)
        stamp = await asyncio.to_thread(_stamp, path)
        known = self._files.get(file)
        if known is not None and known.stamp == stamp:
            return
        tokenizer = known.tokenizer if known is not None else None
        try:
            tokenizer = await asyncio.to_thread(TextTokenizer, path, self._limits.cache_bytes_max)
        except TokenizerFileError as error:
            # The last good one stays: a file that is being replaced is missing for a moment.
            self._hooks.file_failed(file, str(error))
        self._files[file] = _Loaded(stamp, tokenizer)


def _not_tokenized(call: Call, prompt: object) -> TokensMissing | None:
    """Why the call is one whose blocks its tokens would not tell."""
    if call.api.path == COMPLETION and not isinstance(prompt, str | list):
        return TokensMissing.KIND
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return TokensMissing.MANY_PROMPTS
    if call.body.get("prompt_embeds") is not None:
        return TokensMissing.KIND
    if is_truncated(call):
        return TokensMissing.TRUNCATED
    if not isinstance(prompt, list) and len(call.prompt) > TEXT_BYTES_MAX:
        return TokensMissing.TOO_LONG
    if call.api.path != COMPLETION and has_media(call):
        return TokensMissing.MEDIA
    return None


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file does; None while it cannot be seen."""
    with suppress(OSError):
        status = path.stat()
        return status.st_mtime_ns, status.st_size
    return None


class _Answers:
    """What servers said lately, the longest unused out first."""

    _ENTRY_BYTES = 256

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._used_bytes = 0
        self._kept: OrderedDict[int, Ids] = OrderedDict()

    def get(self, key: int) -> Ids | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def keep(self, key: int, ids: Ids) -> None:
        if key not in self._kept:
            self._kept[key] = ids
            self._used_bytes += self._size(ids)
        while self._used_bytes > self._bytes_max:
            _, dropped = self._kept.popitem(last=False)
            self._used_bytes -= self._size(dropped)

    def _size(self, ids: Ids) -> int:
        return self._ENTRY_BYTES + ids.itemsize * len(ids)
