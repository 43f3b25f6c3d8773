"""Errors carry the engine's own event, and no text of a client."""

from pdcoord.resume.errors import DivergedError, TornError


def test_a_torn_stream_carries_the_engines_event() -> None:
    torn = TornError(b"data: {}\n\n")
    assert torn.error_event == b"data: {}\n\n"
    assert "engine" in str(torn)


def test_a_divergence_is_one_more_break() -> None:
    diverged = DivergedError(why="other tokens")
    assert isinstance(diverged, TornError)
    assert (diverged.error_event, str(diverged)) == (b"", "other tokens")
