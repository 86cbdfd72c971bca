"""A hub without a network: answers the requests of `fastvid.loaders.hub_http` in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastvid.loaders import hub_http

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Response:
    """As requests has it, of which hub_http reads status_code, headers and iter_content."""

    def __init__(self, status: int, headers: dict[str, str], data: bytes = b"", piece: int = 1 << 16) -> None:
        self.status_code, self.headers = status, {"Content-Length": str(len(data)), **headers}
        self._data, self._piece = data, piece

    def iter_content(self, size: int) -> Iterator[bytes]:
        for at in range(0, len(self._data), self._piece):
            yield self._data[at : at + self._piece]

    def close(self) -> None: ...


class FakeHub:
    """Serves org/name from memory. `answer` may be replaced: url, headers -> Response. asked: all requested URLs."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, list[str]()
        self.answer = self.honest

    def get(self, url: str, headers: dict[str, str], **options: Any) -> Response:
        self.asked.append(url)
        return self.answer(url, headers)

    def honest(self, url: str, headers: dict[str, str]) -> Response:
        if "/api/models/" in url:
            return Response(200, {}, json.dumps(self.listing()).encode())
        name = url.split(f"/resolve/{COMMIT}/")[-1]
        if name not in self.files:
            return Response(404, {"X-Error-Code": "EntryNotFound"})
        start = int(headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        more = {"Content-Range": f"bytes {start}-/*"} if start else {}
        data = self.files[name][start:]
        return Response(
            206 if start else 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{self.digest(name)}"', **more}, data
        )

    def digest(self, name: str) -> str:
        data = self.files[name]
        if name.endswith(".safetensors"):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            large = name.endswith(".safetensors")
            lfs = {"lfs": {"sha256": self.digest(name), "size": len(data), "pointerSize": 134}} if large else {}
            blob = "0" * 40 if large else self.digest(name)
            siblings.append({"rfilename": name, "size": len(data), "blobId": blob, **lfs})
        return {"id": "org/name", "sha": COMMIT, "siblings": siblings}


def use(fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Have huggingface_hub's session and cache be these, and no waiting between attempts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: fake)
    monkeypatch.setattr(hub_http, "_pause", lambda seconds, progress: progress.check())
    return fake
