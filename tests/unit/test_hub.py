"""Reading repositories of the Hub: what is asked of it, what is downloaded, and what goes wrong."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest
from support.files import tree
from support.hub import Answer, HubServer
from support.llama import write_sources
from support.write import LLAMA, write_tiny

from mixprec_build.checkpoint.manifest import read_manifest
from mixprec_build.cli.app import main
from mixprec_build.errors import HubError, RefusedError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify
from mixprec_build.planning.planner import make_plan
from mixprec_build.storage import hub as hub_module
from mixprec_build.storage.deadline import TooLateError, at_most
from mixprec_build.storage.hub import HubRepo, parse_repo_id

REPO = "org/model"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
TOKEN = "hf_SecretSecretSecret"
SIGNATURE = "X-Amz-Signature"

Patch = pytest.MonkeyPatch


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "extra").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "extra" / "notes.txt").write_text("in a folder")
    (folder / SHARD).write_bytes(bytes(range(256)) * 400)
    (folder / OTHER).write_bytes(b"other" * 1000)
    return folder


class Load(Protocol):
    def __call__(self, **environment: str) -> None: ...


def close_session() -> None:
    """Close huggingface_hub's connections."""
    import huggingface_hub

    if hasattr(huggingface_hub, "close_session"):
        huggingface_hub.close_session()
    else:  # before huggingface_hub 1.0
        huggingface_hub.configure_http_backend()


@pytest.fixture
def load(monkeypatch: Patch) -> Iterator[Load]:
    """Import huggingface_hub anew under an environment, which it reads when it is imported."""

    def drop() -> dict[str, object]:
        names = [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]
        return {name: sys.modules.pop(name) for name in names}

    def fresh(**environment: str) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        close_session()
        drop()

    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    logger = logging.getLogger("huggingface_hub")
    handlers, modules = logger.handlers[:], drop()
    yield fresh
    close_session()
    drop()
    sys.modules.update(modules)  # type: ignore[arg-type]
    logger.handlers[:] = handlers


@pytest.fixture
def hub(load: Load, tmp_path: Path, monkeypatch: Patch) -> Iterator[HubServer]:
    """The stand-in, with huggingface_hub turned to it and to an empty cache."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between retries
    with HubServer() as server:
        load(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"))
        yield server


def refusal(call: Callable[[], object]) -> str:
    """The message of the HubError that a call ends in, checked to hold no secret, nor does its traceback."""
    with pytest.raises(HubError) as caught:
        call()
    shown = "".join(traceback.format_exception(caught.value))
    assert TOKEN not in shown and SIGNATURE not in shown
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Qwen/Qwen3-235B-A22B", ("Qwen/Qwen3-235B-A22B", None)),
        ("org/name@main", ("org/name", "main")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("org/name@v1.0+fp8", ("org/name", "v1.0+fp8")),
        ("_o_/a.b-c_", ("_o_/a.b-c_", None)),
        ("o/" + "n" * 96, ("o/" + "n" * 96, None)),
        ("o/" + "n" * 97, None),
        ("", None),
        ("name", None),
        ("org/name/more", None),
        ("org/", None),
        ("/abs", None),
        ("./name", None),
        ("../name", None),
        ("~/name", None),
        ("org/.name", None),
        ("org/name-", None),
        ("org/a..b", None),
        ("org/a--b", None),
        ("org/name.git", None),
        ("org/näme", None),
        ("org/na me", None),
        ("org/name\n", None),
        ("org/name@", None),
        ("org/name@a/../b", None),
        ("org/name@/main", None),
        ("org/name@main/", None),
        ("org/name@a b", None),
        ("org/name@a@b", None),
    ],
)
def test_parse_repo_id(text: str, parts: tuple[str, str | None] | None) -> None:
    assert parse_repo_id(text) == parts


@pytest.mark.parametrize("revision", [None, "main", "v1", "refs/pr/3", "commit"])
def test_open_resolves_a_revision_and_lists_the_files(
    hub: HubServer, model: Path, tmp_path: Path, revision: str | None
) -> None:
    commit = hub.add(REPO, model, "main", "v1", "refs/pr/3")
    revision = commit if revision == "commit" else revision
    repo = HubRepo.open(REPO, revision)
    assert (repo.repo_id, repo.revision, repo.commit, repo.offline) == (REPO, revision, commit, None)
    assert repo.files == {"config.json": 23, "extra/notes.txt": 11, SHARD: 102400, OTHER: 5000}
    assert len(hub.log()) == 1
    assert not (tmp_path / "home" / "hub").exists()


def test_a_repository_keeps_its_commit_when_the_branch_moves(hub: HubServer, model: Path, tmp_path: Path) -> None:
    commit = hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "config.json").write_text("{}")
    assert hub.add(REPO, newer) != commit
    assert repo.read("config.json", 0, 100) == (model / "config.json").read_bytes()
    assert repo.fetch(["config.json"])["config.json"].read_bytes() == (model / "config.json").read_bytes()


def test_read_asks_for_nothing_but_its_range(hub: HubServer, model: Path) -> None:
    hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    hub.requests.clear()
    assert repo.read(SHARD, 300, 8) == bytes(range(44, 52))
    asked, served = hub.log()
    assert asked.path == f"/{REPO}/resolve/{repo.commit}/{SHARD}"
    assert asked.range == served.range == "bytes=300-307"
    assert (asked.sent, served.sent) == (0, 8)
    assert repo.cached(SHARD) is None


def test_read_ends_where_the_file_ends(hub: HubServer, model: Path) -> None:
    hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    assert repo.read("config.json", 0, 65536) == (model / "config.json").read_bytes()
    assert repo.read(OTHER, 4998, 100) == b"er"
    hub.requests.clear()
    assert repo.read(OTHER, 5000, 8) == repo.read(OTHER, 9999, 8) == repo.read(OTHER, 0, 0) == b""
    assert hub.requests == []


def test_read_prefers_the_cached_copy(hub: HubServer, model: Path) -> None:
    hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    path = repo.fetch([SHARD])[SHARD]
    hub.requests.clear()
    assert repo.read(SHARD, 300, 8) == bytes(range(44, 52))
    assert hub.requests == []
    path.resolve().unlink()
    path.resolve().mkdir()
    assert repo.cached(SHARD) is None  # not a file any more: read from the Hub again
    assert repo.read(SHARD, 300, 8) == bytes(range(44, 52))


def test_an_unreadable_cached_copy(hub: HubServer, model: Path, monkeypatch: Patch) -> None:
    hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    repo.fetch(["config.json"])

    def denied(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    message = refusal(lambda: repo.read("config.json", 0, 8))
    assert message.startswith("org/model@main/config.json: the cached copy cannot be read: [Errno 13]")


def test_fetch_downloads_the_named_files_only(hub: HubServer, model: Path) -> None:
    hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    hub.requests.clear()
    names = [SHARD, "extra/notes.txt", SHARD]
    paths = repo.fetch(name for name in names)
    assert list(paths) == [SHARD, "extra/notes.txt"]
    for name, path in paths.items():
        assert path.read_bytes() == (model / name).read_bytes()
        assert path == repo.cached(name)
        assert path.is_symlink() and path.resolve().parent.name == "blobs"
        assert path.as_posix().endswith(f"/snapshots/{repo.commit}/{name}")
    assert not hub.log("config.json") and not hub.log(OTHER)
    hub.requests.clear()
    assert repo.fetch(names) == paths
    assert hub.requests == []


@pytest.mark.parametrize("revision", [None, "v1", "commit"])
def test_offline_the_cache_serves_what_it_holds(hub: HubServer, model: Path, load: Load, revision: str | None) -> None:
    commit = hub.add(REPO, model, "main", "v1")
    revision = commit if revision == "commit" else revision
    paths = HubRepo.open(REPO, revision).fetch(["extra/notes.txt", SHARD])
    load(HF_HUB_OFFLINE="1")
    hub.requests.clear()
    repo = HubRepo.open(REPO, revision)
    assert repo.commit == commit
    assert repo.files == {"extra/notes.txt": 11, SHARD: 102400}
    assert repo.offline == "HF_HUB_OFFLINE is set: run once online, or unset HF_HUB_OFFLINE"
    assert repo.read(SHARD, 300, 2) == bytes([44, 45])
    assert repo.fetch(paths) == paths
    expected = f"org/model@{revision or 'main'}/{OTHER}: not in the cache, and {repo.offline}"
    assert refusal(lambda: repo.fetch([SHARD, OTHER])) == expected
    assert refusal(lambda: repo.read(OTHER, 0, 8)) == expected
    assert hub.requests == []


def test_offline_and_never_cached(hub: HubServer, model: Path, load: Load) -> None:
    hub.add(REPO, model, "main", "v1")
    HubRepo.open(REPO).fetch(["config.json"])
    load(HF_HUB_OFFLINE="1")
    for repo_id, revision in [("org/unseen", None), (REPO, "v1"), (REPO, "0" * 40)]:
        message = refusal(partial(HubRepo.open, repo_id, revision))
        assert message.startswith(f"{repo_id}@{revision or 'main'}: not in the cache, and HF_HUB_OFFLINE is")


def test_the_cache_stands_in_for_a_hub_out_of_reach(hub: HubServer, model: Path) -> None:
    hub.add(REPO, model)
    online = HubRepo.open(REPO)
    online.fetch(["config.json"])
    hub.answers.append(Answer(502))
    repo = HubRepo.open(REPO)
    assert repo.files == {"config.json": 23}
    assert repo.offline == f"{hub.url} answered 502 (Bad Gateway): try again later"
    close_session()
    hub.stop()
    repo = HubRepo.open(REPO)
    assert repo.commit == online.commit
    assert repo.read("config.json", 0, 1) == b"{"
    message = refusal(lambda: repo.read(SHARD, 0, 8))
    assert message.startswith(f"org/model@main/{SHARD}: not in the cache, and the connection to {hub.url} ")
    message = refusal(lambda: HubRepo.open("org/unseen"))
    assert message.startswith(f"org/unseen@main: not in the cache, and the connection to {hub.url} failed")
    assert "Connection refused" in message and "check the network, the proxy and HF_ENDPOINT" in message
    for call in (lambda: online.read(SHARD, 0, 8), lambda: online.fetch([SHARD])):
        message = refusal(call)
        assert message.startswith(f"org/model@main/{SHARD}: the connection to {hub.url} failed (")
        assert "Connection refused" in message


def test_a_read_only_cache_still_serves(hub: HubServer, model: Path, monkeypatch: Patch) -> None:
    hub.add(REPO, model, "main", "v1")
    HubRepo.open(REPO).fetch(["config.json"])

    def denied(*args: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", denied)
    assert HubRepo.open(REPO, "v1").fetch(["config.json"])["config.json"].is_file()


def test_a_private_repository(hub: HubServer, model: Path, monkeypatch: Patch) -> None:
    hub.add(REPO, model, readers=frozenset({TOKEN}))
    assert refusal(lambda: HubRepo.open(REPO)) == (
        f"org/model@main: {hub.url} has no such repository, or it is private: check the name, or log in with "
        "`hf auth login` or HF_TOKEN"
    )
    hub.tokens.add("hf_other")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "or it is hidden from your token" in refusal(lambda: HubRepo.open(REPO))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repo = HubRepo.open(REPO)
    assert repo.read(SHARD, 0, 2) == b"\0\1"
    assert repo.fetch([OTHER])[OTHER].stat().st_size == 5000
    # the content network saw signed URLs, and never the token
    assert {request.token for request in hub.log(SIGNATURE)} == {None}
    monkeypatch.delenv("HF_TOKEN")
    assert "or it is private" in refusal(lambda: repo.read(SHARD, 0, 2))
    assert "or it is private" in refusal(lambda: repo.fetch([SHARD]))


def test_a_gated_repository(hub: HubServer, model: Path, monkeypatch: Patch) -> None:
    hub.add(REPO, model, readers=frozenset({TOKEN}), gated=True)
    repo = HubRepo.open(REPO)
    expected = (
        f"org/model@main/{SHARD}: access is gated: accept the conditions at {hub.url}/org/model, then log in "
        "to that account with `hf auth login` or HF_TOKEN"
    )
    assert refusal(lambda: repo.read(SHARD, 0, 8)) == expected
    hub.tokens.add("hf_other")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert refusal(lambda: repo.fetch([SHARD])) == expected
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert repo.read(SHARD, 0, 2) == b"\0\1"


def test_tokens_are_not_shown(hub: HubServer, model: Path, load: Load, monkeypatch: Patch) -> None:
    hub.add(REPO, model)
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # of no account
    assert refusal(lambda: HubRepo.open(REPO)) == (
        f"org/model@main: {hub.url} does not accept your token: log in again with `hf auth login`, or correct HF_TOKEN"
    )
    hub.answers.append(Answer(403, headers={"X-Error-Message": f"Bearer {TOKEN} may not"}))
    assert refusal(lambda: HubRepo.open(REPO)).endswith(f"{hub.url} answered 403: Bearer *** may not")
    hub.answers.append(Answer(403, headers={"X-Error-Message": "x" * 190 + TOKEN}))
    assert TOKEN[:5] not in refusal(lambda: HubRepo.open(REPO))
    for damaged in (TOKEN + "\x7f", TOKEN + "…"):
        monkeypatch.setenv("HF_TOKEN", damaged)
        assert refusal(lambda: HubRepo.open(REPO)) == (
            "org/model@main: the token has characters that no token has: set HF_TOKEN again"
        )
    monkeypatch.delenv("HF_TOKEN")
    load(HF_ENDPOINT=hub.url.replace("127.0.0.1", f"me:{TOKEN}@127.0.0.1"))
    hub.answers.append(Answer(404))
    assert refusal(lambda: HubRepo.open(REPO)) == f"org/model@main: {hub.url} answered 404: Not Found"


def test_what_does_not_exist(hub: HubServer, model: Path) -> None:
    commit = hub.add(REPO, model)
    assert "org/nowhere@main: " in refusal(lambda: HubRepo.open("org/nowhere"))
    assert refusal(lambda: HubRepo.open(REPO, "v9")) == (
        "org/model@v9: the repository has no such branch, tag or commit: check what follows the @"
    )
    repo = HubRepo.open(REPO)
    hub.requests.clear()
    for name in ("nothing.json", "../../../model/config.json", "/etc/passwd"):
        expected = f"org/model@main/{name}: no such file in the repository at commit {commit}"
        assert refusal(partial(repo.read, name, 0, 8)) == expected
        assert refusal(partial(repo.fetch, [SHARD, name])) == expected
        assert repo.cached(name) is None
    assert hub.requests == []


def test_what_cannot_exist_is_not_asked_for(hub: HubServer) -> None:
    for repo_id, revision in [
        ("./model", None),
        (REPO + "@v1", None),
        (REPO, ""),
        (REPO, "../../x"),
        (REPO, "@"),
    ]:
        assert "is not a repository of the Hub" in refusal(partial(HubRepo.open, repo_id, revision))
    assert hub.requests == []


def test_a_server_that_ignores_range_is_not_read_to_the_end(hub: HubServer, model: Path) -> None:
    big = 64 << 20
    with (model / SHARD).open("r+b") as file:
        file.truncate(big)
    hub.add(REPO, model)
    hub.ignore_range = True
    repo = HubRepo.open(REPO)
    assert repo.read(SHARD, 300, 8) == bytes(range(44, 52))
    assert repo.read(SHARD, 102392, 16) == bytes(range(248, 256)) + bytes(8)
    for served in hub.log(SIGNATURE):
        assert served.sent < big // 2


def test_a_body_cut_short_is_asked_for_again(hub: HubServer, model: Path) -> None:
    hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    hub.cuts = [100, 0, 900]
    assert repo.read(SHARD, 0, 1024) == bytes(range(256)) * 4
    hub.cuts = [100] * 10
    message = refusal(lambda: repo.read(SHARD, 0, 1024))
    assert message.startswith(f"org/model@main/{SHARD}: the connection to {hub.url} failed (")
    assert "100 bytes" in message
    assert len(hub.cuts) == 6


def test_too_few_and_other_bytes_are_errors(hub: HubServer, model: Path) -> None:
    hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    hub.answers.append(Answer(206, b"{}", {"Content-Range": "bytes 0-1/23"}))
    assert refusal(lambda: repo.read("config.json", 0, 64)) == (
        f"org/model@main/config.json: {hub.url} sent 2 of the 23 bytes at 0: try again later"
    )
    for headers in ({"Content-Range": "bytes 0-7/23"}, {}):
        hub.answers.append(Answer(206, b"01234567", headers))
        assert refusal(lambda: repo.read("config.json", 8, 8)) == (
            f"org/model@main/config.json: {hub.url} sent other bytes than those at 8: check HF_ENDPOINT"
        )


def test_a_failing_server_is_asked_again(hub: HubServer, model: Path) -> None:
    hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    hub.answers = [Answer(503), Answer(500), Answer(429)]
    assert repo.read("config.json", 0, 1) == b"{"
    hub.answers = [Answer(503)] * 50
    message = refusal(lambda: repo.read("config.json", 0, 1))
    assert message == (f"org/model@main/config.json: {hub.url} answered 503 (Service Unavailable): try again later")
    assert len(hub.answers) >= 40
    assert "answered 503 (Service Unavailable): try again later" in refusal(lambda: repo.fetch([SHARD]))


def test_a_server_that_says_nothing(hub: HubServer, model: Path, monkeypatch: Patch) -> None:
    hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    hub.silent = True
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    for call in (lambda: HubRepo.open(REPO), lambda: repo.read(SHARD, 0, 8)):
        message = refusal(call)
        assert f"the connection to {hub.url} failed (" in message and "timed out" in message


def test_something_that_is_not_the_hub(hub: HubServer) -> None:
    hub.answers.append(Answer(200, b"<html>log in to this network</html>", {"Content-Type": "text/html"}))
    assert refusal(lambda: HubRepo.open(REPO)) == (
        f"org/model@main: {hub.url} does not answer like the Hub: check HF_ENDPOINT and the proxy"
    )
    hub.answers.append(Answer(200, b'{"id": "org/model"}', {"Content-Type": "application/json"}))
    assert "lists no files and no commit: check HF_ENDPOINT" in refusal(lambda: HubRepo.open(REPO))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CAS service error"), "the download failed (CAS service error): try again, or with "),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (OSError("Consistency check failed:\nfile should be"), "Consistency check failed:"),
    ],
)
def test_a_failing_download(hub: HubServer, model: Path, monkeypatch: Patch, error: Exception, expected: str) -> None:
    hub.add(REPO, model)
    repo = HubRepo.open(REPO)

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    assert refusal(lambda: repo.fetch([SHARD])).startswith(f"org/model@main/{SHARD}: {expected}")


def test_unknown_errors_are_not_dressed_up(hub: HubServer, model: Path, monkeypatch: Patch) -> None:
    hub.add(REPO, model)
    repo = HubRepo.open(REPO)

    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ZeroDivisionError):
        repo.fetch([SHARD])


def test_huggingface_hub_is_not_imported_for_nothing() -> None:
    script = """
import sys
from mixprec_build.storage.hub import parse_repo_id
assert parse_repo_id("org/model@v1") == ("org/model", "v1")
assert "huggingface_hub" not in sys.modules
"""
    root = Path(hub_module.__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


def test_a_build_downloads_only_what_its_plan_needs(
    hub: HubServer, tmp_path: Path, load: Load, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Planning reads headers; building fetches the shards that hold a wanted tensor; then no hub is needed.

    The token that it needs is neither printed nor kept, nor are signed addresses.
    """
    for name, folder in write_sources(tmp_path, shards=4).items():
        hub.add(f"org/{name}", folder, readers=frozenset({TOKEN}))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    load()
    recipe = tmp_path / "hub.yaml"
    recipe.write_text(
        "model: org/bf16\nsources: {bf16: org/bf16, fp8: org/fp8@main}\nweights: {model.layers.0.self_attn.*: fp8}\n"
    )
    planned = plan_recipe(recipe)
    assert all(request.range for request in hub.log(".safetensors")), "headers by range requests"
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    run_plan(planned, tmp_path / "out")
    wanted = {(t.source, t.info.file) for shard in planned.shards for t in shard.tensors}
    cached = {p.parents[2].name.removeprefix("models--org--"): set() for p in (tmp_path / "home").rglob("config.json")}
    for path in (tmp_path / "home").rglob("*.safetensors"):
        cached[path.parents[2].name.removeprefix("models--org--")].add(path.name)
    assert {(source, file) for source, files in cached.items() for file in files} == wanted
    assert len(cached["fp8"]) < 4, "the recipe needs one layer's attention"
    assert not verify(tmp_path / "out").differences
    card = (tmp_path / "out" / "README.md").read_text()
    commit = planned.sources.by_name["fp8"].checkpoint.commit
    assert "\nbase_model: org/bf16\nbase_model_relation: quantized\n" in card and f"  fp8: org/fp8@{commit}\n" in card
    assert str(tmp_path) not in card and "# The source" in card
    assert {request.token for request in hub.log(".safetensors")} >= {TOKEN}, "it was needed"
    shown = "".join(capfd.readouterr())
    assert not any(secret in shown for secret in (TOKEN, SIGNATURE))
    kept = [data for folder in ("out", "home") for data in tree(tmp_path / folder).values()]
    assert not any(secret.encode() in data for secret in (TOKEN, SIGNATURE) for data in kept)

    load(HF_HUB_OFFLINE="1")
    hub.requests.clear()
    again = plan_recipe(recipe)
    assert sum("is read from the cache" in note for note in again.notes) == 2
    run_plan(again, tmp_path / "again")
    first, second = tree(tmp_path / "out"), tree(tmp_path / "again")
    # Only the account of what was left out is shorter: nothing is known of the shards that were never fetched.
    assert first.pop("mixprec_manifest.json") != second.pop("mixprec_manifest.json")
    assert first == second
    assert hub.requests == []
    recipe.write_text(recipe.read_text().replace("layers.0.self_attn.*", "layers.1.mlp.*"))
    with pytest.raises(RefusedError, match=r"`fp8` is read from the cache, which lacks .*safetensors"):
        plan_recipe(recipe)


def test_norms_are_looked_at_whatever_shard_they_are_in(
    hub: HubServer, tmp_path: Path, load: Load, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scales are folded into norms, which lie in other shards than what they feed: in none that a build fetches."""
    load()
    folders = {"bf16": write_tiny(tmp_path / "bf16", LLAMA, "bf16")}
    folders["awq"] = write_tiny(tmp_path / "awq", LLAMA, "awq_int4", fold=0.7, shards=4)
    folders["other"] = write_tiny(tmp_path / "other", replace(LLAMA, seed=3), "fp8_block", shards=8)
    for name, folder in folders.items():
        hub.add(f"org/{name}", folder)

    def recipe(name: str, home: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        lines = [f"model: {home}bf16", "sources:", f"  bf16: {home}bf16", f"  {name}: {home}{name}"]
        path.write_text("\n".join([*lines, f"weights: {{model.layers.0.self_attn.*: {name}}}"]))
        return path

    norm = "model.layers.0.input_layernorm"
    (note,) = plan_recipe(recipe("awq", "org/")).notes
    assert note.startswith(f"{norm}: from `awq`")
    run_plan(plan_recipe(recipe("awq", "org/")), tmp_path / "out")
    run_plan(plan_recipe(recipe("awq", f"{tmp_path}/")), tmp_path / "due")
    ours, due = (read_manifest(tmp_path / name).modules for name in ("out", "due"))
    assert ours == due and {t.source for t in due[norm].tensors.values()} == {"awq"}
    with pytest.raises(RefusedError, match="hold different values, so they do not hold the same weights"):
        plan_recipe(recipe("other", "org/"))

    # Without the hub and without the norm nothing is taken for granted.
    (shard,) = {t.info.file for t in plan_recipe(recipe("awq", f"{tmp_path}/")).modules[norm].tensors.values()}
    for path in (tmp_path / "home").rglob(shard):
        if "models--org--awq" in str(path):
            path.unlink()
    load(HF_HUB_OFFLINE="1")
    with pytest.raises(RefusedError, match=rf"`awq` is read from the cache, which lacks {shard}: scales may be folded"):
        plan_recipe(recipe("awq", "org/"))


def test_what_is_seen_only_once_files_are_fetched(
    hub: HubServer, tmp_path: Path, load: Load, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the user allows holds for that, too, and what is printed is what was written."""
    load()
    hub.add("org/bf16", write_tiny(tmp_path / "bf16", LLAMA, "bf16"))

    def odd_zeros(tensors: Any, _: object) -> None:
        tensors["model.layers.0.self_attn.q_proj.qzeros"][0, 0] += 1

    hub.add("org/gptq", write_tiny(tmp_path / "gptq", LLAMA, "gptq_int4", edit=odd_zeros))
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(
        "model: org/bf16\nsources: {bf16: org/bf16, gptq: org/gptq}\nweights: {model.layers.0.self_attn.*: gptq}\n"
    )
    command = ["mixprec", "build", str(recipe), "-o", str(tmp_path / "out"), "--json", "--allow", "unservable"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    (problem,) = json.loads(capsys.readouterr().out)["unservable"]
    assert "zero point" in problem and read_manifest(tmp_path / "out").unservable == [problem]


BROKEN = {
    "bytes": b"\xff\xfe{{{",
    "deep": b"[" * 100_000,
    "list": b"[1]",
    "number": b"7",
    "files that are text": json.dumps({"id": REPO, "sha": "a" * 40, "siblings": "x"}).encode(),
    "files without names": json.dumps({"id": REPO, "sha": "a" * 40, "siblings": [{}]}).encode(),
    "names that are lists": json.dumps({"id": REPO, "sha": "a" * 40, "siblings": [{"rfilename": [1]}]}).encode(),
    "no bytes": json.dumps({"id": REPO, "sha": "a" * 40, "siblings": [{"rfilename": "x", "size": -5}]}).encode(),
    "a path as commit": json.dumps({"id": REPO, "sha": "../../x", "siblings": []}).encode(),
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_an_error_of_the_hub(hub: HubServer, body: bytes) -> None:
    hub.answers = [Answer(200, body, {"Content-Type": "application/json"})] * 3
    with pytest.raises(HubError, match=f"{REPO}@main"):
        HubRepo.open(REPO)


def test_an_answer_that_never_ends(hub: HubServer, model: Path, monkeypatch: Patch) -> None:
    import mixprec_build.storage.hub as module

    hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    monkeypatch.setattr(module, "_LONGEST", -100.0)
    with pytest.raises(HubError, match="sends too slowly: try again later"):
        repo.read(SHARD, 0, 10)


def test_answers_that_drip(hub: HubServer, model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """Each byte comes in time: a listing, a header and a download end all the same, and leave nothing half."""
    import mixprec_build.storage.hub as module

    hub.add(REPO, model)
    repo = HubRepo.open(REPO)
    hub.drip = 0.02
    monkeypatch.setattr(module, "_LONGEST", 0.3)
    monkeypatch.setattr(module, "_SLOWEST", 1e9)
    size = repo.files[SHARD]
    assert size is not None and size * hub.drip > 10
    with pytest.raises(HubError, match="sends too slowly: try again later"):
        HubRepo.open(REPO)
    with pytest.raises(HubError, match="sends too slowly: try again later"):
        repo.read(SHARD, 0, size)
    with pytest.raises(HubError, match=f"{SHARD}: .*sends too slowly: try again later"):
        repo.fetch([SHARD])
    assert repo.cached(SHARD) is None and not [*(tmp_path / "home").rglob("*incomplete*")]
    hub.drip = 0
    monkeypatch.setattr(module, "_LONGEST", 60.0)
    assert repo.fetch([SHARD])[SHARD].read_bytes() == (model / SHARD).read_bytes()


def test_what_ends_in_time_is_not_interrupted_later() -> None:
    """Also where it ends just when its time is over."""
    late = 0
    for _ in range(300):
        began = time.monotonic()
        try:
            with at_most(0.001):
                while time.monotonic() < began + 0.001:
                    pass
        except TooLateError:
            late += 1
    time.sleep(0.05)  # nothing comes up here
    assert late < 300
    with suppress(TooLateError), at_most(0.01):
        while True:
            pass


def test_all_weights_are_compared_once_they_are_here(
    hub: HubServer, tmp_path: Path, load: Load, monkeypatch: Patch
) -> None:
    """``--check full`` of a build that downloads: values are at hand only then."""
    for name, folder in write_sources(tmp_path).items():
        hub.add(f"org/{name}", folder)
    load()
    recipe = tmp_path / "hub.yaml"
    recipe.write_text("model: org/bf16\nsources: {bf16: org/bf16, fp8: org/fp8}\nweights: {'*.mlp.*': fp8}\n")
    planned, full = plan_recipe(recipe, check_all=True), []
    monkeypatch.setattr(
        "mixprec_build.output.build.make_plan",
        lambda *given, check_all, **options: (
            full.append(check_all) or make_plan(*given, check_all=check_all, **options)
        ),
    )
    run_plan(planned, tmp_path / "out", check_all=True)
    assert full == [True]
