"""Where the parts of a model come from that is no folder of its own: single files as ComfyUI keeps them, with the other
parts in neighbouring folders, inside the same file, or named by the caller.

    models/diffusion_models/ (or unet/)   the transformer; the high and the low noise expert of Wan 2.2
    models/text_encoders/ (or clip/)      UMT5, the tokenizer inside as the tensor `spiece_model`
    models/vae/  models/clip_vision/      the VAE, the picture encoder

A part is what its names and shapes say it is (models/variants.py), never what its file is called. Of the files around
a transformer one is taken if it fits by shape: a VAE by its channels, an encoder by its width. Of several that fit, the
one in fp32 is taken, if there is just one; otherwise the caller has to say which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvid.errors import CheckpointError
from fastvid.loaders import original, safetensors
from fastvid.loaders.original import FoundPart
from fastvid.loaders.safetensors import Entry
from fastvid.models.common.tokenizer import TextTokenizer
from fastvid.models.wan import weight_names
from fastvid.models.wan.weight_names import some

INDEX = "model_index.json"
# Folders that hold transformers; the others are beside them.
HOMES = ("diffusion_models", "unet", "transformer", "transformer_2", "checkpoints", *original.EXPERTS.values())
NEAR = {
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip", "text_encoder"),
    "image_encoder": ("clip_vision", "image_encoder"),
}
SPIECE_FILE, SPIECE_TENSOR = "spiece.model", "spiece_model"
TOKENIZERS = ("tokenizer", original.TOKENIZER, "umt5-xxl")
NOISE = re.compile(r"(?<![a-z])(high|low)(?![a-z])|(high|low)(?=[-_ ]?noise)", re.IGNORECASE)
DEPTH = 2  # people sort their files into folders of their own
OTHER = {"high": "low", "low": "high"}


@dataclass(frozen=True)
class Wanted:
    """What a part has to be: its name, and the one number of its configuration that must be the transformer's."""

    name: str
    key: str
    value: Any

    def fits(self, part: FoundPart) -> bool:
        return part.config.get(self.key) == self.value


def wanted_parts(transformer: FoundPart) -> tuple[Wanted, ...]:
    """What a transformer needs beside itself."""
    config = transformer.config
    needs = [Wanted("vae", "z_dim", config["out_channels"]), Wanted("text_encoder", "d_model", config["text_dim"])]
    if config.get("image_dim"):
        needs.append(Wanted("image_encoder", "hidden_size", config["image_dim"]))
    return tuple(needs)


def kind_of(name: str) -> str:
    """What the part of that name is: both experts are transformers."""
    return "transformer" if name in original.EXPERTS else name


# ---------------------------------------------------------------- one part, from where it is known to be


def read_source(name: str, path: Path) -> FoundPart:
    """The part `name` (all but the tokenizer) in a file, in a folder of its own, or in a whole model's folder.

    Raises CheckpointError if it is not there, or is none that is read.
    """
    if not path.exists():
        raise CheckpointError(f"{name}: {path} does not exist")
    if path.is_dir() and not (path / INDEX).is_file() and original.is_original(path):
        found = {part.name: part for part in original.read_original(path).parts}
        if name not in found:
            raise CheckpointError(f"{path} has no {name}; it holds {', '.join(found)}")
        return found[name]
    if path.is_file():
        return read_file(name, _group_of(path))
    return read_file(name, safetensors.find_files(path / name if (path / INDEX).is_file() else path))


def read_file(name: str, files: tuple[Path, ...]) -> FoundPart:
    """The part `name` in files that hold it, alone or beside others. Raises CheckpointError."""
    entries, kind = _headers(files), kind_of(name)
    found = weight_names.find_parts(entries)
    mine = [one for one in found if one.part == kind]
    if found and not mine:
        held = ", ".join(dict.fromkeys(one.part for one in found))
        hint = f"; give the transformer itself, and this as parts={{{held!r}: ...}}" if name == "transformer" else ""
        raise CheckpointError(f"{files[0]} holds no {kind}, it is a {held}{hint}")
    if len(mine) == 1 and len(found) > 1:
        entries = _behind(entries, mine[0].prefix, [one.prefix for one in found])
    return original.read_part(name, files, entries, _config_beside(files[0]))


def held_parts(files: Iterable[Path]) -> tuple[str, ...]:
    """The kinds of parts that files hold."""
    return tuple(dict.fromkeys(found.part for found in weight_names.find_parts(safetensors.read_headers(files))))


def find_tokenizer(path: Path) -> Path:
    """The tokenizer in a folder of its own, in a whole model's folder, or in a file; CheckpointError if it is none."""
    places = [path, *(path / inner for inner in TOKENIZERS)] if path.is_dir() else [path]
    if found := next((place for place in places if _is_tokenizer(place)), None):
        return found
    raise CheckpointError(
        f"tokenizer: {path} holds none; a folder with tokenizer.json and tokenizer_config.json, a {SPIECE_FILE}, or a "
        "text encoder's file with the tensor spiece_model is expected"
    )


def _headers(files: tuple[Path, ...]) -> dict[str, Entry]:
    for file in files:
        if file.suffix in safetensors.PICKLES:
            raise CheckpointError(
                f"{file} is a pickle, which fastvid does not open; turn it into safetensors with `fastvid convert "
                f"{file} {file.with_suffix(safetensors.SUFFIX)} --to original`"
            )
        if not file.name.endswith(safetensors.SUFFIX):
            raise CheckpointError(f"{file} is no {safetensors.SUFFIX} file, the only kind that is read")
    return safetensors.read_headers(files)


def _behind(entries: Mapping[str, Entry], prefix: str, others: Iterable[str]) -> dict[str, Entry]:
    """The tensors behind a prefix, but not those behind a longer one of another part. What a file of several parts
    holds behind none of them belongs to other programs."""
    longer = tuple(other for other in others if other != prefix and other.startswith(prefix))
    inside = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
    return {name: entry for name, entry in inside.items() if not (longer and name.startswith(longer))}


def _config_beside(file: Path) -> dict[str, Any]:
    """config.json in the folder of a file that is named as diffusers and the original repositories name theirs."""
    config = file.parent / original.CONFIG
    if not file.name.startswith(("diffusion_pytorch_model", "model")) or not config.is_file():
        return {}
    return original.to_diffusers_words(safetensors.read_json(config))


def _group_of(file: Path) -> tuple[Path, ...]:
    """The file, with the other shards if it is one of several."""
    return next((group for group in _groups(file.parent) if file in group), (file,))


def _groups(folder: Path) -> Iterator[tuple[Path, ...]]:
    """The files with weights in a folder; shards of one index together."""
    files = sorted(path for path in folder.glob("*") if path.suffix in original.FILES and path.is_file())
    sharded: set[Path] = set()
    for index in sorted(folder.glob(f"*{safetensors.SUFFIX}.index.json")):
        table = safetensors.read_json(index).get("weight_map")
        names = set(table.values()) if isinstance(table, dict) else set()
        group = tuple(file for file in files if file.name in names)
        if group and len(group) == len(names):
            sharded.update(group)
            yield group
    yield from ((file,) for file in files if file not in sharded)


# ---------------------------------------------------------------- the parts around a file


def search(wanted: Wanted, file: Path) -> FoundPart:
    """The part that fits, from the folders around a transformer's file. Raises CheckpointError that says where was
    looked, what is there and what to give, if there is none, or not one alone."""
    places, refused, fitting = _places(wanted.name, file), [], []
    for place in places:
        for group in _groups_below(place, DEPTH if place.name in NEAR[wanted.name] else 0):
            part = _attempt(wanted, group, refused)
            fitting += [part] if part else []
    chosen = fitting if len(fitting) == 1 else [part for part in fitting if _dtypes(part)[:1] == ("F32",)]
    if len(chosen) == 1:
        return chosen[0]
    give = f'give parts={{"{wanted.name}": PATH}}, --part {wanted.name}=PATH'
    if fitting:
        listed = "; ".join(f"{part.files[0]} ({', '.join(_dtypes(part))})" for part in fitting)
        raise CheckpointError(f"{wanted.name}: {len(fitting)} files fit, {listed}; {give}")
    looked = ", ".join(map(str, places)) or f"{file.parent} and folders named {', '.join(NEAR[wanted.name])} beside it"
    there = f"; what is there does not fit: {'; '.join(refused)}" if refused else ""
    raise CheckpointError(
        f"{wanted.name} ({wanted.key} {wanted.value}) is missing: looked in {looked}{there}; {give}, a file or a folder"
    )


def search_tokenizer(text_encoder: FoundPart | None, file: Path) -> Path:
    """The tokenizer inside a text encoder's file, or in the folders around it or around the transformer."""
    files = text_encoder.files if text_encoder else ()
    inside = [one for one in (*files, file) if holds_spiece(safetensors.read_header(one))]
    around = [place for one in (*files[:1], file) for place in (one.parent, _root(one), one.parent.parent)]
    places = [place / inner for place in dict.fromkeys(around) for inner in TOKENIZERS]
    places += [place / SPIECE_FILE for place in dict.fromkeys(around)]
    if found := next((place for place in (*inside, *places) if _is_tokenizer(place)), None):
        return found
    raise CheckpointError(
        "tokenizer is missing: the text encoder's file has no tensor spiece_model, and there is no folder "
        f"{' or '.join(TOKENIZERS)} in {', '.join(map(str, dict.fromkeys(around)))}; "
        'give parts={"tokenizer": PATH}, --part tokenizer=PATH'
    )


def noise_of(file: Path) -> str:
    """ "high" or "low" if the name of a file, or of its folder, says for which expert it is; "" otherwise."""
    for name in (file.name, file.parent.name):
        if found := NOISE.search(name):
            return (found[1] or found[2]).lower()
    return ""


def search_partner(file: Path) -> tuple[Path, ...]:
    """The file of the other expert: the one whose name says high for low, or low for high. Raises CheckpointError."""
    noise = noise_of(file)
    folders = [file.parent]
    if NOISE.search(file.parent.name):
        folders += [path for path in sorted(file.parent.parent.iterdir()) if path.is_dir()]
    wanted = _plain(file).replace(noise, OTHER[noise])
    groups = [group for folder in dict.fromkeys(folders) for group in _groups(folder)]
    fitting = [group for group in groups if any(_plain(one) == wanted for one in group)]
    if len(fitting) == 1:
        return fitting[0]
    listed = f"; {', '.join(str(group[0]) for group in fitting)} could be it" if fitting else ""
    raise CheckpointError(
        f"{file} is the {noise} noise expert of a model with two; the {OTHER[noise]} noise one is not "
        f'in {", ".join(map(str, folders))}{listed}; give parts={{"transformer_2": PATH}}, --part transformer_2=PATH'
    )


def _plain(file: Path) -> str:
    """Folder and name of a file, without what separates words: publishers are not consistent in that."""
    folder = file.parent.name if NOISE.search(file.parent.name) else ""
    return "".join(letter for letter in f"{folder}/{file.name}".lower() if letter.isalnum())


def _root(file: Path) -> Path:
    """The folder that has those of NEAR inside."""
    home = next((path for path in list(file.parents)[:3] if path.name.lower() in HOMES), None)
    return home.parent if home else file.parent


def _places(name: str, file: Path) -> list[Path]:
    root = _root(file)
    near = [root / inner for inner in NEAR[name] if (root / inner).is_dir()]
    return near if root != file.parent else [*near, root]  # a folder with everything side by side


def _groups_below(place: Path, depth: int) -> Iterator[tuple[Path, ...]]:
    """Files with weights in a folder, and in those inside it, so many folders down."""
    yield from _groups(place)
    for inner in sorted(path for path in place.iterdir() if depth and path.is_dir()):
        yield from _groups_below(inner, depth - 1)


def _attempt(wanted: Wanted, files: tuple[Path, ...], refused: list[str]) -> FoundPart | None:
    """The part, if these files are one that fits; what is near but does not fit goes into `refused`."""
    name = files[0].name
    if files[0].suffix in safetensors.PICKLES:
        refused.append(f"{name} is a pickle (see `fastvid convert --help`)")
        return None
    try:
        if wanted.name not in held_parts(files):
            return None
        part = read_file(wanted.name, files)
    except CheckpointError as error:
        refused.append(str(error))
        return None
    if unknown := [kind for kind in _dtypes(part) if kind not in safetensors.FLOATS]:
        refused.append(f"{name} is {some(unknown)} (quantized weights are not supported yet)")
    elif not wanted.fits(part):
        refused.append(f"{name} has {wanted.key} {part.config.get(wanted.key)}")
    else:
        return part
    return None


def _dtypes(part: FoundPart) -> tuple[str, ...]:
    return safetensors.dtypes({k: entry for k, entry in part.entries.items() if not holds_spiece([k])})


def _is_tokenizer(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in ("tokenizer.json", SPIECE_FILE))
    if path.name.endswith(safetensors.SUFFIX):
        return path.is_file() and holds_spiece(safetensors.read_header(path))
    return path.is_file() and path.suffix == ".model"


def holds_spiece(names: Iterable[str]) -> bool:
    """Whether tensors of these names have a sentencepiece model among them."""
    return any(name.split(".")[-1] == SPIECE_TENSOR for name in names)


def read_tokenizer(path: Path) -> TextTokenizer:
    """Read a tokenizer folder, a spiece.model, or a safetensors file that holds one as `spiece_model`.

    A folder with spiece.model alone is read as that file. Raises CheckpointError if it is missing or broken.
    """
    if path.is_dir() and not (path / "tokenizer.json").is_file() and (path / SPIECE_FILE).is_file():
        path = path / SPIECE_FILE
    if not path.is_file():
        return TextTokenizer.from_folder(path)
    return TextTokenizer.from_spiece(_read_spiece(path), str(path))


def _read_spiece(path: Path) -> bytes:
    """The sentencepiece model that a file is, or holds as a tensor of bytes."""
    try:
        if not path.name.endswith(safetensors.SUFFIX):
            return path.read_bytes()
        entries = safetensors.read_header(path)
        found = [entry for name, entry in entries.items() if holds_spiece([name])]
        if len(found) != 1 or found[0].dtype not in ("U8", "I8"):
            raise CheckpointError(f"{path} holds no sentencepiece model as the bytes of a tensor {SPIECE_TENSOR}")
        with path.open("rb") as file:
            file.seek(found[0].offset)
            return file.read(math.prod(found[0].shape))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
