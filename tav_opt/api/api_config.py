"""What `tav-opt api` is told, and whether it makes sense here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tav_opt.client.channel import check_url
from tav_opt.config import Config, InputError, Within, check_numbers, with_absolute_paths
from tav_opt.files import check_place
from tav_opt.loopback import is_loopback
from tav_opt.serving.host.serve_config import Port

_EVERYWHERE = ("", "0.0.0.0", "::", "[::]")  # nosec B104  # what is refused


@dataclass(frozen=True, kw_only=True)
class ApiConfig(Config):
    """Answer OpenAI's videos API (/v1/videos) for the clips of a running server."""

    url: str = "localhost:8001"
    """The server's gRPC address."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, who then need a key of --keys."""
    port: Port = 8080
    """0 takes a free one."""
    keys: Path | None = None
    """File of API keys, one a line, each at least 16 letters and behind the name of its owner: `anna 6fe3…`. Without
    it whoever reaches the port may ask, which is refused where other machines can."""
    tls_certificate: Path | None = None
    """PEM chain that the API shows; with `tls_key`."""
    tls_key: Path | None = None
    jobs: Path = Path("api-jobs")
    """Folder of the jobs and their videos; one API at a time works on it."""
    parallel: Annotated[int, Within(1, 64)] = 2
    """Videos that are asked of the server at a time."""
    queue: Annotated[int, Within(1, 10_000)] = 32
    """Videos that a key may have waiting or in work; the next one is refused."""
    keep_hours: Annotated[float, Within(0.001, 8760)] = 24.0
    """After so long a finished video is removed, and one that no server took fails."""
    keep_mib: Annotated[int, Within(1, 2**30)] = 4096
    """Of the folder; where more is needed the videos that were finished longest ago go first."""
    upload_mib: Annotated[int, Within(1, 1024)] = 64
    """Of a request; what is larger is refused before it is read."""
    decode_seconds: Annotated[float, Within(0.1, 3600)] = 30.0
    """How long an uploaded video may take to decode."""
    tls: bool = False
    """Encrypt the connection to the server; so does each of the next three."""
    root_certificates: Path | None = None
    """PEM file of the authorities to trust."""
    certificate: Path | None = None
    """PEM file of the API's own certificate for the server, and its key."""
    key: Path | None = None


def checked(config: ApiConfig) -> ApiConfig:
    """The configuration with absolute paths; raises InputError for what makes no sense or cannot be had."""
    check_numbers(config)
    config = with_absolute_paths(config)
    check_url(config.url)
    if config.keys is None and (config.host in _EVERYWHERE or not is_loopback(config.host)):
        raise InputError(f"host {config.host} lets other machines in: give a file of --keys, or listen on 127.0.0.1")
    if (config.tls_certificate is None) != (config.tls_key is None):
        raise InputError("a TLS certificate and its key go together: give both, or neither")
    for path in (config.tls_certificate, config.tls_key):
        if path is not None and not path.is_file():
            raise InputError(f"{path} does not exist or is no file")
    check_place(config.jobs)
    if config.jobs.exists() and not config.jobs.is_dir():
        raise InputError(f"{config.jobs} cannot be written: Not a directory")
    return config
