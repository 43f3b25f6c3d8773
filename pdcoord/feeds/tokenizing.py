"""A model's own tokenizer: its tokenizer.json, run by the `tokenizers` library in threads."""

import os
import threading
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tokenizers import Tokenizer

from pdcoord.feeds.conversations import (
    Conversations,
    Encoded,
    Encoding,
    Ids,
    encode_end,
    encode_whole,
    keys_of,
)

FILE_BYTES_MAX = 256 << 20
TEXT_BYTES_MAX = 1 << 20
"""Longer texts are not tokenized: more than the blocks that are hashed of a prompt (8192 of 16 tokens), and
far more than any deadline allows."""
_SAMPLES = ("Two words", "Another, longer sample.")

# The library's own threads would only outnumber ours: one text is one piece of work.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TokenizerFileError(Exception):
    """A tokenizer.json that cannot be used; the message is one line."""


class TextTokenizer:
    """One tokenizer.json with the texts that it has tokenized lately; safe to use from any thread.

    Raises:
        TokenizerFileError: if the file cannot be read or is no tokenizer.
    """

    def __init__(self, path: Path, cache_bytes_max: int) -> None:
        self._tokenizer = _load(path)
        self._texts = Conversations(cache_bytes_max)
        self._lock = threading.Lock()
        self._head, self._tail = self._specials()

    @property
    def cache_bytes(self) -> int:
        return self._texts.used_bytes

    def encode(self, text: str, *, has_specials: bool) -> Ids:
        """Token ids of a text.

        Args:
            has_specials: with what the tokenizer puts around a prompt, such as a token that begins it.

        Raises:
            UnicodeError: if the text holds half a surrogate pair.
        """
        ids = self._encoded(text).ids
        return self._head + ids + self._tail if has_specials else ids

    def _encoded(self, text: str) -> Encoded:
        key, keys = keys_of(text)
        with self._lock:
            known, near = self._texts.get(key), self._texts.nearest(keys)
        if known is not None:
            return known
        found = None
        if near is not None:
            found = encode_end(self._encode, text, keys, *near)
        if found is None:
            found = encode_whole(self._encode, text, keys)
        with self._lock:
            self._texts.keep(key, found)
        return found

    def _encode(self, text: str) -> Encoding:
        # Only the batch call lets go of the interpreter's lock (tokenizers 0.23); `encode` would hold up
        # every stream for its whole run.
        encoding: Encoding = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        return encoding

    def _specials(self) -> tuple[Ids, Ids]:
        """What stands before and behind a text that is tokenized as a prompt.

        Raises:
            TokenizerFileError: if the text's own tokens do not stand in between.
        """
        bare, full = self._both(_SAMPLES[0])
        for start in range(len(full) - len(bare) + 1):
            head, tail = full[:start], full[start + len(bare) :]
            if all(full == head + bare + tail for bare, full in map(self._both, _SAMPLES)):
                return array("I", head), array("I", tail)
        raise TokenizerFileError("its special tokens are not around a prompt's own; ask the engine instead")

    def _both(self, text: str) -> tuple[list[int], list[int]]:
        """A text's tokens without and with special ones."""
        bare, full = (self._tokenizer.encode(text, add_special_tokens=added) for added in (False, True))
        return bare.ids, full.ids


def _load(path: Path) -> Tokenizer:
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise TokenizerFileError(f"it is {size} bytes, expected at most {FILE_BYTES_MAX}")
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except OSError as error:
        raise TokenizerFileError(error.strerror or str(error)) from error
    except ValueError as error:
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise TokenizerFileError(f"it is no tokenizer.json: {first[:200]}") from error
    # Engines cut or fill a prompt by what its call says, not by what the file says.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Workers:
    """A few threads with a bound on what waits for them.

    Args:
        queued_max: pieces of work under way and waiting together.
    """

    def __init__(self, threads: int, queued_max: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokens")
        self._room = threading.Semaphore(queued_max)

    def submit(self, tokenizer: TextTokenizer, text: str, *, has_specials: bool) -> "Future[Ids] | None":
        """Have a text tokenized; None where as much as may be waits already."""
        if not self._room.acquire(blocking=False):
            return None
        future = self._executor.submit(tokenizer.encode, text, has_specials=has_specials)
        future.add_done_callback(lambda _: self._room.release())
        return future

    def close(self) -> None:
        """Let what runs end, and nothing else begin."""
        self._executor.shutdown(wait=False, cancel_futures=True)
