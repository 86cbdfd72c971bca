"""Hub ids: a download from a hub on this machine, what it fetches, how it goes on, and what is said when it can't."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, serve

from fastvid import hub
from fastvid.errors import CheckpointError
from fastvid.loading import find_folder

EMBEDDED = find_folder("embedded")
LOAD = """
import sys
from fastvid import hub
from fastvid.errors import Error
from fastvid.loading import find_folder, read_checkpoint
before = hub.find(sys.argv[1])
try:
    print(before, read_checkpoint(sys.argv[1], download=True).check().folder)
    assert hub.find(sys.argv[1]) == find_folder(sys.argv[1])
except Error as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The embedded model with what published repositories hold besides."""
    folder = tmp_path / "repository"
    shutil.copytree(EMBEDDED, folder)
    (folder / "assets").mkdir()
    (folder / "assets" / "example.mp4").write_bytes(b"video")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"the same in another type")
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture
def served(repository: Path) -> Iterator[tuple[str, list[str]]]:
    with serve("org/name", repository) as hub_address:
        yield hub_address


def load(address: str, home: Path, model: str = "org/name", **environ: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(home), **environ}
    return subprocess.run([sys.executable, "-c", LOAD, model], env=env, capture_output=True, text=True)


def test_a_hub_id_is_downloaded_once_and_only_what_is_needed(
    served: tuple[str, list[str]], repository: Path, tmp_path: Path
) -> None:
    address, seen = served
    done = load(address, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    before, folder = done.stdout.split()
    assert before == "None" and done.stderr == ""
    names = {str(f.relative_to(folder)) for f in Path(folder).rglob("*") if f.is_file()}
    wanted = {str(f.relative_to(EMBEDDED)) for f in EMBEDDED.rglob("*") if f.is_file()} - {"README.md"}
    assert names == wanted
    seen.clear()
    again = load(address, tmp_path / "home")
    assert again.stdout.split() == [folder, folder]
    assert not [request for request in seen if "org/name" in request]


def test_after_a_cut_only_what_is_not_whole_is_fetched(
    served: tuple[str, list[str]], repository: Path, tmp_path: Path
) -> None:
    address, seen = served
    assert load(address, tmp_path / "home").returncode == 0
    cache = tmp_path / "home" / "hub" / "models--org--name"
    link = cache / "snapshots" / COMMIT / "transformer" / "diffusion_pytorch_model.safetensors"
    blob = link.resolve()
    whole = blob.read_bytes()
    blob.unlink()
    link.unlink()
    (blob.parent / f"{blob.name}.0a1b2c3d.incomplete").write_bytes(whole[:1000])
    seen.clear()
    done = load(address, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "None"
    assert link.read_bytes() == whole
    fetched = [request for request in seen if request.startswith("GET /org")]
    assert [request.split("/")[-2:] for request in fetched] == [["transformer", link.name]]


def test_what_the_hub_does_not_have(served: tuple[str, list[str]], tmp_path: Path) -> None:
    done = load(served[0], tmp_path / "home", "org/nmae")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("CheckpointError: model='org/nmae': the hub has no such model")


@pytest.mark.parametrize("environ", [{"HF_HUB_OFFLINE": "1"}, {}])
def test_offline_it_says_what_to_do(environ: dict[str, str], tmp_path: Path) -> None:
    done = load("http://127.0.0.1:9", tmp_path / "home", **environ)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "`hf download org/name`" in done.stderr and "HF_HOME" in done.stderr


def test_inspecting_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download", lambda model: pytest.fail("downloaded"))
    with pytest.raises(CheckpointError, match="hf download org/surely-not-there"):
        find_folder("org/surely-not-there")


def test_a_snapshot_is_complete_with_all_of_its_shards(tmp_path: Path) -> None:
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "X"], "image_encoder": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert not hub.complete(tmp_path)
    (tmp_path / "vae").mkdir()
    shards = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "vae" / "m.safetensors.index.json").write_text(json.dumps(shards))
    (tmp_path / "vae" / "one.safetensors").touch()
    assert not hub.complete(tmp_path)
    (tmp_path / "vae" / "two.safetensors").touch()
    assert hub.complete(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"vae": ["a", "b"]}'])
def test_a_broken_snapshot_is_not_complete(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    assert not hub.complete(tmp_path)
