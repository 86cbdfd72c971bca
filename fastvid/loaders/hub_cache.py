"""Files of hub repositories in huggingface_hub's cache, whose layout this keeps:

    HF_HUB_CACHE/models--org--name/refs/main            the commit of the newest snapshot
                                   snapshots/COMMIT/... links to blobs, or files where links do not work
                                   blobs/DIGEST         SHA-256 of large files, git's SHA-1 of others
                                   fastvid_verified.json  sizes and times of files whose digest was right

A file is hashed when it is downloaded, or when it is first met in the cache. Later only its size and time are compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastvid.errors import CheckpointError
from fastvid.files import read_bytes
from fastvid.loaders.hub_http import CONNECTIONS, HubError, Progress, fetch, run

COMMIT, DIGEST = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
VERIFIED, MAX_RECORD = "fastvid_verified.json", 1 << 22
PIECE = 1 << 20  # bytes
UNKNOWN_SIZE = 1 << 30  # at most, of a file whose size the hub does not tell


@dataclass(frozen=True)
class Remote:
    """A file on the hub. size: bytes, None if the hub does not tell; digest: SHA-256, or git's SHA-1, or ""."""

    name: str
    size: int | None
    digest: str


@dataclass(frozen=True)
class Repository:
    """What the hub tells of a repository. name: org/name."""

    name: str
    commit: str
    files: dict[str, Remote]


def folder_of(repo: str) -> Path:
    """A repository's folder in the cache, whether it is there or not."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str) -> Path | None:
    """The newest snapshot of a repository, complete or not; None if there is none."""
    folder = folder_of(repo)
    try:
        commit = read_bytes(folder / "refs" / "main", 1000).decode().strip()
    except (OSError, ValueError):
        return None
    path = folder / "snapshots" / commit
    return path if COMMIT.fullmatch(commit) and path.is_dir() else None


# ---------------------------------------------------------------- digests


class Digest:
    """The digest of bytes as they come, and whether it is a wanted one. size: of all of them, for git's SHA-1."""

    def __init__(self, wanted: str, size: int) -> None:
        self._wanted = wanted
        git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        # Some mirrors name files by their plain SHA-1.
        short = [git, hashlib.sha1(usedforsecurity=False)]
        self._hashes = short if len(wanted) == 40 else [hashlib.sha256()]

    def update(self, data: bytes) -> None:
        for part in self._hashes:
            part.update(data)

    @property
    def found(self) -> str:
        return self._hashes[0].hexdigest()

    @property
    def right(self) -> bool:
        return not self._wanted or self._wanted in (part.hexdigest() for part in self._hashes)


def matches(path: Path, digest: str, progress: Progress | None = None) -> bool:
    """Whether a file has this digest. Raises OSError."""
    with path.open("rb") as file:
        found = Digest(digest, os.fstat(file.fileno()).st_size)
        while data := file.read(PIECE):
            found.update(data)
            if progress is not None:
                progress.keep_alive()
    return found.right


def _stored_digest(file: Path) -> str:
    """The digest that the cache has for a file: its blob's name. "" if there is none."""
    with contextlib.suppress(OSError):
        target = Path(os.readlink(file)).name
        return target if DIGEST.fullmatch(target) else ""
    return ""


# ---------------------------------------------------------------- what was verified


def damaged(snapshot: Path, names: Iterable[str]) -> list[str]:
    """The files of a snapshot that are not what their digest says. Those that were verified before are compared by size
    and time only."""
    folder = snapshot.parents[1]
    record = _record(folder)
    states = {name: _state(snapshot / name) for name in names}
    doubtful = [name for name, state in states.items() if state and record.get(_key(snapshot / name)) != state]
    doubtful = [name for name in doubtful if _stored_digest(snapshot / name)]
    if not doubtful or not os.access(folder, os.W_OK):  # a shared cache: others look after it
        return []
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        right = pool.map(lambda name: matches(snapshot / name, _stored_digest(snapshot / name)), doubtful)
        verdicts = dict(zip(doubtful, right, strict=True))
    _remember(folder, {_key(snapshot / name): states[name] for name, good in verdicts.items() if good})
    return [name for name, good in verdicts.items() if not good]


def _state(file: Path) -> list[int]:
    with contextlib.suppress(OSError):
        status = file.stat()
        return [status.st_size, status.st_mtime_ns]
    return []


def _key(file: Path) -> str:
    """A file's name in the record."""
    return _stored_digest(file) or "/".join(file.parts[file.parts.index("snapshots") :])


def _record(folder: Path) -> dict[str, list[int]]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        record = json.loads(read_bytes(folder / VERIFIED, MAX_RECORD))
        if isinstance(record, dict):
            return record
    return {}


def _remember(folder: Path, states: dict[str, list[int]]) -> None:
    """Add to the record. Does nothing in a folder that can't be written."""
    kept = {key: state for key, state in _record(folder).items() if not DIGEST.fullmatch(key) or _blob(folder, key)}
    with contextlib.suppress(OSError):
        _write_whole(folder / VERIFIED, json.dumps({**kept, **states}).encode())


def _blob(folder: Path, digest: str) -> bool:
    return (folder / "blobs" / digest).exists()


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.incomplete")
    part.write_bytes(data)
    os.replace(part, path)


# ---------------------------------------------------------------- downloads


def download(repository: Repository, names: Iterable[str], progress_bar: Any) -> Path:
    """Bring files into the cache; returns the snapshot. Files that are there and right are not fetched.

    Raises HubError, OSError, and CheckpointError for a file that is not what the hub tells.
    """
    from filelock import FileLock

    folder = folder_of(repository.name)
    path = folder / "snapshots" / repository.commit
    files = [repository.files[name] for name in names]
    locks = folder.parent / ".locks" / folder.name
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "fastvid.lock"):
        record = _record(folder)
        missing = [file for file in files if not _is_verified(path, file, record)]
        _check_space(folder, repository.name, missing)
        jobs = [partial(_bring, repository, path, file) for file in missing]
        with progress_bar(sum(file.size or 0 for file in missing)) as bar:
            made = run(jobs, lambda received: bar.update(received - bar.n))
        _remember(folder, dict(made))
        _write_whole(folder / "refs" / "main", repository.commit.encode())
    return path


def _is_verified(snapshot: Path, file: Remote, record: dict[str, list[int]]) -> bool:
    state, key = _state(snapshot / file.name), _key(snapshot / file.name)
    return bool(state) and record.get(key) == state and (not DIGEST.fullmatch(key) or file.digest in ("", key))


def _check_space(folder: Path, repo: str, files: list[Remote]) -> None:
    needed = sum(file.size or 0 for file in files)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise CheckpointError(
            f"model={repo!r}: its files take {needed / 2**30:.1f} GiB; in {folder.parent} {free / 2**30:.1f} GiB are "
            "free"
        )


def _bring(repository: Repository, snapshot: Path, file: Remote, progress: Progress) -> tuple[str, list[int]]:
    """Bring one file into the cache, as the job of a thread. Returns its key and state for the record."""
    blobs, place = snapshot.parents[1] / "blobs", snapshot / file.name
    digest = file.digest
    for there in (blobs / digest if digest else place, place):
        if digest and there.is_file() and matches(there, digest, progress):
            if there != place:
                _link(there, place)
            return _key(place), _state(place)
    blobs.mkdir(parents=True, exist_ok=True)
    part = blobs / f"{digest or 'unknown'}.{secrets.token_hex(4)}.incomplete"
    try:
        digest = _fetch(repository, file, part, progress)
        os.replace(part, blobs / digest)
    finally:
        part.unlink(missing_ok=True)
    _link(blobs / digest, place)
    return _key(place), _state(place)


def _fetch(repository: Repository, file: Remote, part: Path, progress: Progress) -> str:
    """Fetch a file; returns its digest. Raises CheckpointError if it is not what the hub tells."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repository.name, file.name, revision=repository.commit)
    found = Digest(file.digest, file.size or 0)
    limit = UNKNOWN_SIZE if file.size is None else file.size
    with part.open("xb") as target:

        def write(data: bytes) -> None:
            target.write(data)
            found.update(data)

        try:
            headers = fetch(url, write, progress, limit, known=file.size is not None)
        except HubError as error:
            raise HubError(f"{file.name}: {error}", error.status, error.code) from None
        written = target.tell()
    told = headers.get("x-repo-commit", repository.commit)
    if told != repository.commit:
        raise _not_as_told(repository, file, f"is of commit {told[:80]!r}, the list of files of {repository.commit}")
    if file.size is not None and written != file.size:
        raise _not_as_told(repository, file, f"came with {written:,} bytes; the hub tells {file.size:,}")
    return _checked_digest(repository, file, found, part, headers)


def _checked_digest(repository: Repository, file: Remote, found: Digest, part: Path, headers: Any) -> str:
    """The digest of a file, after a comparison with the one that the hub tells, in its list or at least in a header."""
    if file.digest:
        if not (found.right if file.size is not None else matches(part, file.digest)):
            raise _not_as_told(repository, file, f"came with digest {found.found}; the hub tells {file.digest}")
        return file.digest
    tag = headers.get("x-linked-etag", headers.get("etag", "")).removeprefix("W/").strip('"').lower()
    if DIGEST.fullmatch(tag):
        if not matches(part, tag):
            raise _not_as_told(repository, file, f"came with other bytes than its ETag {tag} says")
        return tag
    return found.found


def _not_as_told(repository: Repository, file: Remote, why: str) -> CheckpointError:
    return CheckpointError(
        f"model={repository.name!r}: the download of {file.name} is damaged, or not the file that was asked for: it "
        f"{why}. It is not kept; load again to fetch it again"
    )


def _link(blob: Path, place: Path) -> None:
    """Put a blob into a snapshot: by a link, or where there are none by moving it."""
    from huggingface_hub import constants

    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{secrets.token_hex(4)}.incomplete")
    try:
        if getattr(constants, "HF_HUB_DISABLE_SYMLINKS", False):
            raise OSError  # as where links cannot be made
        os.symlink(os.path.relpath(blob, place.parent), part)
        os.replace(part, place)
    except OSError:
        part.unlink(missing_ok=True)
        os.replace(blob, place)
