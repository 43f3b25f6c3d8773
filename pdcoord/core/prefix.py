"""Approximate prefix index: which endpoint was sent which blocks, bounded by an LRU per endpoint."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress, count
from operator import ne

from pdcoord.core.request import BlockKey

FEW_BITS = 8
"""Up to so many bits of a mask are found faster one by one than in its digits, at 1,000 endpoints."""

_Keys = tuple[BlockKey, ...]


class _Node:
    """Blocks that follow on each other, in a tree of prompts; whoever holds one of them, holds and used all.

    Attributes:
        keys: of the blocks, in order; empty at the root alone.
        used: the number of its latest use, by the ordinal of each endpoint that holds the blocks.
        holders: those ordinals as bits.
        children: what follows on the last block, by first key.
    """

    __slots__ = ("children", "holders", "keys", "parent", "used")

    def __init__(self, keys: _Keys, parent: "_Node | None") -> None:
        self.keys = keys
        self.parent = parent
        self.used: dict[int, int] = {}
        self.holders = 0
        self.children: dict[BlockKey, _Node] = {}


@dataclass(slots=True)
class _Held:
    """What one endpoint holds: with each node all before it, none of which is older.

    Attributes:
        tips: the last node that is as old as a use, by the number of that, oldest first. In a plain dict the
            first one would be looked for among all that were before it.
        block_count: in all nodes.
    """

    tips: OrderedDict[int, _Node] = field(default_factory=OrderedDict)
    block_count: int = 0


class PrefixIndex:
    """Longest cached prefix on every endpoint, found in one walk down a tree of prompts.

    A node is as long as nobody's use ends or parts from others within it, so that a usual prompt takes a few
    steps whatever its length; at worst, where each beginning of a prompt was one itself, a node is one block.
    Holders are bits of one integer, so that a step costs the same whatever their number. Of what an endpoint
    holds the longest unused is forgotten first, and of a prompt its last block.
    """

    def __init__(self) -> None:
        self._root = _Node((), None)
        self._held: dict[int, _Held] = {}
        self._numbers = count()
        self._block_count = 0

    @property
    def block_count(self) -> int:
        return self._block_count

    def match(self, keys: Sequence[BlockKey]) -> dict[int, int]:
        """Blocks of the longest matching prefix by endpoint ordinal; endpoints with none are absent."""
        matched: dict[int, int] = {}
        holders = depth = 0
        for node, shared in self._along(tuple(keys)):
            # Whoever holds a node holds what is before it.
            mark_depth(matched, holders & ~node.holders, depth)
            holders = node.holders
            depth += shared
        mark_depth(matched, holders, depth)
        return matched

    def depth(self, ordinal: int, keys: Sequence[BlockKey]) -> int:
        """Blocks of the longest prefix that one endpoint holds."""
        return sum(shared for node, shared in self._along(tuple(keys)) if ordinal in node.used)

    def record(self, ordinal: int, keys: Sequence[BlockKey], blocks_max: int) -> None:
        """Note that an endpoint holds these blocks, and forget its oldest past `blocks_max`.

        Args:
            keys: of a prompt's blocks; each stands for all before it, too.
        """
        held = self._held.get(ordinal)
        if held is None:
            held = self._held[ordinal] = _Held()
        path, number = self._path(tuple(keys[:blocks_max])), next(self._numbers)
        for node in path:
            before = node.used.get(ordinal)
            node.used[ordinal] = number
            if before is None:
                node.holders |= 1 << ordinal
                held.block_count += len(node.keys)
            elif held.tips[before] is node:
                del held.tips[before]
        if path:
            held.tips[number] = path[-1]
        while held.block_count > blocks_max:
            self._forget_oldest(ordinal, held, held.block_count - blocks_max)

    def forget(self, ordinal: int) -> None:
        """Drop all that an endpoint held."""
        held = self._held.pop(ordinal, None)
        while held is not None and held.tips:
            self._forget_oldest(ordinal, held, held.block_count)

    def validate(self) -> None:
        """Assert that the tree is whole, and that it and what each endpoint holds agree."""
        found: dict[int, _Held] = {ordinal: _Held() for ordinal in self._held}
        block_count, nodes = 0, [self._root]
        while nodes:
            node = nodes.pop()
            block_count += len(node.keys)
            assert node.holders == sum(1 << ordinal for ordinal in node.used), "holders and uses disagree"
            for key, child in node.children.items():
                assert key == child.keys[0], "a node in a wrong place"
                assert child.parent is node, "a node with another parent"
                assert child.used, "a node that nobody holds"
                is_older = all(node.used.get(o, -1) >= number for o, number in child.used.items())
                assert node is self._root or is_older, "a node that is younger than what is before it"
                nodes.append(child)
            for ordinal, number in node.used.items():
                found[ordinal].block_count += len(node.keys)
                if all(child.used.get(ordinal) != number for child in node.children.values()):
                    assert number not in found[ordinal].tips, "a use with two ends"
                    found[ordinal].tips[number] = node
        told = {ordinal: (held.block_count, dict(held.tips)) for ordinal, held in self._held.items()}
        seen = {ordinal: (held.block_count, dict(held.tips)) for ordinal, held in found.items()}
        assert told == seen, "the tree and what the endpoints hold disagree"
        assert all(list(held.tips) == sorted(held.tips) for held in self._held.values()), "uses out of order"
        assert block_count == self._block_count, "blocks are miscounted"

    def _along(self, keys: _Keys) -> list[tuple[_Node, int]]:
        """The nodes that keys lead along, with how many blocks of each; only of the last one not all."""
        found: list[tuple[_Node, int]] = []
        node, depth = self._root, 0
        while depth < len(keys):
            child = node.children.get(keys[depth])
            if child is None:
                break
            own = child.keys
            part, shared = keys[depth : depth + len(own)], len(own)
            if part != own:
                shared = next(compress(count(), map(ne, part, own)), len(part))
            found.append((child, shared))
            if shared < len(own):
                break
            node, depth = child, depth + shared
        return found

    def _path(self, keys: _Keys) -> list[_Node]:
        """The nodes that are these keys together; what is not there of them is made."""
        path: list[_Node] = []
        node, depth = self._root, 0
        for known, shared in self._along(keys):
            node = known if shared == len(known.keys) else _split(known, shared)
            path.append(node)
            depth += shared
        if depth < len(keys):
            new = node.children[keys[depth]] = _Node(keys[depth:], node)
            path.append(new)
            self._block_count += len(new.keys)
        return path

    def _forget_oldest(self, ordinal: int, held: _Held, most: int) -> None:
        """Have an endpoint forget up to `most` blocks of its oldest use, at least one, from the end of it."""
        number, tip = next(iter(held.tips.items()))
        left = len(tip.keys) - most
        before = _split(tip, left) if left > 0 else tip.parent
        if before is not None and before.used.get(ordinal) == number:
            held.tips[number] = before
        else:
            del held.tips[number]
        held.block_count -= len(tip.keys)
        del tip.used[ordinal]
        tip.holders ^= 1 << ordinal
        if not tip.used and tip.parent is not None:
            del tip.parent.children[tip.keys[0]]
            self._block_count -= len(tip.keys)


def _split(node: _Node, depth: int) -> _Node:
    """Make a node of the first blocks of this one, which goes on as the rest: it may be the tip of a use."""
    front = _Node(node.keys[:depth], node.parent)
    front.used, front.holders = dict(node.used), node.holders
    if node.parent is not None:
        node.parent.children[node.keys[0]] = front
    node.keys, node.parent = node.keys[depth:], front
    front.children[node.keys[0]] = node
    return front


def mark_depth(matched: dict[int, int], bits: int, depth: int) -> None:
    """Note a depth for every endpoint whose ordinal is a bit of `bits`."""
    if bits.bit_count() <= FEW_BITS:
        while bits:
            lowest = bits & -bits
            matched[lowest.bit_length() - 1] = depth
            bits ^= lowest
        return
    # Binary digits, lowest first: finding the next "1" in them beats big-integer arithmetic per bit.
    digits = f"{bits:b}"[::-1]
    ordinal = digits.find("1")
    while ordinal >= 0:
        matched[ordinal] = depth
        ordinal = digits.find("1", ordinal + 1)
