"""Which beginnings of prompts the requests under way hold in the KV pools of their endpoints."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from pdcoord.core.request import BlockKey, Request, RequestId

STRIDE_BLOCKS = 8
"""Of so many blocks one is counted: to count each would take as long as to find what is cached."""


class PromptsInUse:
    """Prompts in use, by endpoint, and by request, which counts at one endpoint.

    A cached prefix that a request under way holds is shared by the next one that begins with it. One that
    nobody holds is room for others, of which the next one takes as much as if it had brought its KV along.
    Requests that another coordinator sent are not known here; what is shorter than a stride counts as idle.
    """

    def __init__(self) -> None:
        self._counts: defaultdict[int, Counter[BlockKey]] = defaultdict(Counter)
        self._sent: dict[RequestId, tuple[int, Sequence[BlockKey]]] = {}

    def hold(self, ordinal: int, request: Request) -> None:
        """A request was sent to an endpoint, given by its ordinal."""
        assert request.id not in self._sent, f"{request.id} is in use already"
        keys = _counted(request.block_keys)
        self._sent[request.id] = ordinal, keys
        if keys:
            self._counts[ordinal].update(keys)

    def let_go(self, request_id: RequestId) -> None:
        """A request is over; of one that holds nothing this is nothing."""
        ordinal, keys = self._sent.pop(request_id, (0, ()))
        if not keys:
            return
        counts = self._counts[ordinal]
        for key in keys:
            if counts[key] == 1:
                del counts[key]
            else:
                counts[key] -= 1
        if not counts:
            del self._counts[ordinal]

    def forget(self, ordinal: int) -> None:
        """The endpoint is gone, or is another process by now, which holds nothing."""
        if self._counts.pop(ordinal, None) is not None:
            self._sent = {name: sent for name, sent in self._sent.items() if sent[0] != ordinal}

    def rename(self, request_id: RequestId, to: RequestId) -> None:
        """A request goes on under another id."""
        if request_id in self._sent:
            self._sent[to] = self._sent.pop(request_id)

    def shared_tokens(self, ordinal: int, request: Request, cached_tokens: int) -> int:
        """How many of a prompt's cached tokens are in use at an endpoint.

        Args:
            cached_tokens: that the endpoint has of the prompt.

        Returns:
            0..cached_tokens, in whole strides of blocks as far as they are cached.
        """
        counts = self._counts.get(ordinal)
        if not counts:
            return 0
        # Blocks are cut by length of text; where tokens are counted there may be more of them in each.
        block_tokens = max(request.block_tokens, request.prompt_tokens // (len(request.block_keys) + 1))
        keys = _counted(request.block_keys)
        # The last token of a prompt is never cached, though its block may be.
        low, high = 0, min(len(keys), -(-cached_tokens // block_tokens) // STRIDE_BLOCKS)
        # Whoever holds a block holds all before it. Mostly all of what is cached is in use, or none of it.
        middle = high
        while low < high:
            if keys[middle - 1] in counts:
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return min(low * STRIDE_BLOCKS * block_tokens, cached_tokens)

    def validate(self, live: set[RequestId]) -> None:
        """Assert that the counts are those of the requests under way.

        Args:
            live: all requests under way.
        """
        assert self._sent.keys() <= live, "a prompt is in use by nobody"
        counts: defaultdict[int, Counter[BlockKey]] = defaultdict(Counter)
        for ordinal, keys in self._sent.values():
            if keys:
                counts[ordinal].update(keys)
        assert counts == self._counts, "the counts are not those of the prompts in use"


def _counted(keys: Sequence[BlockKey]) -> Sequence[BlockKey]:
    return keys[STRIDE_BLOCKS - 1 :: STRIDE_BLOCKS]
