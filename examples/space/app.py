"""A Hugging Face Space that edits exported clips: their repository is fetched from `CLIPS`, any address of fsspec."""

from __future__ import annotations

import os
from pathlib import Path

from tav_opt.app.app_config import AppConfig
from tav_opt.app.page import serve
from tav_opt.repository.pulling import pull

CLIPS = os.environ.get("CLIPS", "")
REPOSITORY = Path("model_repository")

if __name__ == "__main__":
    if not CLIPS:
        raise SystemExit(
            "set the Space's variable CLIPS to the address of a model repository: hf://datasets/owner/clips"
        )
    pull(CLIPS, REPOSITORY, lambda clip: print(f"{clip.name}: fetched", flush=True))
    serve(
        AppConfig(
            in_process=True,
            repository=REPOSITORY,
            tuning=False,
            host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),  # the Space's proxy is another machine
            port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
        )
    )
