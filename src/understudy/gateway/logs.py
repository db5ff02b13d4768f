"""What a gateway's processes write to standard error: text for people, or a JSON object a line for machines.

It ignores where standard error goes, and the texts of calls: they are in the record, and nowhere else.
"""

from __future__ import annotations

import datetime as dt
import logging
from typing import Any

import msgspec

from understudy.config import Telemetry
from understudy.traffic.record import Call

_calls = logging.getLogger("understudy.calls")
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON: at, level, logger, pid, message, what the logger added, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def set_up(settings: Telemetry) -> None:
    """Write this process's log as ``[telemetry] log`` says; what was set up before is replaced."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings.log == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


def log_call(call: Call) -> None:
    """One line of a finished call: what it was, what became of it, nothing that was said."""
    fields = {
        "call": call.key,
        "route": call.route,
        "alias": call.alias,
        "target": call.target,
        "answered_by": call.answered_by,
        "status": call.status,
        "stream": call.stream,
        "attempts": len(call.attempts),
        "error": call.attempts[-1].error if call.attempts else "",
        "prompt_tokens": call.usage.prompt_tokens if call.usage else None,
        "completion_tokens": call.usage.completion_tokens if call.usage else None,
        "finish_reason": call.finish_reason,
        "ttft_s": round(call.ttft_s, 6),
        "total_s": round(call.total_s, 6),
        "task_id": call.task_id,
        "caller": call.caller,
    }
    _calls.info(
        "%s -> %s %d in %.3f s", call.alias, call.target, call.status, call.total_s, extra={"fields": fields}
    )
