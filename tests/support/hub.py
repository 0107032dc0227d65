"""A stand-in for the Hugging Face Hub on 127.0.0.1, for tests of what mixprec reads and downloads.

It has the part of the HTTP API that huggingface_hub uses for models: repository listings by branch, tag or commit, the
file tree, and ``resolve``. As on the Hub, large files (``*.safetensors``) redirect to a signed URL of a CDN, here a
second port under another host name. Requests are logged, and faults can be injected.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar
from urllib.parse import unquote, urlsplit

__all__ = ["Answer", "HubServer", "Request"]

_API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?/?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BLOB = re.compile(r"/([0-9a-f]{64})")
_ABOUT_REPOS = re.compile("|".join(pattern.pattern for pattern in (_API, _RESOLVE, _BLOB)))
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_SIGNATURE = "X-Amz-Signature=5ec4e7"
_CHUNK = 1 << 16


@dataclass
class Request:
    """A logged request. ``sent`` is the number of bytes of the body, final once ``done`` is set."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Answer:
    """An answer that replaces the server's own."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class _Repo:
    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    readers: frozenset[str] | None = None
    gated: bool = False


class HubServer:
    """The server; ``with HubServer() as hub`` runs it at ``hub.url``.

    Attributes:
        requests: the log of all requests; see also `log`.
        tokens: valid access tokens; others are answered with 401.
        answers: answers to the next requests about repositories, in order.
        cuts: for the next bodies of files, in order, the number of bytes after which the connection is closed.
        ignore_range: answer a range request with the complete file, as some mirrors do.
        silent: log requests without answering them.
        drip: seconds before each byte of a body; 0 for none.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.tokens: set[str] = set()
        self.answers: list[Answer] = []
        self.cuts: list[int] = []
        self.ignore_range = False
        self.silent = False
        self.drip = 0.0
        self._stopped = threading.Event()
        self._repos: dict[str, _Repo] = {}
        self._blobs: dict[str, Path] = {}
        self._hub = self._serve(_HubHandler)
        self._cdn = self._serve(_CdnHandler)
        self.url = f"http://127.0.0.1:{self._hub.server_port}"
        # another host name, by which some releases of huggingface_hub distinguish the Hub from a CDN
        self.cdn_url = f"http://localhost:{self._cdn.server_port}"

    def _serve(self, handler: type[_Handler]) -> ThreadingHTTPServer:
        bound = type(handler.__name__, (handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        # a short poll, so that stopping does not take half a second
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening; connections to the server are refused from then on."""
        self._stopped.set()
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    def add(
        self,
        repo_id: str,
        folder: Path,
        *refs: str,
        readers: frozenset[str] | None = None,
        gated: bool = False,
    ) -> str:
        """Commit the files of a folder, point ``refs`` (by default the branch main) at it; return the commit.

        With ``readers``, only these tokens may read the repository; with ``gated``, its files.
        """
        digest = hashlib.sha1()
        for path in _walk(folder):
            digest.update(f"{path.relative_to(folder)} {_sha256(path)}\n".encode())
        commit = digest.hexdigest()
        repo = self._repos.setdefault(repo_id, _Repo())
        repo.readers, repo.gated = readers, gated
        repo.commits[commit] = folder
        repo.refs.update(dict.fromkeys(refs or ("main",), commit))
        self.tokens |= readers or frozenset()
        return commit

    def log(self, fragment: str = "") -> list[Request]:
        """The requests about repositories whose path contains ``fragment``, once they are complete."""
        known = [request for request in self.requests if _ABOUT_REPOS.match(request.path)]
        chosen = [request for request in known if fragment in request.path]
        if not all(request.done.wait(10) for request in chosen):
            raise TimeoutError("a request goes on")
        return chosen


def _walk(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_sha1(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[HubServer]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; Nagle holds the second back for 40 ms

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output clean; `HubServer.requests` is the log."""

    def do_GET(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        request = Request(self.command, self.path, self.headers.get("Range"), token)
        self.hub.requests.append(request)
        try:
            if self.hub.silent:
                self.hub._stopped.wait()
                self.close_connection = True
            else:
                self.answer(request)
        except (BrokenPipeError, ConnectionResetError):  # the client has read enough
            self.close_connection = True
        finally:
            request.done.set()

    do_HEAD = do_GET

    def answer(self, request: Request) -> None:
        raise NotImplementedError

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(body)

    def send_body(self, data: bytes) -> int:
        for byte in data if self.hub.drip else ():
            if self.hub._stopped.wait(self.hub.drip):
                break
            self.wfile.write(bytes([byte]))
        return len(data) if self.hub.drip else self.wfile.write(data)

    def reply_file(self, request: Request, path: Path, headers: dict[str, str]) -> None:
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        asked = _RANGE.fullmatch(request.range or "")
        if asked and not self.hub.ignore_range:
            start, stop = int(asked[1]), min(size, int(asked[2]) + 1 if asked[2] else size)
            if start >= size:
                self.reply(416, headers={"Content-Range": f"bytes */{size}"})
                return
            status = 206
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts:
            stop = min(stop, start + self.hub.cuts.pop(0))
            self.close_connection = True
        with path.open("rb") as file:
            self.send_bytes(request, file, start, stop)

    def send_bytes(self, request: Request, file: BinaryIO, start: int, stop: int) -> None:
        file.seek(start)
        while (left := stop - file.tell()) > 0:
            request.sent += self.send_body(file.read(min(_CHUNK, left)))


class _CdnHandler(_Handler):
    """The CDN: files by their hash, for signed URLs."""

    def answer(self, request: Request) -> None:
        url = urlsplit(self.path)
        if url.query != _SIGNATURE or request.token is not None:
            self.reply(400, b"one kind of authorization, please")
            return
        digest = url.path.removeprefix("/")
        self.reply_file(request, self.hub._blobs[digest], {"ETag": f'"{digest}"'})


class _HubHandler(_Handler):
    def answer(self, request: Request) -> None:
        path = urlsplit(self.path).path
        if not _ABOUT_REPOS.fullmatch(path):  # huggingface_hub asks for other things, too
            self.refuse(404, "", "Not Found")
        elif self.hub.answers:
            canned = self.hub.answers.pop(0)
            self.reply(canned.status, canned.body, canned.headers)
        elif request.token is not None and request.token not in self.hub.tokens:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif match := _RESOLVE.fullmatch(path):
            self.resolve(request, match[1], unquote(match[2]), unquote(match[3]))
        elif match := _API.fullmatch(path):
            self.api(request, match[1], match[2], unquote(match[3] or "main"))

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        body = json.dumps({"error": message}).encode()
        self.reply(status, body, {name: value for name, value in headers.items() if value})

    def find(self, request: Request, repo_id: str, revision: str, *, files: bool) -> tuple[str, Path] | None:
        """The commit and folder of a revision, or None after an answer that refuses them."""
        repo = self.hub._repos.get(repo_id)
        known = repo is not None and (repo.readers is None or request.token in repo.readers)
        if repo is None or not (known or repo.gated):
            # the Hub answers alike for private and for missing repositories
            status = 401 if request.token is None else 404
            self.refuse(status, "RepoNotFound", "Repository not found")
        elif files and not known:
            status = 401 if request.token is None else 403
            self.refuse(status, "GatedRepo", f"Access to model {repo_id} is restricted.")
        elif (commit := repo.refs.get(revision, revision)) not in repo.commits:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return commit, repo.commits[commit]
        return None

    def resolve(self, request: Request, repo_id: str, revision: str, name: str) -> None:
        found = self.find(request, repo_id, revision, files=True)
        if found is None:
            return
        commit, folder = found
        path = folder / name
        if not path.is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif path.suffix == ".safetensors":
            digest = _sha256(path)
            self.hub._blobs[digest] = path
            headers = {
                "X-Repo-Commit": commit,
                "X-Linked-Size": str(path.stat().st_size),
                "X-Linked-Etag": f'"{digest}"',
                "Location": f"{self.hub.cdn_url}/{digest}?{_SIGNATURE}",
            }
            self.reply(302, headers=headers)
        else:
            self.reply_file(request, path, {"X-Repo-Commit": commit, "ETag": f'"{_git_sha1(path)}"'})

    def api(self, request: Request, repo_id: str, kind: str | None, revision: str) -> None:
        found = self.find(request, repo_id, revision, files=False)
        if found is None:
            return
        commit, folder = found
        files = [(path.relative_to(folder).as_posix(), path) for path in _walk(folder)]
        if kind == "tree":
            tree = [{"type": "file", "path": name, **_blob(path, "oid")} for name, path in files]
            self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            return
        blobs = "blobs=true" in urlsplit(self.path).query.lower()
        siblings = [{"rfilename": name, **(_blob(path, "blobId") if blobs else {})} for name, path in files]
        info = {"_id": commit[:24], "id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
        self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})


def _blob(path: Path, key: str) -> dict[str, Any]:
    size = path.stat().st_size
    blob: dict[str, Any] = {key: _git_sha1(path), "size": size}
    if path.suffix == ".safetensors":
        blob["lfs"] = {"sha256": _sha256(path), "oid": _sha256(path), "size": size, "pointerSize": 134}
    return blob
