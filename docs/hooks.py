"""What the site has beyond the pages of docs/, which GitHub shows as they are (mkdocs.yml names this file).

Links that leave docs/ lead to pages made of the files they name, equations become MathML, which browsers draw without a
script, and what a page asks for in a comment is let in: `<!-- ::: name -->` the reference of that name,
`<!-- commands -->` what each command's --help says, `<!-- contract -->` the tables of what is served.
"""

from __future__ import annotations

import html
import io
import json
import os.path
import re
from collections.abc import Iterable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

import tav_opt
from tav_opt import cli, contract

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)#\s]+)(?=[)#])")
"""A link or picture of Markdown up to its anchor."""
ASKED = re.compile(r"^<!-- (::: [\w.]+|commands|contract) -->$", re.MULTILINE)
EQUATION = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)
SOURCES = "files"
"""Folder of the site for files that lie elsewhere in the repository."""
NOT_SEARCHED = "---\nsearch: {exclude: true}\n---\n\n"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".tpl": "yaml", "Containerfile": "docker"}
READ = (".md", ".ipynb")
"""What is read as text, whose links are followed."""
MOST_BYTES = 200_000
"""Of a file that becomes a page."""


class _Page(Protocol):
    file: File


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each file of the repository that pages link to, and for those that these link to."""
    waiting = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while waiting:
        place, text = waiting.pop()
        for path in _linked(place, text):
            uri = _uri(path)
            if path.startswith("docs/") or files.get_file_from_path(uri) is not None:
                continue
            content = _content(path)
            files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
            waiting.append((path, content))
    return files


def on_page_markdown(markdown: str, page: _Page, **_: Any) -> str:
    """Links to the repository's files become those of the site; what comments ask for is let in."""
    uri = page.file.src_uri
    place = _places.get(uri, f"docs/{uri}")

    def led(link: re.Match[str]) -> str:
        path = _path(place, link[2])
        if path is None or (place.startswith("docs/") and path.startswith("docs/")):
            return link[0]
        return link[1] + os.path.relpath(_uri(path), os.path.dirname(uri) or ".")

    return ASKED.sub(lambda found: _asked(found[1]), LINK.sub(led, markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Equations in LaTeX become MathML."""
    return EQUATION.sub(lambda found: _mathml(found[2], block=found[1] == "div"), content)


def _asked(what: str) -> str:
    match what:
        case "commands":
            return "\n\n".join(f"## tav-opt {name}\n\n```text\n{_help(name)}\n```" for name in cli.COMMANDS)
        case "contract":
            inputs = _table(("input", "type", "shape", "what it is"), contract.STREAM_INPUTS)
            return f"{inputs}\n\n{_table(('output', 'type', 'shape', 'what it is'), contract.STREAM_OUTPUTS)}"
    name = what.removeprefix("::: ")
    return f"::: {_defined(name)}\n    options: {{heading: {name}, toc_label: {name.rpartition('.')[2]}}}"


def _defined(name: str) -> str:
    """Where a public name is defined, as the reference's maker finds it: its source is read, not imported."""
    module, attribute = tav_opt._PUBLIC.get(name.removeprefix("tav_opt."), (None, None))
    found = name if module is None else f"{module}.{attribute}"
    # A namespace package is found at the top alone, where a link of that name lies.
    return found.removeprefix("tav_opt.") if found.startswith("tav_opt.export.") else found


def _help(name: str) -> str:
    """What a command's --help prints, without the last line, which is the same for all."""
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit), patch.dict(os.environ, COLUMNS="78", NO_COLOR="1"):
        cli.COMMANDS[name](["--help"])
    return shown.getvalue().strip()


def _table(head: tuple[str, ...], tensors: Iterable[contract.ServedTensor]) -> str:
    rows = [
        f"| `{tensor.name}` | {tensor.dtype} | {list(tensor.shape)} | {tensor.doc}{'' if tensor.optional else needed} |"
        for needed in ["; needed" if head[0] == "input" else ""]
        for tensor in tensors
    ]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])


_places: dict[str, str] = {}
"""Where a page that was made here stands in the repository, by its place on the site."""


def _mathml(latex: str, *, block: bool) -> str:
    return convert(html.unescape(latex), display="block" if block else "inline")


def _linked(place: str, text: str) -> list[str]:
    """What a file of the repository links to, in the repository; of code nothing is a link."""
    if not place.endswith(READ) and not (ROOT / place).is_dir():
        return []
    found = [_path(place, link[2]) for link in LINK.finditer(text)]
    return list(dict.fromkeys(path for path in found if path is not None))


def _path(place: str, link: str) -> str | None:
    """The path from the repository's root, where the link is to a file of it."""
    if ":" in link or link.startswith("/"):
        return None
    folder = place if (ROOT / place).is_dir() else os.path.dirname(place)
    path = os.path.normpath(os.path.join(folder, link))
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def _uri(path: str) -> str:
    """The page, within the site's docs, of a file or folder of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    uri = f"{SOURCES}/{path}" if path.endswith(".md") else f"{SOURCES}/{path}.md"
    _places[uri] = path
    return uri


def _content(path: str) -> str:
    """Markdown as it stands, a notebook's cells, code as a block, a folder as the list of its files."""
    place = ROOT / path
    if place.is_dir():
        names = sorted(str(file.relative_to(place)) for file in place.rglob("*") if _shown(file))
        return f"{NOT_SEARCHED}# {path}/\n\n" + "\n".join(f"- [{name}]({name})" for name in names) + "\n"
    text = place.read_text(encoding="utf-8")
    if place.suffix == ".md":
        return text
    if place.suffix == ".ipynb":
        return "\n\n".join(_cell(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
    language = LANGUAGES.get(place.suffix, LANGUAGES.get(place.name, "text"))
    return f"{NOT_SEARCHED}# {path}\n\n````{language}\n{text}\n````\n"


def _cell(kind: str, source: str) -> str:
    return source if kind == "markdown" else f"```python\n{source}\n```"


def _shown(file: Path) -> bool:
    hidden = any(part.startswith((".", "__pycache__")) for part in file.relative_to(ROOT).parts)
    return file.is_file() and not hidden and file.stat().st_size <= MOST_BYTES
