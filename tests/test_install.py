"""What is installed elsewhere: requirements that the public index can satisfy, a wheel that is whole, one version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from email import message_from_string
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()

SOURCES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-libs", "tensorrt-rtx-cu13")
"""Published as sources only, with complete metadata. The first and the last are empty and name others; installing the
third fetches its libraries from NVIDIA's own index."""
NO_SOLUTION = 1
"""uv's exit status; of everything else, an index that cannot be reached too, it is another."""


def bare() -> dict[str, str]:
    """This environment without settings of package managers: no local files, no further index."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}


def resolve(python: str, constraints: Path) -> subprocess.CompletedProcess[str]:
    """Looks for versions of everything that pyproject names, all extras at once, in the public index's metadata.

    A solution for all extras together holds for each alone. uv, not pip: it reads metadata where pip downloads every
    wheel, 3 GB for each interpreter. It knows neither what is installed here nor pip's settings. Skips where no index
    answers.
    """
    uv = str(Path(sys.executable).parent / "uv")
    command = [uv, "pip", "compile", "--no-config", "--quiet", "--no-annotate", "--no-header"]
    command += ["--python", sys.executable, "--python-version", python, "--python-platform", "x86_64-manylinux_2_35"]
    command += ["--only-binary", ":all:", *(f"--no-binary={name}" for name in SOURCES)]
    command += ["--constraints", str(constraints), "--all-extras", "pyproject.toml"]
    found = subprocess.run(command, cwd=ROOT, env=bare(), capture_output=True, text=True)
    if found.returncode not in (0, NO_SOLUTION):
        pytest.skip(f"no package index can be reached: {found.stderr.strip().splitlines()[-1]}")
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_extra_resolves_from_published_metadata(python: str) -> None:
    ended = resolve(python, ROOT / "constraints.txt")
    assert ended.returncode == 0, ended.stderr
    found = dict(re.findall(r"^([\w.-]+)==(\S+)", ended.stdout, re.MULTILINE))
    asked = [*PROJECT["dependencies"], *(each for extra in PROJECT["optional-dependencies"].values() for each in extra)]
    names = {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in asked}
    assert names <= set(found)
    assert found["torch"] == "2.13.0" and "nvidia-cudnn-cu13" in found, "not the published build of torch"


def test_a_pin_that_contradicts_the_published_metadata_is_found(tmp_path: Path) -> None:
    """torch 2.13.0's wheel names its triton; a local build for processors names none."""
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\ntriton==3.9.0\n")
    found = resolve("3.12", tmp_path / "constraints.txt")
    assert found.returncode == NO_SOLUTION and "triton" in found.stderr


def test_whoever_installs_takes_the_constraints() -> None:
    """But for the server's numpy 1, which is pinned in place."""
    makefile, container = (
        (ROOT / path).read_text().replace("\\\n", " ") for path in ("Makefile", "serving/deploy/Containerfile")
    )
    assert "--constraint constraints.txt" in re.search(r"^PIP := .*$", makefile, re.MULTILINE)[0]
    steps = [step for text in (makefile, container) for step in re.findall(r"pip install [^&\n]*", text)]
    assert len(steps) == 6
    for step in steps:
        assert "--constraint constraints.txt" in step or re.search(r"--no-deps .* numpy==\d", step), step
    assert "find-links" not in makefile + container


def test_pip_check_names_what_readme_explains() -> None:
    """In the environment that these tests run in."""
    (line,) = (line for line in README.splitlines() if "`pip check`" in line)
    found = subprocess.run([sys.executable, "-m", "pip", "check"], env=bare(), capture_output=True, text=True)
    complaints = found.stdout.splitlines() if found.returncode else []
    for complaint in complaints:
        package, needs = re.fullmatch(r"(\S+) \S+ (?:requires|has requirement) ([\w-]+).*", complaint).groups()
        assert package == "nvidia-pytriton" and package in line and needs in line, complaint


def test_the_changelog_begins_with_the_version() -> None:
    first = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None and first[1] == PROJECT["version"]


def test_the_version_is_in_one_place() -> None:
    code = [*(ROOT / "tav_opt").rglob("*.py"), ROOT / "setup.py", ROOT / "Makefile"]
    assert [str(path) for path in code if f'"{PROJECT["version"]}"' in path.read_text()] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that the container copies, apart: setuptools leaves its own beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tav_opt", folder / "tav_opt", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", "dist", "."], cwd=folder, check=True, env=bare(), capture_output=True)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(files.read(name).decode())


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    """But for the notes to developers of the kernels; setuptools leaves out what nobody names."""
    here = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tav_opt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == here - {"tav_opt/kernels/README.md"}
    assert "tav_opt/py.typed" in packed


def test_the_wheel_says_who_and_which_it_is(metadata: Message) -> None:
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL", []))
    assert urls == PROJECT["urls"] and urls


def test_an_index_page_shows_all_of_readme(metadata: Message) -> None:
    """It has no files beside it: a picture or link to one would be a hole."""
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    tokens = [part for token in MarkdownIt().parse(description) for part in (token, *(token.children or []))]
    addresses = [str(token.attrs.get("src") or token.attrs.get("href") or "") for token in tokens]
    assert [address for address in addresses if address and not address.startswith("https://")] == []
    assert "https://arxiv.org/abs/2212.11565" in addresses
    headings = re.findall(r"^#+ .*$", README, re.MULTILINE)
    assert headings and [line for line in headings if line not in description] == []


def prepared(folder: Path) -> Message:
    """What a wheel built of a folder would say of itself."""
    script = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=bare(), check=True, capture_output=True, text=True
    )
    return message_from_string((folder / ran.stdout.splitlines()[-1] / "METADATA").read_text())


@pytest.mark.parametrize("remote", ["https://github.com/someone/tav-opt", "git@github.com:someone/tav-opt.git"])
def test_pictures_show_on_an_index_page_where_the_files_are_public(remote: str, tmp_path: Path) -> None:
    """Of the commit that is built, from its clone and from a source distribution; links to files likewise."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    steps = (["init", "-q"], ["add", "."], ["commit", "-qm", "all"], ["remote", "add", "origin", remote])
    for step in steps:
        subprocess.run([*git, *step], cwd=tmp_path, check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    places = {"!": "raw.githubusercontent.com/someone/tav-opt", "": "github.com/someone/tav-opt/blob"}
    links = re.findall(r"(!?)\[[^]]*\]\((?!https?:)([^)]*)\)", README)
    expected = [f"](https://{places[mark]}/{head.stdout.strip()}/{path})" for mark, path in links]
    assert any(mark for mark, _ in links) and all((ROOT / path.partition("#")[0]).exists() for _, path in links)
    text = prepared(tmp_path).get_payload()
    assert [address for address in expected if address not in text] == []
    script = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=bare(), check=True, capture_output=True)
    shutil.unpack_archive(next((tmp_path / "dist").iterdir()), tmp_path / "unpacked")
    assert prepared(next((tmp_path / "unpacked").iterdir())).get_payload() == text


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The command runs, and every module is found in it: kernels and export have no __init__ of their own."""
    with ZipFile(wheel) as files:
        files.extractall(tmp_path)  # what installing it does
    modules = sorted(
        ".".join(path.relative_to(tmp_path).with_suffix("").parts) for path in (tmp_path / "tav_opt").rglob("*.py")
    )
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from importlib.util import find_spec\n"
        "from tav_opt.cli import main\n"
        f"print(*(find_spec(name).origin for name in {modules!r}), sep='\\n')\n"
        "sys.exit(main(['--help']))"
    )
    ran = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert {"tav_opt.export.exporting", "tav_opt.kernels.temporal"} <= set(modules)
    assert [line for line in lines[: len(modules)] if not line.startswith(str(tmp_path))] == []
    assert lines[len(modules)].startswith("usage: tav-opt")
