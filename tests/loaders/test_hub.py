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

from fastvid.errors import CheckpointError
from fastvid.loaders import hub
from fastvid.loaders.convert import convert
from fastvid.loaders.names import find_folder
from fastvid.models.wan.published import PLACES
from fastvid.models.wan.variants import PUBLISHED

EMBEDDED = find_folder("embedded")
LOAD = """
import sys
from fastvid.loaders import hub
from fastvid.errors import Error
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.loaders.names import find_folder
before = hub.find(sys.argv[1])
try:
    print(before, open_checkpoint(sys.argv[1], download=True).check().folder)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_every_published_model_has_a_place() -> None:
    assert set(PUBLISHED) == set(PLACES)
    assert all(hub.is_hub_name(place.hub) and place.licence for place in PLACES.values())
    assert all(hub.is_hub_name(place.base) for place in PLACES.values() if place.checkpoint)


def test_a_published_name_is_its_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(hub, "find", lambda model, repair=False: asked.append(model) or tmp_path)
    assert find_folder("Wan2.1-T2V-1.3B") == tmp_path and asked == ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    with pytest.raises(CheckpointError, match="training checkpoint.*fastvid convert CausVid/.*--base"):
        find_folder("causvid-1.3b")
    folder = "Wan2.2-Fun-A14B-InP"
    with pytest.raises(
        CheckpointError, match=rf"`hf download alibaba-pai/{folder} .*`fastvid convert {folder} .*-Diff"
    ):
        find_folder("wan2.2-fun-inp-a14b")
    with pytest.raises(CheckpointError, match="did you mean 'wan2.1-t2v-1.3b'"):
        find_folder("wan2.1-t2v-1.3")
    (tmp_path / "wan2.1-t2v-14b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_folder("wan2.1-t2v-14b") == Path("wan2.1-t2v-14b"), "a folder of that name comes first"


@pytest.mark.parametrize("environ", [{"HF_HUB_OFFLINE": "1"}, pytest.param({}, marks=pytest.mark.slow)])
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


# ---------------------------------------------------------------- repositories that are not in diffusers' layout


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The embedded model as an original repository with safetensors encoders, and with what else those hold."""
    folder = tmp_path / "original"
    convert(EMBEDDED, folder, "original")
    (folder / "assets").mkdir()
    (folder / "assets" / "logo.png").write_bytes(b"picture")
    (folder / "README.md").write_text("read me")
    (folder / "Wan2.1_VAE.pth").write_bytes(b"the same as a pickle")
    return folder


def fetched(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_an_original_repository(original: Path, tmp_path: Path) -> None:
    with serve("org/name", original) as (address, seen):
        done = load(address, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        folder = Path(done.stdout.split()[1])
        left = {"assets/logo.png", "README.md", "Wan2.1_VAE.pth"}
        assert fetched(folder) == fetched(original) - left
        seen.clear()
        assert load(address, tmp_path / "home").stdout.split() == [str(folder), str(folder)]
        assert not [request for request in seen if "org/name" in request]
        (folder / "models_t5_umt5-xxl-enc-bf16.safetensors").unlink()
        again = load(address, tmp_path / "home")
        assert again.stdout.split()[0] == "None" and fetched(folder) == fetched(original) - left


@pytest.mark.slow
def test_an_original_repository_with_pickles(original: Path, tmp_path: Path) -> None:
    (original / "Wan2.1_VAE.safetensors").unlink()
    with serve("org/name", original) as (address, seen):
        done = load(address, tmp_path / "home")
        assert done.returncode == 1 and not [request for request in seen if "/resolve/" in request], (
            "nothing is fetched"
        )
    for told in ("pickles (Wan2.1_VAE.pth)", "org/name-Diffusers", "`hf download org/name --local-dir FOLDER`"):
        assert told in done.stderr
    assert "`fastvid convert FOLDER NEW-FOLDER`" in done.stderr


@pytest.mark.slow
def test_one_file_of_a_repository(tmp_path: Path) -> None:
    """As ComfyUI's: only the file is fetched; the others are named, or fetched before."""
    folder, inner = tmp_path / "files", "split_files/diffusion_models/wan_high.safetensors"
    for part, place in {"transformer": inner, "vae": "split_files/vae/v.safetensors"}.items():
        (folder / place).parent.mkdir(parents=True)
        shutil.copy(EMBEDDED / part / "diffusion_pytorch_model.safetensors", folder / place)
    shutil.copytree(EMBEDDED / "text_encoder", folder / "split_files" / "text_encoders")
    with serve("org/name", folder) as (address, seen):
        done = load(address, tmp_path / "home", "org/name")
        assert done.returncode == 1 and f"give one of its files, such as org/name/{inner}" in done.stderr
        done = load(address, tmp_path / "home", "org/name/split_files/nowhere.safetensors")
        assert f"no such file; it has {inner}" in done.stderr
        done = load(address, tmp_path / "home", f"org/name/{inner}")
        assert done.returncode == 1 and "low noise one is not in" in done.stderr and "vae (z_dim 16)" in done.stderr
        snapshot = tmp_path / "home" / "hub" / "models--org--name" / "snapshots" / COMMIT
        assert fetched(snapshot) == {inner}
        seen.clear()
        code = LOAD.replace("open_checkpoint(sys.argv[1], download=True)", "open_checkpoint(*eval(sys.argv[2]), True)")
        parts = {
            "vae": "org/name/split_files/vae/v.safetensors",
            "base": "embedded",
            "transformer_2": f"org/name/{inner}",
        }
        env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        words = [sys.executable, "-c", code, f"org/name/{inner}", repr((f"org/name/{inner}", parts))]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert fetched(snapshot) == {inner, "split_files/vae/v.safetensors"}
        assert done.stdout.split() == [str(snapshot / inner)] * 2, "it was in the cache"


NAMES = [
    "config.json",
    "Wan2.1_VAE.safetensors",
    "models_t5_umt5-xxl-enc-bf16.safetensors",
    "google/umt5-xxl/spiece.model",
]


def test_what_is_selected() -> None:
    big = ["high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", "high_noise_model/config.json"]
    index = ["low_noise_model/diffusion_pytorch_model.safetensors.index.json"]
    others = ["a.png", "nested/Wan2.1_VAE.safetensors", "xlm-roberta-large/tokenizer.json", "models_clip_x.pth.txt"]
    assert hub.select("a/b", NAMES + big + index + others) == sorted(NAMES + big + index)
    with pytest.raises(CheckpointError, match="without VAE and text encoder; .*--part base=FOLDER"):
        hub.select("a/b", ["diffusion_pytorch_model.safetensors", "config.json"])
    with pytest.raises(CheckpointError, match="it has no weights"):
        hub.select("a/b", ["README.md"])


def test_shards_belong_together(tmp_path: Path) -> None:
    names = [f"x/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    rest = ["x/diffusion_pytorch_model.safetensors.index.json", "x/config.json"]
    chosen = hub._with_shards(f"a/b/{names[0]}", names[0], [*names, *rest, "x/other.safetensors", "config.json"])
    assert chosen == sorted([*names, *rest])
    (tmp_path / "x").mkdir()
    (tmp_path / names[0]).touch()
    assert not hub._has_file(tmp_path, names[0])
    (tmp_path / names[1]).touch()
    assert hub._has_file(tmp_path, names[0])


def test_a_local_file_that_is_missing_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(hub, "find", lambda model: pytest.fail("looked for"))
    assert find_folder("models/vae/x.safetensors") == Path("models/vae/x.safetensors")
