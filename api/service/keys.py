"""Whose key came with a request, and how many wrong ones an address may try."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from api.errors import ApiError
from api.service.rate import Rate
from api.settings import Settings, SettingsError

_NAMED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,63})[:=](?P<key>.+)")
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_STRONG = 16
"""Characters below which a key may be guessed by who has time."""
_MOST = 10_000
"""Addresses that are remembered."""
_Key = TypeVar("_Key")
_TRUSTED = 3600.0
"""Seconds for which a key that was right from an address is looked at, however many wrong ones come from there."""


class Keys:
    """The keys of API_KEYS, as SHA-256 digests.

    Attributes:
        names: of the keys, in their order; several keys may have one name.
        weak: names of the keys that are short.
    """

    def __init__(self, entries: tuple[str, ...]) -> None:
        found = [_parse(entry, number) for number, entry in enumerate(entries, 1)]
        self._keys = [(name, digest) for name, digest, _ in found]
        self.names = list(dict.fromkeys(name for name, _ in self._keys))
        self.weak = [name for name, _, length in found if length is not None and length < _STRONG]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def owner(self, presented: str) -> str | None:
        """The name of a key, or None where it is none of them.

        How long it takes says nothing of the keys: what is compared are digests, in constant time, and all of them
        always.
        """
        digest = hashlib.sha256(presented.encode(errors="surrogateescape")).digest()
        owner = None
        for name, known in self._keys:
            if hmac.compare_digest(digest, known):
                owner = name
        return owner


def _parse(entry: str, number: int) -> tuple[str, bytes, int | None]:
    """Name, digest, and length of one entry of API_KEYS. What is wrong is told without the entry: it is a secret."""
    named = None if _HASHED.fullmatch(entry) else _NAMED.fullmatch(entry)
    if named and named["key"].strip("="):  # else it is a key that ends in base64's padding
        name, key = named["name"], named["key"].strip()
    else:
        name, key = f"key-{number}", entry
    where = f"API_KEYS: entry {number}"
    if key.endswith(":"):  # the key was to come out of a variable that is not set: the name alone would be one
        raise SettingsError(f"{where}: no key follows the name")
    if name == "sha256" or (key.startswith("sha256:") and not _HASHED.fullmatch(key)):
        raise SettingsError(f"{where}: sha256: is followed by the 64 hexadecimal digits of the key's SHA-256")
    if hashed := _HASHED.fullmatch(key):
        return name, bytes.fromhex(hashed[1]), None
    if not _VISIBLE.fullmatch(key):
        raise SettingsError(f"{where}: a key is of visible ASCII characters, without spaces")
    return name, hashlib.sha256(key.encode()).digest(), len(key)


class Gate:
    """Lets requests with a right key in, and bounds how many wrong ones are looked at.

    From an address that sent too many wrong keys in the last minute, only those keys are still looked at that were
    right from there in the last hour: so whoever guesses behind the same proxy does not lock others out, and is told
    the same of a right key as of a wrong one.

    Args:
        settings: the keys, and how many wrong ones a minute.
        now: seconds.

    Raises:
        SettingsError: API_KEYS or a setting that names keys cannot be used.
    """

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        self.keys = Keys(settings.api_keys)
        if unknown := sorted(set(settings.admin_keys) - set(self.keys.names)):
            there = ", ".join(self.keys.names) or "no keys"
            raise SettingsError(f"ADMIN_KEYS: there is no key {', '.join(unknown)} in API_KEYS, but {there}")
        self._rate = Rate(settings.wrong_keys) if settings.wrong_keys else None
        self._now = now
        self._wrong: OrderedDict[str, float] = OrderedDict()
        self._right: OrderedDict[tuple[str, str], float] = OrderedDict()

    def owner(self, presented: str | None, address: str) -> str:
        """The name of the key that a request came with; "" where none is needed.

        Args:
            presented: the key, if there is one.
            address: where the request came from.

        Raises:
            ApiError: UNAUTHORIZED, TOO_MANY_WRONG_KEYS.
        """
        if not self.keys:
            return ""
        if presented is None:
            message = "This server asks for a key: send it as Authorization: Bearer KEY."
            raise ApiError("UNAUTHORIZED", message, field="Authorization")
        place, owner, now = _place(address), self.keys.owner(presented), self._now()
        wait = self._rate.wait(self._wrong.get(place, 0.0), now) if self._rate else 0.0
        if wait and (owner is None or self._right.get((place, owner), -math.inf) < now - _TRUSTED):
            message = "Too many wrong keys came from this address; it is not looked at this one."
            raise ApiError("TOO_MANY_WRONG_KEYS", message, field="Authorization", retry_after=math.ceil(wait))
        if owner is not None:
            _remember(self._right, (place, owner), now)
            return owner
        if self._rate:
            _remember(self._wrong, place, self._rate.taken(self._wrong.get(place, 0.0), now))
        raise ApiError("UNAUTHORIZED", "This is none of the server's keys.", field="Authorization")


def _remember(table: OrderedDict[_Key, float], key: _Key, value: float) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > _MOST:
        table.popitem(last=False)


def _place(address: str) -> str:
    """What counts as one address: of IPv6 the network of a host, which has 2^64 of them."""
    try:
        ip = ipaddress.ip_address(address.strip("[]").partition("%")[0])
    except ValueError:
        return address[:100]
    if isinstance(ip, ipaddress.IPv4Address) or ip.ipv4_mapped:
        return str(getattr(ip, "ipv4_mapped", None) or ip)
    return str(ipaddress.ip_network((ip, 64), strict=False))
