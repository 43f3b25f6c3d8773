"""Whether two greedy answers to one prompt are one model's: equal, but for what rounding may do."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum


class CanaryOutcome(StrEnum):
    """What a canary found; closed, the outcome label of metrics and, of one that failed, the path's fault.

    unproven: the answers are equal, and no sidecar of ours is there to say that the prompt was split.
    """

    PASSED = "passed"
    TOKENS = "canary-tokens"
    LOGPROBS = "canary-logprobs"
    DIGEST = "canary-digest"
    ERROR = "canary-error"
    INCONCLUSIVE = "inconclusive"
    UNPROVEN = "unproven"

    @property
    def is_failure(self) -> bool:
        return self not in {CanaryOutcome.PASSED, CanaryOutcome.INCONCLUSIVE, CanaryOutcome.UNPROVEN}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one canary came to.

    Attributes:
        position: output token at which the answers part first, from 0; None where they do not, or there are
            no two answers.
        detail: in words, for a person; holds nothing of the prompt or of an answer.
    """

    outcome: CanaryOutcome
    detail: str = ""
    position: int | None = None


@dataclass(frozen=True, slots=True)
class GreedyAnswer:
    """What an engine answered at temperature 0. Lists are as long as `tokens`, or empty where not told.

    Attributes:
        tokens: token ids, or words where the engine gives no ids.
        words: tokens as text, by which `tops` names them.
        logprobs: of each token that was chosen.
        tops: of the likeliest tokens at each place, by their text.
        text: all of it.
    """

    tokens: tuple[int | str, ...] = ()
    words: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    tops: tuple[Mapping[str, float], ...] = ()
    text: str = ""


def compare(alone: GreedyAnswer, split: GreedyAnswer, tolerance: float) -> Finding:
    """Hold a split answer against that of one engine alone.

    Vendors round differently, so at a place where two tokens are as likely as each other either may be
    chosen: that is a tie where both engines give both tokens a logprob within `tolerance` (in nats) of their
    own choice. From the first differing token on the contexts differ and nothing is compared. Before it the
    logprobs of equal tokens must be as near as that. An answer without logprobs must be equal throughout.
    The detail of one that passed says how far apart it was, so that a tolerance can be chosen by it.
    """
    # Two kinds of engines may name tokens in two ways: one by number, the other by text.
    if not alone.tokens or not split.tokens or type(alone.tokens[0]) is not type(split.tokens[0]):
        is_same = alone.text == split.text
        return Finding(CanaryOutcome.PASSED) if is_same else Finding(CanaryOutcome.TOKENS, "the texts differ")
    most = ""
    largest = 0.0
    for place, (one, other) in enumerate(zip(alone.tokens, split.tokens, strict=False)):
        if one != other:
            found = _judge_difference(alone, split, place, tolerance)
            return replace(found, detail=f"{found.detail}; {most}") if most else found
        apart = _logprobs_apart(alone, split, place)
        if apart is None:
            continue
        if not apart <= tolerance:
            detail = f"logprobs of equal tokens are {apart:.3g} apart, more than {tolerance:g}"
            return Finding(CanaryOutcome.LOGPROBS, detail, place)
        largest = max(largest, apart)
        most = f"logprobs at most {largest:.3g} apart"
    if len(alone.tokens) != len(split.tokens):
        place = min(len(alone.tokens), len(split.tokens))
        return Finding(CanaryOutcome.TOKENS, f"{len(split.tokens)} tokens for {len(alone.tokens)}", place)
    return Finding(CanaryOutcome.PASSED, most)


def _judge_difference(alone: GreedyAnswer, split: GreedyAnswer, place: int, tolerance: float) -> Finding:
    gaps = [gap for gap in (_gap(alone, split, place), _gap(split, alone, place)) if gap is not None]
    if len(gaps) < 2:
        detail = "tokens differ, and not both engines say how likely the other's token is"
        return Finding(CanaryOutcome.TOKENS, detail, place)
    told = " and ".join(f"{gap:.3g}" for gap in gaps)
    if all(gap <= tolerance for gap in gaps):
        return Finding(CanaryOutcome.PASSED, f"a tie: {told} apart, within {tolerance:g}", place)
    detail = f"tokens differ, by logprobs of {told}, more than {tolerance:g}"
    return Finding(CanaryOutcome.TOKENS, detail, place)


def _gap(chooser: GreedyAnswer, other: GreedyAnswer, place: int) -> float | None:
    """How much likelier one engine holds its own token than the other's; None if it does not say."""
    lengths = (len(chooser.tops), len(chooser.logprobs), len(other.words))
    if min(lengths) <= place:
        return None
    theirs = chooser.tops[place].get(other.words[place])
    return None if theirs is None else abs(chooser.logprobs[place] - theirs)


def _logprobs_apart(alone: GreedyAnswer, split: GreedyAnswer, place: int) -> float | None:
    if min(len(alone.logprobs), len(split.logprobs)) <= place:
        return None
    return abs(alone.logprobs[place] - split.logprobs[place])
