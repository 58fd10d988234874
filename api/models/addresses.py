"""Which network addresses a request may lead to."""

from __future__ import annotations

import ipaddress

# special purposes that `ipaddress` does not know of: site-local (RFC 3879), 6to4 relays (RFC 7526),
# documentation (RFC 9637)
_ALSO_SPECIAL = [ipaddress.ip_network(net) for net in ("fec0::/10", "192.88.99.0/24", "3fff::/20")]


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
