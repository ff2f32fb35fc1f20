"""What docs/serving.md says runs, against the real server."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import supervised
from supervised import CLIP

from tav_opt import contract
from tav_opt.serving.server import Server

TEXT = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()


def block(language: str, words: str) -> str:
    """The one block of code with these words."""
    (found,) = [code for code in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if words in code]
    return found.replace("man-skiing", CLIP)


@pytest.fixture(scope="module")
def server(golden, tmp_path_factory):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with Server(supervised.on_free_ports(supervised.repository(golden, tmp_path_factory.getbasetemp()))) as running:
        yield running


def shell(code: str, server: Server, folder: Path) -> str:
    code = code.replace("localhost:8000", server.http_url)
    return subprocess.run(["bash", "-ec", code], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_progress_over_http(server, tmp_path):
    shown = shell(block("sh", "generate_stream"), server, tmp_path)
    events = re.findall(r"^data: (.*)$", shown, re.MULTILINE)
    assert '"stage":"sample","step":1,"steps":30' in events[0]
    assert '"frames":[' in events[-1]


@pytest.mark.skipif(not hasattr(contract, "UNARY_MODEL"), reason="there is no unary model")
def test_a_file_over_http(server, tmp_path):
    from tav_opt import video

    shell(block("sh", "/infer"), server, tmp_path)
    assert video.read(tmp_path / "edit.mp4").frames.shape[0] == 4


def test_the_python_client(server):
    names: dict = {}
    exec(block("python", "Client(").replace("localhost:8001", server.grpc_url), names)
    assert names["edit"].frames.shape == (1, 4, 64, 64, 3)
