"""The Hugging Face hub on this machine: its HTTP API as far as models are fetched from it and clips pushed to it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories `owner/<name of a folder>` of a root folder; `fetched` are the files that were asked for."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.fetched: list[str] = []
        self.pushed: list[dict[str, bytes]] = []
        """The files of each commit."""
        self.large: dict[str, bytes] = {}
        """What was uploaded apart, by its SHA-256."""
        self.refuses: int = 0
        """The status of every upload, where it is none that goes well."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        match url.path.strip("/").split("/"):
            case ["api", "models", "owner", name, *rest]:
                self.api(self.server.root / name, rest, parse_qs(url.query))
            case ["owner", name, "resolve", _, *file]:
                self.file(self.server.root / name, "/".join(file))
            case _:
                self.answer(404, b"{}")

    do_HEAD = do_GET

    def api(self, repository: Path, rest: list[str], query: dict[str, list[str]]) -> None:
        if repository.name == "gated":
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if repository.name == "broken":
            return self.answer(500, b"{}")
        if not repository.is_dir():
            return self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        names, ids = _files(repository)
        if rest[:1] == ["tree"]:
            found = list(_tree(names, ids, unquote("/".join(rest[2:])), query.get("recursive") == ["true"]))
            if not found:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self.answer(200, json.dumps(found).encode())
        siblings = [{"rfilename": name} | ({"size": size} if "blobs" in query else {}) for name, size in names.items()]
        info = {"id": f"owner/{repository.name}", "sha": COMMIT, "siblings": siblings}
        return self.answer(200, json.dumps(info).encode())

    def file(self, repository: Path, name: str) -> None:
        if not (repository / name).is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.fetched.append(name)
        content = (repository / name).read_bytes()
        return self.answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{sha1(content).hexdigest()}"'})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path.strip("/").split("/")
        if self.server.refuses:
            return self.answer(self.server.refuses, b'{"error": "no rights here"}')
        match path:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                folder = self.server.root / asked["name"]
                there = folder.is_dir()
                folder.mkdir(exist_ok=True)
                told = {"url": f"{self.server.url}/owner/{folder.name}"}
                return self.answer(409 if there else 200, json.dumps(told).encode())
            case ["api", "validate-yaml"]:
                return self.answer(200, b'{"errors": [], "warnings": []}')
            case ["api", "models", "owner", _, "preupload", _]:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {True: "lfs", False: "regular"}
                found = [
                    {"path": n, "uploadMode": modes[n.endswith(".safetensors")], "shouldIgnore": False} for n in names
                ]
                return self.answer(200, json.dumps({"files": found}).encode())
            case ["owner", _, "info", "lfs", "objects", "batch"]:
                objects = json.loads(body)["objects"]
                for one in objects:
                    one["actions"] = {"upload": {"href": f"{self.server.url}/upload/{one['oid']}"}}
                kind = {"Content-Type": "application/vnd.git-lfs+json"}
                return self.answer(200, json.dumps({"transfer": "basic", "objects": objects}).encode(), kind)
            case ["api", "models", "owner", name, "paths-info", _]:
                asked = parse_qs(body.decode())["paths"]
                sizes, ids = _files(self.server.root / name)
                found = [one for one in _tree(sizes, ids, "", recursive=True) if one["path"] in asked]
                return self.answer(200, json.dumps(found).encode())
            case ["api", "models", "owner", name, "commit", _]:
                return self.commit(self.server.root / name, [json.loads(line) for line in body.splitlines()])
        return self.answer(404, b"{}")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[self.path.rpartition("/")[2]] = body
        assert sha256(body).hexdigest() in self.server.large
        self.answer(200, b"{}")

    def commit(self, folder: Path, lines: list[dict]) -> None:
        files: dict[str, bytes] = {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.large[line["value"]["oid"]]
        for name, content in files.items():
            (folder / name).write_bytes(content)
        self.server.pushed.append(files)
        told = {
            "commitUrl": f"{self.server.url}/owner/{folder.name}/commit/{COMMIT}",
            "commitOid": COMMIT,
            "success": True,
        }
        self.answer(200, json.dumps(told).encode())

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _files(repository: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes and ids, by name."""
    found = sorted(file for file in repository.rglob("*") if file.is_file())
    sizes = {file.relative_to(repository).as_posix(): file.stat().st_size for file in found}
    return sizes, {name: sha1((repository / name).read_bytes()).hexdigest() for name in sizes}


def _tree(sizes: dict[str, int], ids: dict[str, str], below: str, recursive: bool) -> Iterator[dict]:
    """What lies in a folder of a repository, or anywhere below it: folders, then files."""
    inside = {name: size for name, size in sizes.items() if not below or name.startswith(f"{below}/")}
    depth = below.count("/") + 2 if below else 1
    folders = {"/".join(parts[:n]) for parts in (name.split("/") for name in inside) for n in range(depth, len(parts))}
    for folder in sorted(folders):
        if recursive or folder.count("/") == depth - 1:
            yield {"type": "directory", "path": folder, "size": 0, "oid": sha1(folder.encode()).hexdigest()}
    for name, size in inside.items():
        if recursive or name.count("/") == depth - 1:
            yield {"type": "file", "path": name, "size": size, "oid": ids[name]}


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub asks in the block, with a cache of its own."""
    (folder / "hub").mkdir()
    with Hub(folder / "hub") as server, pytest.MonkeyPatch.context() as patch:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        patch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a store of its own, which needs more than HTTP
        yield server
        server.shutdown()
        thread.join()
