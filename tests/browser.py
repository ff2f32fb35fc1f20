"""Debian's Chromium, driven by Playwright, and the page of `tav-opt app` in it."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from encoded import lossless
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

SECONDS = 240
"""By then everything has happened, on a stalled machine too."""
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips with the reason where there is none."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium is here: apt-get install chromium, or name one in $CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def dropped_video(folder: Path) -> Path:
    """A video larger and longer than the tests' clip."""
    frames = np.random.default_rng(3).integers(0, 256, (10, 5, 6, 3), dtype=np.uint8)
    path = folder / "Dropped Video.mp4"
    path.write_bytes(lossless(frames.repeat(20, axis=1).repeat(20, axis=2)))
    return path


@contextmanager
def behind_proxy(prefix: str, behind: str) -> Iterator[str]:
    """Where a proxy shows the page at `behind`: it takes the prefix away and keeps the host, as nginx is told to."""
    client = httpx.AsyncClient(base_url=behind, timeout=SECONDS, trust_env=False)

    async def forward(request: Request) -> StreamingResponse:
        path = f"{request.path_params['path']}?{request.url.query}".rstrip("?")
        body = await request.body()
        asked = client.build_request(request.method, f"/{path}", headers=dict(request.headers), content=body)
        answer = await client.send(asked, stream=True)
        headers = {name: value for name, value in answer.headers.items() if name != "transfer-encoding"}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, headers)

    app = Starlette(routes=[Route(f"{prefix}/{{path:path}}", forward, methods=["GET", "POST", "HEAD"])])
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        proxy = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=proxy.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}{prefix}/"
        finally:
            proxy.should_exit = proxy.force_exit = True
            thread.join()


class Tab:
    """The page in a browser of its own, whose storage is empty at first."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, **settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#stage .tav-player, #stage .tav-note")

    def set(self, name: str, value: object) -> None:
        """A field, by its element's id."""
        field = self.field(name)
        field.fill(str(value))
        field.press("Tab")

    def field(self, name: str) -> Any:
        return self.page.locator(f"#{name} textarea, #{name} input").first

    def advanced(self, **values: object) -> None:
        """Settings in the drawer, which is opened where it is not."""
        if not self.page.locator("#set-steps").is_visible():
            self.page.locator("#advanced button").first.click()
        for name, value in values.items():
            self.set(f"set-{name}", value)

    def edit(self, prompts: str) -> None:
        """Asks for edits and does not wait for them."""
        self.set("prompts", prompts)
        self.page.click("#edit")

    def text(self, name: str) -> str:
        return str(self.page.locator(f"#{name}").inner_text())

    def wait(self, condition: str) -> None:
        """For JavaScript to be true."""
        self.page.wait_for_function(condition)

    def until_edited(self) -> None:
        """Two videos lie beside each other, both loaded."""
        self.wait("document.querySelector('#status').innerText.startsWith('Done in')")
        self.until_two()

    def until_two(self) -> None:
        self.wait("[...document.querySelectorAll('#stage video')].filter(v => v.readyState >= 2).length == 2")

    def saved(self, kind: str) -> Path:
        """A file that the page offers."""
        self.page.wait_for_selector(f"#download-{kind}:not([disabled])")
        with self.page.expect_download() as found:
            self.page.click(f"#download-{kind}")
        path = Path(tempfile.mkdtemp()) / f"edit.{kind}"
        found.value.save_as(path)
        return path

    def fits(self) -> bool:
        """Whether nothing sticks out at the side."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))

    def close(self) -> None:
        self.context.close()
        assert not self.errors, self.errors
