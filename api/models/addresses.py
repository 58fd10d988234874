"""Which network addresses a request may lead to."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache

import msgspec

from api.errors import ApiError
from api.settings import Settings, SettingsError

# special purposes that `ipaddress` does not know of: site-local (RFC 3879), 6to4 relays (RFC 7526),
# documentation (RFC 9637)
_ALSO_SPECIAL = [ipaddress.ip_network(net) for net in ("fec0::/10", "192.88.99.0/24", "3fff::/20")]
_PORT = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*):(?P<port>\d{1,5})")
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
ALLOWING = "name it in ALLOWED_URLS, or set ALLOW_PRIVATE_URLS=1, to allow that"


def is_public(address: str) -> bool:
    """Whether an IP address is a public unicast one; what is embedded in an IPv6 address counts."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in net for net in _ALSO_SPECIAL))


class Reach(msgspec.Struct, frozen=True):
    """Where requests may lead: to public addresses, and to what the operator allows beside them.

    Attributes:
        everywhere: ALLOW_PRIVATE_URLS.
        places: hosts or networks of ALLOWED_URLS, each with its port; 0 is any port.
    """

    everywhere: bool = False
    places: tuple[tuple[str | ipaddress.IPv4Network | ipaddress.IPv6Network, int], ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Reach:
        """As the environment says.

        Raises:
            SettingsError: an entry of ALLOWED_URLS is neither a host nor a network.
        """
        return _reach(settings.allow_private_urls, settings.allowed_urls)

    def permits(self, host: str, port: int, addresses: Iterable[str]) -> bool:
        """Whether a connection may be made to a host that has these IP addresses: one that is not allowed forbids all.

        Args:
            host: as the URL names it.
            port: of the connection.
            addresses: what the name was resolved to; the connection must go to one of them, without a second look-up.
        """
        if self.everywhere or ((host := host.lower().rstrip(".")), port) in self.places or (host, 0) in self.places:
            return True
        return all(is_public(address) or self._is_listed(address, port) for address in addresses)

    def _is_listed(self, address: str, port: int) -> bool:
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return any(not isinstance(net, str) and only in (0, port) and ip in net for net, only in self.places)


@lru_cache
def _reach(everywhere: bool, allowed: tuple[str, ...]) -> Reach:
    return Reach(everywhere, tuple(map(_place, allowed)))


def _place(text: str) -> tuple[str | ipaddress.IPv4Network | ipaddress.IPv6Network, int]:
    match = _PORT.fullmatch(text)
    host, port = (match["host"], int(match["port"])) if match else (text, 0)
    if port <= 65535 and (port or not match):
        with contextlib.suppress(ValueError):
            return ipaddress.ip_network(host.strip("[]")), port
        name = host.lower().rstrip(".")
        # a name whose last label is a number is an address of sorts, or a slip
        if _NAME.fullmatch(name) and not name.rpartition(".")[2].isdigit():
            return name, port
    message = f"ALLOWED_URLS: {text!r} is neither a host nor a network, such as minio.local:9000 or 10.0.0.0/8"
    raise SettingsError(message)


def not_allowed(requested: str, field: str | None = None) -> ApiError:
    """The error of an address that requests may not lead to."""
    message = f"The address leads into a private network; {ALLOWING}."
    return ApiError("URL_NOT_ALLOWED", message, field=field, requested=requested)
