"""Checkpoints on the Hugging Face Hub: headers are read in place, files are downloaded when needed.

A plan needs ``config.json``, the index and the headers of the safetensors files: some kilobytes of a repository of
hundreds of gigabytes. `HubRepo.open` lists a repository, `HubRepo.read` reads byte ranges of its files, and only
`HubRepo.fetch` downloads. All three use one commit, whatever is pushed meanwhile.

huggingface_hub takes a third of a second to import, so it is imported where it is used, never for local folders.
"""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import responses
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import HubError
from .deadline import TooLateError, at_most
from .reader import FileReader

__all__ = ["HubRepo", "parse_repo_id"]


# The Hub's rules for the two parts of an id, and git's for what may follow the "@".
_NAME = re.compile(r"(?!.*(?:--|\.\.))(?=.{1,96}$)[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_REVISION = re.compile(r"(?!.*(?:\.\.|//))[\w.+#=,-]+(?:/[\w.+#=,-]+)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

_TRANSIENT = (429, 500, 502, 503, 504)
_WAITS = (1, 2, 4)  # seconds before a request whose connection broke is sent again
_CHUNK = 1 << 16
_BROKEN = (ValueError, RecursionError, TypeError, KeyError, AttributeError)
"""Errors of huggingface_hub for answers that are not JSON or have another shape, and for names that it refuses."""
_LONGEST = 60.0
_SLOWEST = 20_000
"""An answer may take ``_LONGEST`` seconds, plus a second for every ``_SLOWEST`` bytes."""


def parse_repo_id(text: str) -> tuple[str, str | None] | None:
    """The parts of ``org/name`` or ``org/name@revision``; None if ``text`` cannot be a repository's id."""
    repo_id, at, revision = text.partition("@")
    parts = repo_id.split("/")
    if len(parts) != 2 or not all(map(_NAME.fullmatch, parts)) or repo_id.endswith(".git"):
        return None
    if at and not _REVISION.fullmatch(revision):
        return None
    return repo_id, revision or None


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A repository of the Hub at one commit.

    Every error is a `HubError` that names the repository, the revision and, where one is at fault, the file.
    """

    repo_id: str
    revision: str | None  # as the user wrote it; None is the branch main
    commit: str  # what the revision stood for when the repository was opened
    files: Mapping[str, int | None]  # name -> bytes; only cached files if the cache was opened
    offline: str | None = None  # the reason why the cache was opened and not the Hub; None when the Hub answered

    @classmethod
    def open(cls, repo_id: str, revision: str | None = None) -> HubRepo:
        """Lists a repository and resolves its revision to a commit, without downloading anything.

        The cache answers when HF_HUB_OFFLINE is set, and when the Hub cannot be reached or fails.

        Raises:
            HubError: the id or revision is malformed, unknown or not accessible, or neither the Hub nor the
                cache can answer.
        """
        text = repo_id if revision is None else f"{repo_id}@{revision}"
        if parse_repo_id(text) != (repo_id, revision):
            raise HubError(f"{text!r} is not a repository of the Hub: write org/name or org/name@revision")
        where = _location(repo_id, revision)
        from huggingface_hub import HfApi, constants

        try:
            with _hub_errors(repo_id, where), _in_time(0, where):
                info = HfApi().model_info(
                    repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
                )
        except _UnreachableError as error:
            snapshot = _cached_snapshot(repo_id, revision)
            if snapshot is None:
                raise HubError(f"not in the cache, and {error.reason}", path=where) from None
            return cls(repo_id, revision, snapshot.name, _list_files(snapshot), offline=error.reason)
        if info.sha is None or info.siblings is None:
            raise HubError(f"{_endpoint()} lists no files and no commit: check HF_ENDPOINT", path=where)
        listed = [(file.rfilename, file.size) for file in info.siblings]
        sound = all(isinstance(name, str) and (size is None or type(size) is int) for name, size in listed)
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha) or not sound:
            raise HubError(f"{_endpoint()} lists files or a commit that cannot be: check HF_ENDPOINT", path=where)
        files = dict(listed)
        if bad := [name for name, size in files.items() if size is not None and not 0 <= size < 1 << 63]:
            raise HubError(f"{_endpoint()} says that {bad[0]!r} has {files[bad[0]]} bytes", path=where)
        return cls(repo_id, revision, info.sha, files)

    def cached(self, name: str) -> Path | None:
        """The cached copy of a file at this commit, if there is one."""
        # Names come from an index that anyone may have written: ../../x must not lead out of the cache.
        if name not in self.files:
            return None
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo_id, name, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def read(self, name: str, offset: int, length: int) -> bytes:
        """``length`` bytes of a file from ``offset`` on, fewer only where the file ends.

        They come from the cached copy if there is one, else from the Hub by an HTTP range request, and are not cached.

        Raises:
            HubError: no such file, no access to it, or the Hub fails, cannot be reached or sends too little.
        """
        self._require(name)
        where = _location(self.repo_id, self.revision, name)
        path = self.cached(name)
        if path is not None:
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    return file.read(length)
            except OSError as error:
                raise HubError(f"the cached copy cannot be read: {error}", path=where) from error

        size = self.files[name]
        if size is not None:
            length = min(length, size - offset)
        if length <= 0:
            return b""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repo_id, name, revision=self.commit)
        with _hub_errors(self.repo_id, where) as headers, _in_time(offset + length, where):
            data = _get_range(url, headers, offset, length, where)
        if len(data) < length and size is not None:
            message = f"{_endpoint()} sent {len(data)} of the {length} bytes at {offset}: try again later"
            raise HubError(message, path=where)
        return data

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """Downloads files that are not in the cache. Returns name -> path in the cache.

        Raises:
            HubError: no such file, no access to it, or the download fails. Files that arrived stay cached.
        """
        paths = {name: self.cached(name) for name in names}
        for name in paths:  # all of them before the first download, which may take an hour
            self._require(name)
        from huggingface_hub import hf_hub_download

        fetched = {}
        for name, path in paths.items():
            where = _location(self.repo_id, self.revision, name)
            if path is None:
                # hf_xet reports failures of its storage servers as RuntimeError
                with _hub_errors(self.repo_id, where, RuntimeError), _in_time(self.files[name] or 0, where):
                    path = Path(hf_hub_download(self.repo_id, name, revision=self.commit))
            fetched[name] = path
        self._remember_revision()
        return fetched

    def reader(self) -> FileReader:
        """Reads tensors from the cached copies of their files, else by range requests."""
        return FileReader(self.cached, self.read)

    def _require(self, name: str) -> None:
        if name in self.files:
            return
        where = _location(self.repo_id, self.revision, name)
        if self.offline is not None:
            raise HubError(f"not in the cache, and {self.offline}", path=where)
        raise HubError(f"no such file in the repository at commit {self.commit}", path=where)

    def _remember_revision(self) -> None:
        """Lets the revision resolve to this commit offline; a download at a commit does not record that."""
        revision = self.revision or "main"
        if self.offline is not None or revision == self.commit:
            return
        ref = _cache_folder(self.repo_id) / "refs" / revision
        # a read-only cache can still be used
        with suppress(OSError):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(self.commit)


class _UnreachableError(HubError):
    """The Hub gave no answer, so that the cache may stand in for it."""

    def __init__(self, reason: str, *, path: str):
        self.reason = reason
        super().__init__(reason, path=path)


def _location(repo_id: str, revision: str | None, name: str | None = None) -> str:
    place = f"{repo_id}@{revision or 'main'}"
    return place if name is None else f"{place}/{name}"


def _cache_folder(repo_id: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=repo_id, repo_type="model")


def _cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """The folder of a cached commit, by https://huggingface.co/docs/huggingface_hub/guides/manage-cache."""
    folder = _cache_folder(repo_id)
    commit = revision or "main"
    if not _COMMIT.fullmatch(commit):
        ref = folder / "refs" / commit
        commit = ref.read_text().strip() if ref.is_file() else ""
    snapshot = folder / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def _list_files(snapshot: Path) -> dict[str, int | None]:
    files = (path for path in sorted(snapshot.rglob("*")) if path.is_file())
    return {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in files}


def _get_range(url: str, headers: dict[str, str], offset: int, length: int, where: str) -> bytes:
    """Requests a range of bytes, several times if the connection breaks."""
    for wait in _WAITS:
        try:
            return _get_range_once(url, headers, offset, length, where)
        except _http_error() as error:
            response = getattr(error, "response", None)
            if response is not None:  # an error response, which _stream has already retried if it may be
                response.close()  # http_backoff leaves the last one open
                raise
            time.sleep(wait)
    return _get_range_once(url, headers, offset, length, where)


def _get_range_once(url: str, headers: dict[str, str], offset: int, length: int, where: str) -> bytes:
    # Content networks ignore Range when they may compress.
    extra = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
    with _stream(url, headers | extra) as (response, chunks):
        _http().hf_raise_for_status(response)
        skip = 0
        if response.status_code == 200:  # Range was ignored: skip to the bytes, and close after them
            skip = offset
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            message = f"{_endpoint()} sent other bytes than those at {offset}: check HF_ENDPOINT"
            raise HubError(message, path=where)
        body = bytearray()
        deadline = time.monotonic() + _LONGEST + (skip + length) / _SLOWEST
        for chunk in chunks:
            if time.monotonic() > deadline:
                raise HubError(f"{_endpoint()} sends too slowly: try again later", path=where)
            body += chunk[skip:]
            skip = max(0, skip - len(chunk))
            if len(body) >= length:
                break
        return bytes(body[:length])


@contextmanager
def _in_time(nbytes: int, where: str) -> Iterator[None]:
    """Ends an answer of ``nbytes`` bytes that arrives too slowly, though each of its pieces arrives in time."""
    try:
        with at_most(_LONGEST + nbytes / _SLOWEST):
            yield
    except TooLateError:
        raise _UnreachableError(f"{_endpoint()} sends too slowly: try again later", path=where) from None


@contextmanager
def _stream(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """Yields a response and the pieces of its body as they arrive, with huggingface_hub's session and retries."""
    from huggingface_hub import constants

    http = _http()
    options: dict[str, Any] = {
        "headers": headers,
        "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
        "retry_on_status_codes": _TRANSIENT,
        # http_stream_backoff cannot repeat a request whose body it already handed out: _get_range does
        "retry_on_exceptions": (),
    }
    if hasattr(http, "http_stream_backoff"):
        with http.http_stream_backoff("GET", url, **options) as response:
            yield response, response.iter_bytes()
    else:  # before huggingface_hub 1.0, on requests
        with http.http_backoff("GET", url, stream=True, **options) as response:
            yield response, response.iter_content(_CHUNK)


def _http() -> Any:
    """huggingface_hub's HTTP functions, untyped because they differ between its releases."""
    import huggingface_hub.utils

    return huggingface_hub.utils


def _http_error() -> type[Exception]:
    """The base class of the errors of huggingface_hub's HTTP library.

    The library is requests before huggingface_hub 1.0, httpx in 1.x, httpx2 in 2.x.
    """
    from huggingface_hub.errors import HfHubHTTPError

    library: Any = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    base: type[Exception] = getattr(library, "RequestException", library.HTTPError)
    return base


@contextmanager
def _hub_errors(repo_id: str, where: str, *more: type[Exception]) -> Iterator[dict[str, str]]:
    """Yields the headers to send to the Hub; errors of requests in the body become a `HubError`."""
    expected: tuple[type[Exception], ...] = (OSError, *_BROKEN, _http_error(), *more)
    token = ""
    try:
        headers: dict[str, str] = _http().build_hf_headers()
        token = headers.get("authorization", "").removeprefix("Bearer ")
        # HTTP libraries quote a header that they cannot send
        if not (token.isascii() and token.isprintable()):
            raise HubError("the token has characters that no token has: set HF_TOKEN again", path=where)
        yield headers
    except expected as error:
        # from None: the errors underneath may quote headers and signed URLs
        raise _explain(error, repo_id, where, token) from None


def _explain(error: Exception, repo_id: str, where: str, token: str) -> HubError:
    """The error that says what a failed request means to the user, and what to do about it."""
    from huggingface_hub import errors

    # hf_hub_download hides the reason why the Hub did not answer behind "not found in the cache"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    hub, reason = _endpoint(), _reason(error, token)
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    unreachable = False

    if isinstance(error, errors.OfflineModeIsEnabled):
        message, unreachable = "HF_HUB_OFFLINE is set: run once online, or unset HF_HUB_OFFLINE", True
    elif isinstance(error, errors.GatedRepoError):
        message = (
            f"access is gated: accept the conditions at {hub}/{repo_id}, then log in to that account with "
            "`hf auth login` or HF_TOKEN"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        hidden = "hidden from your token" if token else "private"
        message = (
            f"{hub} has no such repository, or it is {hidden}: check the name, or log in with "
            "`hf auth login` or HF_TOKEN"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        message = "the repository has no such branch, tag or commit: check what follows the @"
    elif status == 401:
        message = f"{hub} does not accept your token: log in again with `hf auth login`, or correct HF_TOKEN"
    elif status in _TRANSIENT:
        message, unreachable = f"{hub} answered {status} ({reason}): try again later", True
    elif status is not None:
        message = f"{hub} answered {status}: {reason}"
    elif isinstance(error, json.JSONDecodeError):
        message = f"{hub} does not answer like the Hub: check HF_ENDPOINT and the proxy"
    elif isinstance(error, _BROKEN) and not isinstance(error, _http_error()):
        message = f"{hub} does not answer like the Hub ({reason}): check HF_ENDPOINT and the proxy"
    elif isinstance(error, _http_error()):
        message = f"the connection to {hub} failed ({reason}): check the network, the proxy and HF_ENDPOINT"
        unreachable = True
    elif isinstance(error, RuntimeError):
        message = f"the download failed ({reason}): try again, or with HF_HUB_DISABLE_XET=1 over plain HTTP"
    else:
        message = reason
    return _UnreachableError(message, path=where) if unreachable else HubError(message, path=where)


def _reason(error: BaseException, token: str) -> str:
    """One line on what happened: the Hub's own words, or the error at the root of the chain."""
    text: str
    response = getattr(error, "response", None)
    if response is not None:
        text = getattr(error, "server_message", None) or responses.get(response.status_code, "unknown")
    else:
        # the connection error or timeout underneath; requests carries it as an argument
        while inner := error.__cause__ or next((a for a in error.args if isinstance(a, BaseException)), None):
            error = inner
        text = str(error).strip() or type(error).__name__
    if token:
        text = text.replace(token, "***")
    return text.splitlines()[0][:200]


def _endpoint() -> str:
    """HF_ENDPOINT without a password, for messages."""
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    return url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()
