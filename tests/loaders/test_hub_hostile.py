"""What a hub may answer: damaged files, other lists, names and headers that are paths, redirects, waits, stalls.

Each is refused with a CheckpointError that names the model, soon, and nothing is written outside of the cache.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub, Response, use
from mutations import TEXTS, damaged, damaged_json, fuzz, peak, refuses, seeds, untouched

from fastvid.cli.commands import main
from fastvid.errors import CheckpointError, FastvidWarning
from fastvid.loaders import hub, hub_cache, hub_http
from fastvid.loaders.names import find_folder

BIG = "vae/diffusion_pytorch_model.safetensors"
INDEX = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}
FILES = {"model_index.json": json.dumps(INDEX).encode(), "vae/config.json": b"{}", BIG: bytes(range(256)) * 4}
# Loading looks into the files that a cached snapshot is complete with; here it is enough that they are there.
TEXT_FILES = ("model_index.json", "vae/config.json")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return use(FakeHub(dict(FILES)), tmp_path / "home" / "hub", monkeypatch)


def downloaded() -> Path:
    return find_folder("org/name", download=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(home: Path) -> list[str]:
    return [str(path) for path in home.rglob("*.incomplete")]


def test_right_files_are_fetched_once(fake: FakeHub) -> None:
    folder = downloaded()
    assert contents(folder) == FILES and folder.name == COMMIT and len(fake.asked) == 4
    assert downloaded() == folder == find_folder("org/name") and len(fake.asked) == 4


def change(name: str, make: Callable[[bytes], bytes], fake: FakeHub) -> Callable[[str, dict[str, str]], Response]:
    """An answer with other bytes of one file, and the right headers."""

    def answer(url: str, headers: dict[str, str]) -> Response:
        response = fake.honest(url, headers)
        if url.endswith(name):
            response = Response(response.status_code, dict(response.headers), make(fake.files[name]))
        return response

    return answer


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "make",
    [
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"<html>",
        lambda data: b"",
    ],
    ids=["flip", "short", "long", "page", "empty"],
)
def test_a_damaged_download_is_told_and_not_kept(
    make: Callable[[bytes], bytes], name: str, fake: FakeHub, tmp_path: Path
) -> None:
    fake.answer = change(name, make, fake)
    with pytest.raises(CheckpointError, match=f"org/name.*{name}"):
        downloaded()
    assert not leftovers(tmp_path) and find_or_none() is None
    fake.answer = fake.honest
    assert contents(downloaded()) == FILES


def find_or_none() -> Path | None:
    return hub.find("org/name")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(name: str, fake: FakeHub) -> None:
    folder = downloaded()
    blob = (folder / name).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=f"damaged in the local cache: {name}; loading the model fetches it"):
        find_folder("org/name")
    fake.asked.clear()
    with pytest.warns(FastvidWarning, match=f"damaged in the local cache: {name}; fetched again"):
        downloaded()
    assert contents(folder) == FILES and len(fake.asked) == 2


def test_a_cached_file_that_fastvid_did_not_fetch_is_hashed_once(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = downloaded()
    (folder.parents[1] / hub_cache.VERIFIED).unlink()
    hashed: list[str] = []
    matches = hub_cache.matches
    monkeypatch.setattr(hub_cache, "matches", lambda path, digest: hashed.append(path.name) or matches(path, digest))
    assert downloaded() == folder and len(hashed) == len(FILES)
    assert downloaded() == folder and len(hashed) == len(FILES)
    os.utime(folder / BIG, (1, 1))
    assert downloaded() == folder and len(hashed) == len(FILES) + 1


def test_a_cut_connection_goes_on_where_it_was(fake: FakeHub) -> None:
    cuts = iter((100, 300, 700))

    def answer(url: str, headers: dict[str, str]) -> Response:
        response = fake.honest(url, headers)
        if url.endswith(BIG) and (cut := next(cuts, None)):
            response.iter_content = lambda size: cut_off(response._data[:cut])
        return response

    def cut_off(data: bytes) -> Any:
        yield data
        raise OSError("cut")

    fake.answer = answer
    assert contents(downloaded()) == FILES


BAD_LISTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "path": lambda told: told["siblings"].append({"rfilename": "vae/../../x.json"}),
    "absolute": lambda told: told["siblings"].append({"rfilename": "/tmp/x.json"}),
    "backslash": lambda told: told["siblings"].append({"rfilename": "vae\\x.json"}),
    "drive": lambda told: told["siblings"].append({"rfilename": "C:x.json"}),
    "dot": lambda told: told["siblings"].append({"rfilename": "vae/./x.json"}),
    "number": lambda told: told.update(siblings=[{"rfilename": 5}]),
    "none": lambda told: told.update(siblings=[{"x": 1}]),
    "no list": lambda told: told.update(siblings=7),
    "text": lambda told: told.update(siblings="model_index.json"),
    "empty": lambda told: told.update(siblings=[]),
    "null": lambda told: told.update(siblings=None),
    "commit": lambda told: told.update(sha="../../x"),
    "no commit": lambda told: told.update(sha=None),
    "size": lambda told: told["siblings"][2]["lfs"].update(size=-1),
    "large": lambda told: told["siblings"][2]["lfs"].update(size=1 << 49),
    "digest": lambda told: told["siblings"][2]["lfs"].update(sha256="../x"),
    "twice": lambda told: told["siblings"].append({"rfilename": "vae", "size": 0}),
    "many": lambda told: told.update(siblings=[{"rfilename": f"tokenizer/{i}"} for i in range(100_000)]),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_a_strange_list_of_files_is_refused(kind: str, fake: FakeHub, tmp_path: Path) -> None:
    told = fake.listing()
    BAD_LISTS[kind](told)
    fake.answer = lambda url, headers: (
        Response(200, {}, json.dumps(told).encode()) if "/api/" in url else fake.honest(url, headers)
    )
    with untouched(tmp_path, tmp_path / "home"):
        if kind == "twice":  # a name that nothing reads
            assert contents(downloaded()) == FILES
        else:
            with pytest.raises(CheckpointError, match="org/name"):
                downloaded()
    assert len(fake.asked) < 10


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b"null", b"[" * 3000, b"{" * 100_000, b'{"sha": 1e999}', bytes(5 << 20)]
)
def test_an_answer_that_is_no_list_is_refused(answer: bytes, fake: FakeHub) -> None:
    fake.answer = lambda url, headers: Response(200, {}, answer)
    with pytest.raises(CheckpointError, match="org/name"):
        downloaded()


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"../../../../STOLEN"'},
        {"X-Linked-Etag": '"../../../../STOLEN"'},
        {"ETag": ""},
        {"Content-Length": "9" * 400},
        {"Content-Range": "bytes 5-"},
    ],
)
def test_other_headers_write_nothing_outside(headers: dict[str, str], fake: FakeHub, tmp_path: Path) -> None:
    fake.answer = lambda url, sent: Response(200, headers, fake.honest(url, sent)._data)
    with untouched(tmp_path, tmp_path / "home"):
        assert contents(downloaded()) == FILES


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (Response(200, {"X-Repo-Commit": "../../../STOLEN"}, FILES[BIG]), "is of commit '../../../STOLEN'"),
        (Response(429, {"Retry-After": "100000"}), "429; it says to try again in 100000 seconds"),
        (Response(429, {"Retry-After": "9" * 5000}), "429"),
        (Response(503, {"Retry-After": "Fri, 31 Dec 2099 23:59:59 GMT"}), "503"),
        (Response(302, {"Location": "file:///etc/passwd"}), "a redirect to file:"),
        (Response(302, {}), "a redirect to "),
        (Response(302, {"Location": "https://other/x"}), "more than 5 redirects|a redirect to https://other/x"),
        (Response(200, {"Content-Encoding": "gzip"}, FILES[BIG]), "compressed"),
        (Response(403, {"X-Error-Code": "GatedRepo"}), "terms to be accepted"),
        (Response(404, {"X-Error-Code": "EntryNotFound"}), "404"),
        (Response(206, {"Content-Range": "bytes 700-"}, FILES[BIG]), "another byte"),
        (Response(999, {}), "999"),
    ],
    ids=lambda value: str(getattr(value, "status_code", "")),
)
def test_strange_answers_are_refused(response: Response, said: str, fake: FakeHub, tmp_path: Path) -> None:
    fake.answer = lambda url, sent: response if url.endswith(BIG) or "other" in url else fake.honest(url, sent)
    with untouched(tmp_path, tmp_path / "home"), pytest.raises(CheckpointError, match=said) as caught:
        downloaded()
    assert "org/name" in str(caught.value) and len(str(caught.value)) < 2000 and not leftovers(tmp_path)


def test_the_login_does_not_follow_a_redirect_to_another_host(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, list[bool]] = {}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def answer(url: str, headers: dict[str, str]) -> Response:
        host = url.split("/")[2]
        sent.setdefault(host, []).append("authorization" in {name.lower() for name in headers})
        if host != "cdn" and url.endswith(BIG):
            return Response(302, {"Location": "https://cdn/data", "X-Repo-Commit": COMMIT})
        return Response(200, {}, FILES[BIG]) if host == "cdn" else fake.honest(url, headers)

    fake.answer = answer
    assert contents(downloaded()) == FILES
    assert sent.pop("cdn") == [False] and all(all(values) for values in sent.values())


@pytest.mark.parametrize("slow", ["list", "file"])
def test_a_slow_drip_ends(slow: str, fake: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub_http, "WINDOW", 0.5)

    def drip(data: bytes) -> Any:
        for at in range(len(data)):
            time.sleep(0.05)
            yield data[at : at + 1]

    def answer(url: str, headers: dict[str, str]) -> Response:
        response = fake.honest(url, headers)
        if url.endswith(BIG) if slow == "file" else "/api/" in url:
            response.iter_content = lambda size: drip(response._data)
        return response

    fake.answer = answer
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"org/name.* bytes in 0 seconds"):
        downloaded()
    assert time.monotonic() - start < 4


def test_a_model_that_does_not_fit_the_disk_is_refused(fake: FakeHub) -> None:
    told = fake.listing()
    told["siblings"][2]["lfs"]["size"] = 1 << 48
    fake.answer = lambda url, sent: Response(200, {}, json.dumps(told).encode())
    with pytest.raises(CheckpointError, match="org/name.*262144.0 GiB; .* are free"):
        downloaded()


def test_a_shared_cache_that_is_read_only_is_read(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = downloaded()
    (folder.parents[1] / hub_cache.VERIFIED).unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(hub_cache, "matches", lambda *args: pytest.fail("hashed"))
    assert downloaded() == folder


def test_files_of_a_repository_that_are_chosen(fake: FakeHub) -> None:
    folder, names = hub.get("org/name", lambda names: [name for name in names if name.endswith(".safetensors")])
    assert names == [BIG] and contents(folder) == {BIG: FILES[BIG]}
    fake.answer = lambda url, sent: Response(503, {})
    assert hub.get("org/name", lambda names: names) == (folder, [BIG])


def test_the_command(fake: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "org/name"]) == 0
    folder = capsys.readouterr().out.strip()
    assert contents(Path(folder)) == FILES
    assert main(["download", "org/name", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "org/name", "path": folder}
    assert main(["download", "nowhere"]) == 2 and "no hub id" in capsys.readouterr().err
    fake.files.clear()
    assert main(["download", "org/other"]) == 1 and "org/other" in capsys.readouterr().err


# ---------------------------------------------------------------- by the thousand


def mutated(fake: FakeHub, random: Random) -> Callable[[str, dict[str, str]], Response]:
    """One answer is another one."""
    kind = random.choice(("list", "list", "list", "body", "header", "status", "redirect"))
    target = "/api/" if kind == "list" else random.choice(("/api/", *FILES))
    listing = damaged_json(fake.listing(), random) if kind == "list" else b""
    name = random.choice(("ETag", "X-Repo-Commit", "X-Linked-Etag", "Content-Length", "Content-Range", "Retry-After"))
    text = random.choice([text for text in TEXTS if text.isprintable()])
    status = random.choice((100, 204, 206, 301, 307, 400, 401, 403, 404, 416, 429, 500, 503, 0, -1))

    def answer(url: str, headers: dict[str, str]) -> Response:
        response = fake.honest(url, headers)
        if target not in url:
            return response
        if kind == "list":
            return Response(200, {}, listing)
        if kind == "body":
            return Response(200, {}, damaged(response._data, random))
        if kind == "header":
            return Response(response.status_code, {**response.headers, name: text}, response._data)
        return Response(status if kind == "status" else 302, {"Location": text}, response._data)

    return answer


@fuzz(10_000)
def test_mutated_answers(count: int, fake: FakeHub, tmp_path: Path) -> None:
    made = 0
    with peak(64), untouched(tmp_path, tmp_path / "home"):
        for random in seeds("hub", count):
            fake.answer = mutated(fake, random)
            if not refuses(downloaded, CheckpointError):
                made += 1
                for path in (tmp_path / "home").rglob("snapshots/*/*"):
                    assert path.resolve().is_relative_to(tmp_path / "home")
            assert not leftovers(tmp_path)
            clear(tmp_path / "home")
    assert 0 < made < count


def clear(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
