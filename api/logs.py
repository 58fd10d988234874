"""Structured logs: one line an event, text for people or JSON for machines, no secrets."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Mapping

import orjson

_SECRET_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEYS?|SIGN_KEY|ACCESS_KEY(_ID)?)$", re.IGNORECASE)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SIGNED_QUERY = re.compile(r"((?:X-Amz-[A-Za-z-]+|Signature|AWSAccessKeyId|token|sig)=)[^&\s\"']+", re.IGNORECASE)
_BEARER = re.compile(r"(?<=Bearer )[\w.~+/=-]+")
_AUTHORIZATION = re.compile(r"""(authorization["']?\s*[:=,]\s*b?["']?(?:Bearer |Basic )?)[^\s"',]+""", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}[:=](?:sha256:)?(?=.)", re.ASCII)


class Redactor:
    """Takes secrets out of text: values of secret variables, credentials in URLs and in ``Authorization``.

    Args:
        environ: where the secrets are, also as ``name:value``; a value shorter than six characters is no secret.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        values: set[str] = set()
        for name, value in environ.items():
            if _SECRET_NAMES.search(name):
                parts = [part.strip() for part in value.split(",")]
                parts += [_NAME.sub("", part, count=1) for part in parts]
                values.update(part for part in parts if len(part) >= 6)
        longest_first = sorted(values, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if values else None

    def __call__(self, text: str) -> str:
        """The text without secrets."""
        if self._values:
            text = self._values.sub("***", text)
        text = _URL_CREDENTIALS.sub("***", text)
        text = _SIGNED_QUERY.sub(r"\1***", text)
        text = _BEARER.sub("***", text)
        return _AUTHORIZATION.sub(r"\1***", text)


class _Formatter(logging.Formatter):
    def __init__(self, as_json: bool, redact: Redactor) -> None:
        super().__init__()
        self._json = as_json
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        trace = self.formatException(record.exc_info) if record.exc_info else None
        request_id = getattr(record, "request_id", None)
        known = {name: getattr(record, name, None) or None for name in ("job_id", "model", "owner", "timings")}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        if self._json:
            fields = {
                "time": stamp,
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": self._redact(message),
                "request_id": request_id,
                **{name: self._redact(value) if isinstance(value, str) else value for name, value in known.items()},
                "trace": self._redact(trace) if trace else None,
            }
            return orjson.dumps({k: v for k, v in fields.items() if v is not None}).decode()
        tail = f" [{request_id}]" if request_id else ""
        text = f"{stamp[11:-1]} {record.levelname.lower():<7} {record.name}: {message}{tail}"
        return self._redact(f"{text}\n{trace}" if trace else text)


def configure(log_format: str, log_level: str) -> None:
    """Send everything to standard error in one format.

    Args:
        log_format: ``text``, ``json``, or empty for text on a terminal and JSON elsewhere.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
    """
    as_json = log_format == "json" or (not log_format and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(as_json, Redactor(os.environ)))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("api").setLevel(log_level.upper())
