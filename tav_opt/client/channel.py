"""Where the server is, and how the connection to it is secured."""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from tav_opt.config import Config, InputError, documented
from tav_opt.loopback import needs_no_proxy

OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),  # frames exceed gRPC's 4 MB
    ("grpc.keepalive_time_ms", 60_000),  # a server that vanished without a word is noticed while an edit waits
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # closing a client closes its connection
)
DIRECT = (("grpc.enable_http_proxy", 0),)
"""Past all proxies."""


@documented
@dataclass(frozen=True, kw_only=True)
class Tls(Config):
    """Files in PEM format that secure the connection."""

    root_certificates: Path | None = None
    """Whom to trust; without them, the authorities that gRPC ships."""
    certificate: Path | None = None
    """The client's own chain, where the server asks for one; with its `key`."""
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises InputError for a file that cannot be read, and for a certificate without its key."""
        if (self.certificate is None) != (self.key is None):
            raise InputError("a client certificate and its key go together: give both, or neither")
        return grpc.ssl_channel_credentials(
            root_certificates=_content(self.root_certificates),
            private_key=_content(self.key),
            certificate_chain=_content(self.certificate),
        )


def _content(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if b"-----BEGIN " not in content:
        raise InputError(f"{path} is not in PEM format")
    return content


class Unreachable(InputError):
    """No server answers there, or none that this connection is for."""


_UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:]+)")
_CLOSED = re.compile("handshake|Socket closed|Connection reset", re.IGNORECASE)


def check_url(url: str) -> str:
    """The address itself; raises InputError unless it is host:port."""
    if "://" in url or not url.rpartition(":")[2].isdigit():
        raise InputError(f"url {url!r} is not host:port, e.g. localhost:8001")
    return url


def _host(url: str) -> str:
    return re.sub(r"^(dns|ipv[46]):", "", url.rpartition(":")[0])


def options(url: str) -> tuple[tuple[str, int], ...]:
    """Of a channel to `url`: gRPC itself asks a proxy for this machine too, and knows neither NO_PROXY nor `*`."""
    return OPTIONS + DIRECT if needs_no_proxy(_host(url)) else OPTIONS


def connect(url: str, tls: Tls | None) -> grpc.Channel:
    """A channel for threads; nothing is sent yet."""
    if tls is None:
        return grpc.insecure_channel(url, options(url))
    return grpc.secure_channel(url, tls.credentials(), options(url))


def connect_aio(url: str, tls: Tls | None) -> grpc.aio.Channel:
    """A channel for the running event loop; nothing is sent yet."""
    if tls is None:
        return grpc.aio.insecure_channel(url, options(url))
    return grpc.aio.secure_channel(url, tls.credentials(), options(url))


def misfit(url: str, tls: Tls | None, details: str) -> Unreachable | None:
    """Why a connection that failed with gRPC's `details` will never be one, as to TLS; None where it may.

    Where the details leave it open, whoever listens there is asked, for a second at most.
    """
    if tls is not None and (found := _UNTRUSTED.search(details)):
        return Unreachable(f"the certificate of {url} is not trusted ({found[1]}): see --root-certificates")
    if tls is not None and "Hostname Verification" in details:
        return Unreachable(f"the certificate of {url} is for another name: call the server by one that it has")
    secured = speaks_tls(url) if _CLOSED.search(details) else None
    if secured is True and tls is None:
        return Unreachable(f"the server at {url} speaks TLS: try --tls (in Python tls=Tls())")
    if secured is False and tls is not None:
        return Unreachable(f"the server at {url} speaks no TLS: try without --tls and its files (in Python tls=None)")
    return None


def unreachable(url: str, tls: Tls | None) -> Unreachable:
    """Nothing answers there, not even to say that it is busy."""
    if tls is not None and tls.certificate is None and speaks_tls(url):
        return Unreachable(f"no server answers at {url}: it may ask for a client's certificate (--certificate, --key)")
    return Unreachable(f"no server answers at {url}: is it running, and is that its gRPC port? (tav-opt serve)")


def speaks_tls(url: str) -> bool | None:
    """Whether who listens at `url` answers a TLS handshake, be it with a refusal; None where that is not to be seen."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only to see what is spoken there
    context.set_alpn_protocols(["h2"])
    try:
        address = (_host(url).strip("[]"), int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=1) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLEOFError:
        return None
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return None
