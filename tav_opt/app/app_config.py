"""What `tav-opt app` is told, and whether it makes sense here."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from tav_opt.config import Config, InputError, Mib, Within, WorkerConfig, check_numbers, documented
from tav_opt.contract import check_clip_name
from tav_opt.files import check_place

Clips = Annotated[UseAppendAction[tuple[str, ...]], arg(name="clip", metavar="NAME")]
Models = Annotated[UseAppendAction[tuple[str, ...]], arg(name="model", metavar="MODEL")]
Auth = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="USER:PASSWORD|@FILE")]
PACKAGES_MODEL = Path(__file__).parents[1] / "demo" / "model"
"""The small one, which knows emoji."""


@documented
@dataclass(frozen=True, kw_only=True)
class AppConfig(Config):
    """Open a page in the browser that edits and tunes clips."""

    url: str = "localhost:8001"
    """Address of the server that edits, over gRPC."""
    metrics_url: str = "http://localhost:8002/metrics"
    """Where that server tells its health and how many requests wait."""
    in_process: bool = False
    """Edit in this process instead, by the server's own editor; how, the last options say."""
    repository: Path = Path("serving/model_repository")
    """Model repository that tuned clips are exported to, and that sources are shown from; the clips that are offered
    are the server's, and this one's in process."""
    clips: Clips = ()
    """Clip to offer, and none but those that are named; once per clip."""
    models: Models = ()
    """Stable Diffusion directory or hub id to tune on; once per model. Default: the package's small one."""
    tuning: bool = True
    """Offer tuning too, which works on this machine; --no-tuning: editing alone."""
    folder: Path = Path("app-out")
    """Results and tuned clips are kept here."""
    keep_mib: Mib = 1024
    """Of results; the oldest go first."""
    at_once: Annotated[int, Within(1, 64)] = 1
    """Edits that this page sends at a time; the others wait, and see their place in the queue."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: Annotated[int, Within(0, 65535)] = 7860
    """0 takes a free one."""
    auth: Auth = ()
    """Who may come in, once per user; or a file of such lines, which the list of processes does not show."""
    root_path: str = ""
    """Where a proxy shows the page, as /tav-opt."""
    tls_certificate: Path | None = None
    """PEM chain that the page is encrypted with; with `tls_key`."""
    tls_key: Path | None = None
    worker: OmitArgPrefixes[WorkerConfig] = field(default_factory=WorkerConfig)

    @property
    def offered_models(self) -> tuple[str, ...]:
        """To tune on."""
        return self.models or (str(PACKAGES_MODEL),)

    @property
    def users(self) -> list[tuple[str, str]]:
        """Names and passwords; raises InputError for what is neither that nor a file of such."""
        lines = [line for given in self.auth for line in _lines(given)]
        pairs = [tuple(line.split(":", 1)) for line in lines]
        if any(len(pair) != 2 or not all(pair) for pair in pairs):
            raise InputError("--auth is USER:PASSWORD, or @FILE of such lines")
        return [(user, password) for user, password in pairs]


def _lines(given: str) -> list[str]:
    if not given.startswith("@"):
        return [given]
    try:
        return Path(given[1:]).read_text().split()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"--auth {given}: that file cannot be read") from None


def check(config: AppConfig) -> None:
    """Raises InputError for what cannot work here, before anything is opened."""
    check_numbers(config)
    for name in config.clips:
        check_clip_name(name)
    if (config.tls_certificate is None) != (config.tls_key is None):
        raise InputError("a TLS certificate and its key go together: give both, or neither")
    for path in (config.tls_certificate, config.tls_key):
        if path is not None and not path.is_file():
            raise InputError(f"{path} does not exist or is no file")
    if config.root_path and not config.root_path.startswith("/"):
        raise InputError(f"root path {config.root_path!r} does not begin with /, as /tav-opt does")
    config.users  # noqa: B018 — said before the page opens
    check_place(config.folder / "results")
    if find_spec("gradio") is None:
        raise InputError("the page needs Gradio, which is not installed: pip install 'tav-opt[app]'")
