"""The notebook runs from top to bottom on a processor, as who opens it would run it, and carries no outputs in git."""

from __future__ import annotations

import base64
import io
import json
import re
import resource
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook" / "first-edit.ipynb"
MINUTES = 4
"""Of one core: less by the clock where there are more."""


def test_no_outputs_are_in_git():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and not [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None]


def test_its_links_lead_somewhere():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert len(links) >= 4 and not [link for link in links if not (NOTEBOOK.parent / link).exists()]


@pytest.mark.full
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """With no network to fall back on, in a folder of its own; seconds are the kernel's own."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "no_proxy": "localhost"}.items():
        monkeypatch.setenv(name, value)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    moving = [picture for data in shown if (picture := data.get("image/gif"))]
    assert len(moving) == 4, "source, edits, inversion, fast"
    assert Image.open(io.BytesIO(base64.b64decode(moving[1]))).n_frames == 12
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert text.count("frame consistency") == 3 and "nan" not in text
    assert used.ru_utime - before.ru_utime < MINUTES * 60
