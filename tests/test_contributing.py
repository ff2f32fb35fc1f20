"""What CONTRIBUTING.md and the hooks name is there; the hooks run, and find what they are for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_architecture import ROWS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
BIN = Path(sys.executable).parent
BAD = "import os\nx = [ 1,2 ]\n"


def test_the_house_on_the_page_is_the_one_that_is_held():
    rows = re.findall(r"^\| (`[a-z_` ]+`) \|", TEXT, re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == [tuple(rooms) for rooms in ROWS]


def test_files_and_names_that_are_mentioned_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert "://" in link or (ROOT / link).exists(), link
    for path in re.findall(r"`((?:tests|serving|benchmarks|engines|export|metrics)/[\w./-]+\.\w+)`", TEXT):
        assert (ROOT / path).exists() or (ROOT / "tav_opt" / path).exists(), path


def test_the_command_that_writes_the_model_files_writes_those_in_git(tmp_path):
    (code,) = re.findall(r'`python -c "(.*?)"`', TEXT)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    changed = ["git", "status", "--porcelain", "serving/model_repository"]
    assert not subprocess.run(changed, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_each_hook_is_a_tool_that_is_installed():
    for hook in HOOKS:
        program = hook["entry"].split()[0]
        assert program.startswith(".venv/bin/") and (BIN / Path(program).name).exists(), hook["id"]
        assert hook["language"] == "system"


def test_pre_commit_takes_the_file_and_the_hooks_find_what_is_wrong(tmp_path):
    pre_commit = BIN / "pre-commit"
    if not pre_commit.exists() or shutil.which("git") is None:
        pytest.skip("pre-commit or git is not installed")
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(BIN.parent)
    (tmp_path / "bad.py").write_text(BAD)
    (tmp_path / "good.py").write_text("x = 1\n")
    for command in (["init", "-q"], ["add", "bad.py", "good.py", ".pre-commit-config.yaml", "pyproject.toml"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert subprocess.run([pre_commit, "validate-config"], cwd=tmp_path).returncode == 0

    def ran(hook: str, file: str) -> subprocess.CompletedProcess[str]:
        command = [pre_commit, "run", hook, "--files", file]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    for hook, words in (("ruff-check", "F401"), ("ruff-format", "would be reformatted")):
        found = ran(hook, "bad.py")
        assert found.returncode == 1 and words in found.stdout, found
        assert ran(hook, "good.py").returncode == 0
    assert (tmp_path / "bad.py").read_text() == BAD, "a hook looks, and changes nothing"
