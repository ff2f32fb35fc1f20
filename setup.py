import re
import subprocess
from email import message_from_string
from pathlib import Path

from setuptools import find_namespace_packages, setup

LOCAL_LINK = re.compile(r"(!?)\[([^]]*)\]\((?!https?:)([^)]*)\)")
GITHUB = re.compile(r"(?:https://|git@|ssh://git@)github\.com[/:]([\w.-]+/[\w.-]+?)(?:\.git)?/?")


def git(*arguments: str) -> str:
    """What git says of this folder; nothing where it cannot."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def description() -> str:
    """README.md as an index page shows it, where no files lie beside it.

    Pictures and links to files are those of the commit that is built, where it was cloned from GitHub; from elsewhere,
    their words.
    """
    if Path("PKG-INFO").is_file():  # of a source distribution, which git knows nothing of
        return message_from_string(Path("PKG-INFO").read_text(encoding="utf-8")).get_payload()
    own = git("rev-parse", "--show-toplevel") == str(Path.cwd())
    public = GITHUB.fullmatch(git("remote", "get-url", "origin")) if own else None

    def placed(link: re.Match[str]) -> str:
        mark, words, path = link.groups()
        if public is None:
            return words
        place = f"raw.githubusercontent.com/{public[1]}" if mark else f"github.com/{public[1]}/blob"
        return f"{mark}[{words}](https://{place}/{git('rev-parse', 'HEAD')}/{path})"

    return LOCAL_LINK.sub(placed, Path("README.md").read_text(encoding="utf-8"))


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    # tav_opt/kernels and tav_opt/export are namespace packages: a link to one of them from the root must not make an
    # importable top-level package that shadows the PyPI package `kernels`, which transformers imports.
    packages=find_namespace_packages(include=["tav_opt", "tav_opt.*"], exclude=["tav_opt.demo.*"]),
)
