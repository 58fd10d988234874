"""API keys: how they are written, compared, guessed at; and what each may ask for."""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Any

import pytest

from api.errors import ApiError
from api.http.keys import key_of
from api.service import keys as module
from api.service.keys import Gate, Keys
from api.service.limits import Limits
from api.settings import Settings, SettingsError

HEX = hashlib.sha256(b"hashed-key").hexdigest()


def gate_of(clock: list[float], **environ: str) -> Gate:
    return Gate(Settings.from_env({"API_KEYS": "alice:right-key,bob:other-key", **environ}), lambda: clock[0])


def code_of(gate: Gate, presented: str | None, address: str = "192.0.2.1") -> str:
    try:
        return gate.owner(presented, address)
    except ApiError as error:
        return error.code


@pytest.mark.parametrize(
    ("entry", "key", "name"),
    [
        ("alice:right-key", "right-key", "alice"),
        ("alice=right-key", "right-key", "alice"),
        ("right-key", "right-key", "key-1"),
        ("cmlnaHQ=", "cmlnaHQ=", "key-1"),
        ("cmlnaA==", "cmlnaA==", "key-1"),
        ("alice:cmlnaA==", "cmlnaA==", "alice"),
        ("alice=a:b=c", "a:b=c", "alice"),
        (f"alice:sha256:{HEX}", "hashed-key", "alice"),
        (f"alice=sha256:{HEX.upper()}", "hashed-key", "alice"),
        (f"sha256:{HEX}", "hashed-key", "key-1"),
        ("a.b-c_1:right-key", "right-key", "a.b-c_1"),
    ],
)
def test_how_a_key_is_written(entry: str, key: str, name: str) -> None:
    keys = Keys((entry,))
    assert keys.names == [name]
    assert keys.owner(key) == name
    for wrong in (key + "x", key[:-1], key.upper(), entry if entry != key else "", "", " ", "é", HEX, "\udcff"):
        assert wrong == key or keys.owner(wrong) is None, wrong


def test_keys_are_numbered_and_a_name_may_have_several() -> None:
    keys = Keys(("first-key", "alice:old-key", "alice:new-key", "last-key"))
    assert keys.names == ["key-1", "alice", "key-4"]
    assert [keys.owner(key) for key in ("old-key", "new-key", "last-key")] == ["alice", "alice", "key-4"]


@pytest.mark.parametrize(
    "entry",
    [
        "alice:sha256:12",
        "sha256:12",
        f"alice:sha256:{HEX}0",
        "alice:a key",
        "kéy",
        "alice:sha256:",
        "alice:",
        "alice::",
    ],
)
def test_a_key_that_cannot_be_used_is_told_without_it(entry: str) -> None:
    with pytest.raises(SettingsError, match="entry 2") as fault:
        Keys(("fine-key", entry))
    assert entry not in str(fault.value)


def test_admin_keys_are_names_of_keys() -> None:
    gate_of([0.0], ADMIN_KEYS="alice")
    for environ in ({"ADMIN_KEYS": "alice,root"}, {"ADMIN_KEYS": "root", "API_KEYS": ""}):
        with pytest.raises(SettingsError, match="ADMIN_KEYS: there is no key root"):
            gate_of([0.0], **environ)


def test_short_keys_are_named() -> None:
    assert Keys(("a:" + "x" * 15, "b:" + "x" * 16, f"c:sha256:{HEX}", "tiny")).weak == ["a", "key-4"]


def test_every_key_is_compared_by_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """No early end, whichever is right: how long it takes says nothing."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    entries = [f"k{n}:key-number-{n}" for n in range(5)]
    keys = Keys(tuple(entries))
    digests = [hashlib.sha256(f"key-number-{n}".encode()).digest() for n in range(5)]
    for presented in ("key-number-0", "key-number-2", "key-number-4", "none", "", "x" * 8000):
        compared.clear()
        keys.owner(presented)
        assert compared == [(hashlib.sha256(presented.encode()).digest(), digest) for digest in digests]


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer abc", "abc"), ("bearer  abc ", "abc"), ("BEARER abc", "abc"), ("abc", "abc"), (" abc ", "abc"),
        ("MyBearerKey", "MyBearerKey"), ("Basic-key", "Basic-key"), (basic("any:abc"), "abc"), (basic(":abc"), "abc"),
        (basic("a:b:c"), "b:c"), (basic("abc"), None), (basic("abc:"), None), ("Basic !!!", None), ("Bearer", None),
        ("Basic", None), ("Bearer ", None), ("Digest abc", None), ("", None), (None, None), ("Basic /w==", None),
    ],
)  # fmt: skip
def test_where_a_key_stands(header: str | None, key: str | None) -> None:
    assert key_of(header) == key


def test_wrong_keys_are_limited_for_each_address() -> None:
    clock = [1000.0]
    gate = gate_of(clock, WRONG_KEYS="5")
    told = [code_of(gate, f"guess-{n}") for n in range(20)]
    assert told == ["UNAUTHORIZED"] * 5 + ["TOO_MANY_WRONG_KEYS"] * 15
    assert code_of(gate, "guess", "192.0.2.2") == "UNAUTHORIZED"
    with pytest.raises(ApiError) as error:
        gate.owner("guess", "192.0.2.1")
    assert error.value.retry_after == 12
    clock[0] += 12
    assert [code_of(gate, "guess") for _ in range(2)] == ["UNAUTHORIZED", "TOO_MANY_WRONG_KEYS"]


def test_no_key_is_no_guess() -> None:
    gate = gate_of([0.0], WRONG_KEYS="2")
    assert {code_of(gate, None) for _ in range(50)} == {"UNAUTHORIZED"}
    assert code_of(gate, "right-key") == "alice"


def test_a_right_key_is_no_news_to_one_who_guesses() -> None:
    gate = gate_of([0.0], WRONG_KEYS="2")
    for _ in range(2):
        code_of(gate, "guess")
    assert code_of(gate, "guess") == code_of(gate, "right-key") == "TOO_MANY_WRONG_KEYS"


def test_one_who_guesses_does_not_lock_out_who_works_behind_the_same_proxy() -> None:
    clock = [0.0]
    gate = gate_of(clock, WRONG_KEYS="2")
    assert code_of(gate, "right-key") == "alice"
    for _ in range(3000):
        clock[0] += 1
        code_of(gate, "guess")
        assert code_of(gate, "right-key") == "alice"
    assert code_of(gate, "other-key") == "TOO_MANY_WRONG_KEYS"
    assert code_of(gate, "other-key", "192.0.2.2") == "bob"


def test_a_right_key_waits_no_longer_than_the_guesses_take() -> None:
    clock = [0.0]
    gate = gate_of(clock, WRONG_KEYS="6")
    for _ in range(100):
        code_of(gate, "guess")
    clock[0] += 10
    assert code_of(gate, "right-key") == "alice"


def test_the_memory_is_bounded_and_a_network_of_ipv6_is_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 100)
    gate = gate_of([0.0], WRONG_KEYS="3")
    for n in range(1000):
        code_of(gate, "guess", f"10.0.{n // 256}.{n % 256}")
        code_of(gate, "right-key", f"10.1.{n // 256}.{n % 256}")
    assert (len(gate._wrong), len(gate._right)) == (100, 100)
    told = [code_of(gate, "guess", f"2001:db8:0:1::{n:x}") for n in range(4)]
    assert told[-1] == "TOO_MANY_WRONG_KEYS"
    assert code_of(gate, "guess", "[2001:db8:0:2::1]") == "UNAUTHORIZED"
    assert code_of(gate, "guess", "::ffff:203.0.113.9") == code_of(gate, "guess", "unknown" * 100) == "UNAUTHORIZED"
    assert "203.0.113.9" in gate._wrong


def test_without_keys_everybody_comes_in() -> None:
    gate = Gate(Settings.from_env({}))
    assert gate.owner(None, "") == gate.owner("whatever", "") == ""


def limits_of(clock: list[float], **environ: str) -> Limits:
    return Limits(Settings.from_env(environ), ["alice", "bob"], lambda: clock[0])


def begun(limits: Limits, owner: str, times: int) -> list[Any]:
    told: list[Any] = []
    for _ in range(times):
        try:
            limits.take(owner)
            told.append("ok")
        except ApiError as error:
            told.append((error.code, error.status, error.retry_after))
    return told


def test_jobs_a_minute() -> None:
    clock = [50.0]
    limits = limits_of(clock, KEY_RATE_LIMIT="6,bob=0")
    assert begun(limits, "alice", 8) == ["ok"] * 6 + [("RATE_LIMITED", 429, 10)] * 2
    assert begun(limits, "bob", 100) == ["ok"] * 100
    assert begun(limits, "", 100) == ["ok"] * 100
    clock[0] += 10
    assert begun(limits, "alice", 2) == ["ok", ("RATE_LIMITED", 429, 10)]
    clock[0] += 3600
    assert begun(limits, "alice", 8).count("ok") == 6  # what was not used is not saved up


def test_jobs_at_once() -> None:
    limits = limits_of([0.0], KEY_CONCURRENCY="2, alice=3")
    assert begun(limits, "alice", 5) == ["ok"] * 3 + [("TOO_MANY_JOBS", 429, 2)] * 2
    assert begun(limits, "bob", 3).count("ok") == 2
    limits.release("alice")
    assert begun(limits, "alice", 2).count("ok") == 1
    assert limits.of("alice") == {"jobsPerMinute": None, "concurrency": 3, "jobs": 3}


def test_who_has_no_place_uses_up_no_rate() -> None:
    limits = limits_of([0.0], KEY_CONCURRENCY="1", KEY_RATE_LIMIT="2")
    assert begun(limits, "alice", 10).count("ok") == 1
    limits.release("alice")
    assert begun(limits, "alice", 1) == ["ok"]


def test_a_place_is_given_back_whatever_happens() -> None:
    limits = limits_of([0.0], KEY_CONCURRENCY="1")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), limits.job("alice"):
            raise ZeroDivisionError
    assert limits.of("alice")["jobs"] == 0


@pytest.mark.parametrize("value", ["x", "alice=", "alice=x", "-1", "1,carol=2"])
def test_a_limit_that_cannot_be_used_is_named(value: str) -> None:
    with pytest.raises(SettingsError, match="KEY_RATE_LIMIT"):
        limits_of([0.0], KEY_RATE_LIMIT=value)
