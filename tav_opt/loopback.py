"""The way to this machine: no proxy stands in it, whatever the environment says of proxies."""

from __future__ import annotations

import socket
import urllib.request
from http.client import HTTPResponse
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

NAMES = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def is_loopback(host: str) -> bool:
    """Whether a host's name or address, an IPv6 one with or without brackets, is this machine by its spelling."""
    name = host.strip("[]").rstrip(".").lower()
    if name in NAMES or name.endswith(".localhost"):
        return True
    try:  # inet_aton knows 127.1 too, as the resolver does
        address = ip_address(name if ":" in name else socket.inet_ntoa(socket.inet_aton(name)))
    except (OSError, ValueError):
        return False
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address
    return address.is_loopback or address.is_unspecified


def needs_no_proxy(host: str) -> bool:
    """Whether the way to `host` is direct: to this machine always, elsewhere where no_proxy says so."""
    return is_loopback(host) or bool(urllib.request.proxy_bypass(host.strip("[]")))


def urlopen(request: str | urllib.request.Request, timeout_s: float, *, direct: bool = False) -> HTTPResponse:
    """`urllib.request.urlopen`, past all proxies where the address is this machine's or `direct` says so."""
    url = request if isinstance(request, str) else request.full_url
    if direct or is_loopback(urlsplit(url).hostname or ""):
        return _DIRECT.open(request, timeout=timeout_s)
    return urllib.request.urlopen(request, timeout=timeout_s)  # nosec B310  # of the operator's own address
