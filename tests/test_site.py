"""The site that `make docs` builds: every page is in it, every link leads somewhere, nothing is fetched from others."""

from __future__ import annotations

import ast
import html
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import tav_opt
from tav_opt import cli
from tav_opt.contract import STREAM_INPUTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
QUIET = {"HF_HUB_OFFLINE": "1", "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
LOADING = {"script": "src", "img": "src", "source": "src", "video": "src", "iframe": "src", "link": "href"}
"""What a page loads when it is opened."""


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "mkdocs"
    if not program.exists():
        pytest.skip("mkdocs is not installed: pip install 'tav-opt[docs]'")
    command = [program, "build", "--site-dir", folder, *options]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **QUIET}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it, where a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Page(HTMLParser):
    """What a page loads, where it links to, in its navigation too, and what can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads, self.links, self.anchors, self.navigation = (set[str]() for _ in range(4))
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if (
            tag in LOADING
            and (address := found.get(LOADING[tag]))
            and found.get("rel") not in ("canonical", "next", "prev")
        ):
            self.loads.add(address)
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
            if "md-nav__link" in found.get("class", ""):
                self.navigation.add(found["href"])


@cache
def page(path: Path) -> Page:
    return Page(path)


def test_every_page_of_docs_is_in_the_navigation(site):
    """A page that is added tomorrow too: .nav.yml ends with a pattern for all that it does not name."""
    reached = page(site / "python.html").navigation | {"python.html"}
    assert not [path.name for path in DOCS.glob("*.md") if f"{path.stem}.html" not in reached]


def test_every_link_anchor_and_picture_is_there(site):
    """Those of the pages that are made of the repository's files too, and of the theme."""
    lost = []
    for path in site.rglob("*.html"):
        if path.name == "404.html":  # it may be shown anywhere, and is addressed from the root
            continue
        for address in page(path).links | page(path).loads:
            if re.match(r"[a-z]+:|//", address):
                continue
            file, _, anchor = address.partition("#")
            target = (path.parent / file).resolve() if file else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file() or (
                anchor and target.suffix == ".html" and anchor not in page(target).anchors | {"__toc"}
            ):
                lost.append(f"{path.relative_to(site)}: {address}")
    assert not lost


def test_nothing_is_loaded_from_others(site):
    for path in site.rglob("*.html"):
        assert not [address for address in page(path).loads if re.match(r"(https?:)?//", address)], path
    assert not [path for path in site.rglob("*.css") if "@import" in (text := path.read_text()) or "url(http" in text]


def test_a_page_that_links_to_nowhere_fails_the_build(tmp_path):
    """What the strict build is for, on a page of this test's own."""
    config = (ROOT / "mkdocs.yml").read_text()
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# One\n\n[nowhere](absent.md), [no such place](index.md#absent)\n")
    for unwanted in ("hooks: [docs/hooks.py]\n", "  - awesome-nav\n"):
        assert unwanted in config
        config = config.replace(unwanted, "")
    config = config[: config.index("  - mkdocstrings:")] + config[config.index("markdown_extensions:") :]
    (tmp_path / "mkdocs.yml").write_text(config)
    built = build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert built.returncode == 1
    told = built.stdout + built.stderr
    assert "'absent.md'" in told and "'index.md#absent'" in told and "2 warnings" in told


def test_the_reference_has_every_public_name_and_field(site):
    text = (site / "python.html").read_text()
    asked = set(re.findall(r"^<!-- ::: (\S+) -->$", (DOCS / "python.md").read_text(), re.MULTILINE))
    assert {f"tav_opt.{name}" for name in tav_opt.__all__} <= asked
    headings = re.findall(r"<h3[^>]*>(.*?)</h3>", text, re.DOTALL)
    assert asked <= {html.unescape(re.sub("<[^>]*>", "", heading)).strip(" \n¶") for heading in headings}
    assert "guidance_scale" in text and "keep_state" in text, "fields, inherited ones too"
    assert "<!-- :::" not in text


def test_commands_and_inputs_are_those_of_the_program(site):
    text = re.sub("<[^>]*>", "", (site / "commands.html").read_text())
    assert not [name for name in cli.COMMANDS if f"usage: tav-opt {name}" not in text and f"{name} [-h]" not in text]
    assert not [tensor.name for tensor in STREAM_INPUTS if tensor.name not in text]


def test_equations_are_drawn_by_the_browser(site):
    text = (site / "method.html").read_text()
    assert text.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') >= 8
    assert "arithmatex" not in text and "\\frac" not in text


# Troubleshooting: the messages are the program's own.


def templates() -> set[str]:
    """Every text in the package, with … where a value is put in."""
    found = set()
    for path in (ROOT / "tav_opt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (value.value if isinstance(value, ast.Constant) else "…" for value in node.values)
                found.add(re.sub("…+", "…", "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


QUOTED = re.findall(r"^### `+(.*?)`+$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


def test_every_message_that_is_quoted_is_in_the_code():
    said = templates()
    assert len(QUOTED) > 40 and "no such message" not in said
    assert not [message for message in QUOTED if not any(message.strip("…") in text for text in said)]


# In a browser, opened from the disk.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (program := shutil.which("chromium")) is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.mark.full
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_the_window_and_ask_nobody(site, browser, width):
    shown = browser.new_page(viewport={"width": width, "height": 844})
    asked, wide = [], []
    shown.on("request", lambda request: asked.append(request.url))
    for path in sorted(site.glob("*.html")):
        shown.goto(path.as_uri())
        if shown.evaluate("document.documentElement.scrollWidth") > width:
            wide.append(path.name)
    assert not wide
    assert not [address for address in asked if not address.startswith(("file:", "data:"))]


@pytest.mark.full
def test_the_search_finds_an_error_by_its_words(site, browser):
    shown = browser.new_page(viewport={"width": 1280, "height": 844})
    shown.goto((site / "index.html").as_uri())
    shown.click(".md-search__input")
    shown.keyboard.type("deadline has passed")
    found = shown.wait_for_selector(".md-search-result__link", timeout=20_000)
    assert found.get_attribute("href").partition("?")[0].endswith("troubleshooting.html")
