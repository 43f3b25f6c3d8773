"""Which calls an endpoint is sent, by method and path: the API, and what is let pass beside it; pure."""

from collections.abc import Collection
from urllib.parse import unquote

from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.protocol.openai import APIS

PAGES = frozenset({"/v1/models", "/health"})
"""What GET and HEAD may ask of any endpoint: OpenAI's clients list models, load balancers look at health."""

_ONE_MODEL = "/v1/models/"
_READS = frozenset({b"GET", b"HEAD"})
_STEPS = frozenset({"", ".", ".."})
"""Parts of a path that servers may take out of it, and so come to another one."""
_SHOWN_MAX = 128
_METHOD_SHOWN_MAX = 16


def path_of(target: bytes) -> str:
    """The path of a `:path` as servers look it up: decoded once, without its query and one trailing slash."""
    path = target.partition(b"?")[0].decode("latin-1")
    if "%" in path:
        path = unquote(path, encoding="latin-1")
    return path[:-1] if len(path) > 1 and path.endswith("/") else path


def why_not(method: bytes | None, path: str, passed: Collection[str]) -> Refusal | None:
    """Why a call that is not planned may not go to any endpoint; None if it may.

    An engine has more behind its port than the API: to sleep, to load weights, to profile.

    Args:
        path: as `path_of` gives it.
        passed: paths that may go whatever the method.
    """
    if path in passed:
        return None
    is_read = method in _READS
    is_page = path in PAGES or _is_one_model(path)
    if (is_read and is_page) or (method == b"POST" and path in APIS):
        return None
    shown = path[:_SHOWN_MAX]
    if is_page or path in APIS:
        name = (method or b"none")[:_METHOD_SHOWN_MAX].decode("latin-1")
        allowed = "POST" if path in APIS else "GET"
        return Refusal(RefuseReason.METHOD_NOT_ALLOWED, f"{shown} does not take {name}; send {allowed}.")
    message = f"There is no {shown} here; whoever runs the picker can let it pass with --pass-paths."
    return Refusal(RefuseReason.PATH_UNKNOWN, message)


def _is_one_model(path: str) -> bool:
    """A model's page; its name may have slashes inside."""
    name = path.removeprefix(_ONE_MODEL)
    return name != path and _STEPS.isdisjoint(name.split("/"))
