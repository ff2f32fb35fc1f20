"""The page: three tabs over one backend; how it is opened."""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it when it is imported

import gradio as gr

from tav_opt.app import app_config
from tav_opt.app.app_config import AppConfig
from tav_opt.app.backends import names, open_backend
from tav_opt.app.clip_source import ClipSources
from tav_opt.app.clips_tab import ClipsTab
from tav_opt.app.edit_tab import AT_ONCE, EditTab, Rooms
from tav_opt.app.kept_results import KeptResults
from tav_opt.app.tune_tab import TuneTab
from tav_opt.app.tuning_runs import TuningRuns
from tav_opt.config import InputError

HERE = Path(__file__).parent
TITLE = "tav-opt: Tune-A-Video"
WORDS = "# Tune-A-Video\nTune a model on one clip; then edit the clip by words."
MIB = 1 << 20
UPLOADS_SECONDS = (3600, 86_400)
"""How often uploads are looked through, and how old they grow."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Page:
    """The Gradio application, and what ends with it."""

    def __init__(self, config: AppConfig) -> None:
        app_config.check(config)
        self.config = config
        self.backend = open_backend(config)
        folder = config.folder.absolute()
        self.runs = TuningRuns(folder / "runs", folder / "previews")
        self.rooms = Rooms(
            config=config,
            backend=self.backend,
            sources=ClipSources(config.repository, folder / "sources"),
            results=KeptResults(folder / "results", config.keep_mib * MIB),
        )
        self.blocks = self._built()

    def _built(self) -> gr.Blocks:
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=UPLOADS_SECONDS) as blocks:
            gr.Markdown(WORDS, elem_classes="tav-title")
            with gr.Tabs():
                with gr.Tab("Edit", id="edit"):
                    edit = EditTab(self.rooms)
                if self.config.tuning:
                    with gr.Tab("Tune", id="tune"):
                        tune = TuneTab(self.config, self.runs)
                        tune.exports(edit.clip, self._clips)
                    blocks.load(tune.opened, None, tune.run, **AT_ONCE)
                with gr.Tab("Clips and server", id="clips") as tab:
                    clips = ClipsTab(self.config, self.backend)
                    tab.select(clips.looked, None, [clips.health, clips.clips], **AT_ONCE)
            blocks.load(edit.opened, [edit.clip, edit.history], edit.loaded, **AT_ONCE)
            blocks.unload(self._left)
        return blocks

    def _clips(self, chosen: str) -> Any:
        return gr.Dropdown(names(self.config), value=chosen)

    def _left(self, request: gr.Request) -> None:
        """A browser has closed the page: nobody waits for its edit."""
        self.rooms.jobs.cancel(str(request.session_hash))

    @contextmanager
    def opened(self) -> Iterator[str]:
        """Listens, for the block → the page's address. Raises InputError for an address that cannot be taken."""
        config = self.config
        port = _free(config.host, config.port)
        folder = config.folder.absolute()
        _past_proxies()
        with ExitStack() as stack:
            stack.callback(self.close)
            atexit.register(self.runs.close)
            self.blocks.queue(max_size=64).launch(
                server_name=config.host,
                server_port=port,
                auth=config.users or None,
                root_path=config.root_path or None,
                ssl_certfile=str(config.tls_certificate) if config.tls_certificate else None,
                ssl_keyfile=str(config.tls_key) if config.tls_key else None,
                ssl_verify=False,  # of its own question to itself, whether it is up
                allowed_paths=[str(folder / name) for name in ("results", "sources", "previews")],
                theme=_theme(),
                css_paths=HERE / "page.css",
                head=f"<script>{(HERE / 'page.js').read_text()}</script>",
                footer_links=[],
                prevent_thread_lock=True,
                share=False,
                quiet=True,
                ssr_mode=False,
            )
            scheme = "https" if config.tls_certificate else "http"
            yield f"{scheme}://{config.host}:{port}{config.root_path}"

    def close(self) -> None:
        """Edits are cancelled; what is tuned keeps its state."""
        self.blocks.close(verbose=False)
        self.runs.close()
        self.backend.close()


def _past_proxies() -> None:
    """Gradio asks itself whether it is up, through whatever proxy the environment names."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), *LOOPBACK)))


def _theme() -> gr.themes.Base:
    """No fonts from elsewhere: the page works without a network."""
    return gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill="*neutral_100",
        block_label_background_fill="*background_fill_primary",
        block_label_background_fill_dark="*background_fill_secondary",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_padding="0",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
    )


def _free(host: str, port: int) -> int:
    """The port, a free one for 0; raises InputError where it cannot be taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((host, port))
        except OSError as error:
            raise InputError(f"port {port} on {host} cannot be taken: {error.strerror}; choose another, or 0") from None
        return held.getsockname()[1]


def serve(config: AppConfig) -> None:
    """Opens the page and waits for Ctrl-C."""
    page = Page(config)
    with page.opened() as address:
        print(f"tav-opt app: {address}", flush=True)
        if config.host not in LOOPBACK and not config.users:
            print("tav-opt app: whoever reaches that address may edit and tune: see --auth", flush=True)
        page.blocks.block_thread()
