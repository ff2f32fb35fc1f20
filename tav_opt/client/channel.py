"""Where the server is, and how the connection to it is secured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from tav_opt.config import InputError

OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),  # frames exceed gRPC's 4 MB
    ("grpc.keepalive_time_ms", 60_000),  # a server that vanished without a word is noticed while an edit waits
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # closing a client closes its connection
)


@dataclass(frozen=True, kw_only=True)
class Tls:
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


def check_url(url: str) -> str:
    """The address itself; raises InputError unless it is host:port."""
    if "://" in url or not url.rpartition(":")[2].isdigit():
        raise InputError(f"url {url!r} is not host:port, e.g. localhost:8001")
    return url


def connect(url: str, tls: Tls | None) -> grpc.Channel:
    """A channel for threads; nothing is sent yet."""
    if tls is None:
        return grpc.insecure_channel(url, OPTIONS)
    return grpc.secure_channel(url, tls.credentials(), OPTIONS)


def connect_aio(url: str, tls: Tls | None) -> grpc.aio.Channel:
    """A channel for the running event loop; nothing is sent yet."""
    if tls is None:
        return grpc.aio.insecure_channel(url, OPTIONS)
    return grpc.aio.secure_channel(url, tls.credentials(), OPTIONS)
