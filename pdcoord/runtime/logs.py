"""Logs as JSON lines on stderr: structlog for our own, and whatever libraries say through logging."""

import logging
import sys
from typing import Any, BinaryIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

# uvicorn says this of an answer that was broken off on purpose, which request.done has told already.
_EXPECTED = frozenset({"ASGI callable returned without completing response."})


def configure_logs(level: str, stream: BinaryIO | None = None) -> FilteringBoundLogger:
    """Set up the process's logs and return its logger.

    Args:
        level: debug, info, warning or error.
        stream: where lines go; stderr by default.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.BytesLoggerFactory(file=stream if stream is not None else sys.stderr.buffer),
        cache_logger_on_first_use=False,
    )
    log = cast("FilteringBoundLogger", structlog.get_logger())
    logging.basicConfig(handlers=[_Forward(log)], level=max(number, logging.WARNING), force=True)
    return log


class _Forward(logging.Handler):
    """Hands on what libraries log."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().strip()
        if message not in _EXPECTED:
            self._log.log(
                record.levelno,
                "library.message",
                logger=record.name,
                message=message,
                exc_info=record.exc_info,
            )


def _render(_logger: WrappedLogger, _method: str, event: EventDict) -> bytes:
    head = {name: event.pop(name) for name in ("timestamp", "level", "event")}
    return msgspec.json.encode({**head, **event}, enc_hook=_unknown)


def _unknown(value: Any) -> str:
    return repr(value)
