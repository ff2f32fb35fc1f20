"""`tav-opt api` as a process of its own, and OpenAI's client for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI
from openai.types import Video

warnings.filterwarnings("ignore", message="The Sora API")
KEY = "a-key-of-sixteen-letters-and-more"


class Api:
    """It listens on a free port, and tells of itself on stderr."""

    def __init__(self, jobs: Path, url: str, *options: str) -> None:
        code = "import sys; from tav_opt.cli import main; sys.exit(main(sys.argv[1:]))"
        given = ["--jobs", str(jobs), "--url", url, "--port", "0", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "api", *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.jobs = jobs
        self.errors: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert words[:1] == ["ready"], self.errors
        self.url = words[1]

    def client(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0)

    def kill(self) -> None:
        """As the kernel does it."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)


@contextmanager
def running(jobs: Path, url: str, *options: str) -> Iterator[Api]:
    api = Api(jobs, url, *options)
    try:
        yield api
    finally:
        if api.process.poll() is None:
            api.stop()


def ended(client: OpenAI, video_id: str, seconds: float = 120) -> Video:
    """A video, once it is completed or failed."""
    end = time.monotonic() + seconds
    while (video := client.videos.retrieve(video_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < end, video
        time.sleep(0.1)
    return video


def under_way(client: OpenAI, video_id: str, seconds: float = 120) -> Video:
    """A video, once a step of it is done."""
    end = time.monotonic() + seconds
    while (video := client.videos.retrieve(video_id)).status == "queued" or video.progress == 0:
        assert time.monotonic() < end and video.status in ("queued", "in_progress"), video
        time.sleep(0.05)
    return video
