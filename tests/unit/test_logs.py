from __future__ import annotations

import json
import logging

from api.logs import Redactor, _Formatter


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("api.x", logging.INFO, "f", 1, message, (), None)
    made.__dict__.update(extra)
    return made


def test_secrets_never_appear() -> None:
    redact = Redactor(
        {
            "HF_TOKEN": "hf_abcdefgh",
            "API_KEYS": "first-key-1,second-key-2",
            "AWS_SECRET_ACCESS_KEY": "zzzzzzzz",
            "PATH": "/usr/bin",
        }
    )
    text = redact(
        "hf_abcdefgh first-key-1 second-key-2 zzzzzzzz /usr/bin Bearer qwe.rty "
        "https://me:pass@host/x?X-Amz-Signature=abc&b=1"
    )
    for secret in ("hf_abcdefgh", "first-key-1", "second-key-2", "zzzzzzzz", "me:pass", "abc&", "qwe.rty"):
        assert secret not in text
    assert "/usr/bin" in text
    assert "b=1" in text


def test_keys_with_names_never_appear() -> None:
    redact = Redactor({"API_KEYS": "alice:first-key-1,bob=second-key-2,carol:sha256:" + "ab" * 32 + ",bare-key-3=="})
    text = redact(f"first-key-1 second-key-2 {'ab' * 32} bare-key-3== alice")
    assert text == "*** *** *** *** alice"


def test_headers_are_no_place_to_read_keys_from() -> None:
    redact = Redactor({})
    for line in (
        "Authorization: Bearer abc.def/ghi=",
        "authorization: abcdefghi",
        "{'authorization': 'Basic YTpzZWNyZXQ='}",
        "(b'Authorization', b'Bearer abcdefghi')",
        "Headers({'host': 'x', 'authorization': 'abcdefghi'})",
    ):
        told = redact(line)
        assert "***" in told
        assert not any(secret in told for secret in ("abc", "YTpz", "ghi"))


def test_json_lines_carry_the_request_id_and_stay_one_line() -> None:
    line = _Formatter(True, Redactor({})).format(record("two\nlines", request_id="abc"))
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["message"], fields["request_id"], fields["level"]) == ("two\nlines", "abc", "info")


def test_text_lines_carry_the_request_id() -> None:
    assert _Formatter(False, Redactor({})).format(record("hello", request_id="abc")).endswith("hello [abc]")


def test_json_lines_carry_what_is_known_of_a_job_without_secrets() -> None:
    known = {"job_id": "j", "model": "https://me:pass@host/x", "owner": "", "timings": {"queue": 3, "inference": 20}}
    fields = json.loads(_Formatter(True, Redactor({})).format(record("job done", request_id="abc", **known)))
    assert fields["job_id"] == "j"
    assert fields["timings"] == {"queue": 3, "inference": 20}
    assert "pass" not in fields["model"]
    assert "owner" not in fields
