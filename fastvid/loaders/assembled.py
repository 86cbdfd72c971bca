"""A model put together from files: a transformer's single file with its other parts around it, or a folder of which
some parts are taken from elsewhere. Described as a diffusers folder would be (`original.Whole`).

Each part comes from the first of: where the caller says (`parts=`), the transformer's own file, the caller's `base`
folder, the folders around the file (see sources.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastvid.checks import nearest_name
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import original, sources
from fastvid.loaders.original import FoundPart, Whole
from fastvid.loaders.sources import Wanted

BASE, TOKENIZER = "base", "tokenizer"
NAMES = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder", TOKENIZER, BASE)
# What model_index.json would say of a part that is missing.
CLASSES = {
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "image_encoder": ["transformers", "CLIPVisionModel"],
}
Given = Mapping[str, Path]


def check_parts(parts: Any) -> dict[str, Path]:
    """`parts=` as names -> paths. Raises InvalidRequest for what is none of that."""
    if parts is None:
        return {}
    if not isinstance(parts, Mapping):
        raise InvalidRequest(
            f'parts={parts!r:.60}: names and paths are expected, such as {{"vae": "wan_2.1_vae.safetensors"}}'
        )
    for name, path in parts.items():
        if name not in NAMES:
            near = nearest_name(str(name), NAMES)
            raise InvalidRequest(f"parts: {name!r:.40} is not known; allowed is {', '.join(NAMES)}; nearest: {near}")
        if not isinstance(path, str | Path) or not str(path) or "\0" in str(path):
            raise InvalidRequest(f"parts: {name} is {path!r:.60}; a file or a folder is expected")
    return {name: Path(path).expanduser() for name, path in parts.items()}


def describe_file(file: Path, given: Given) -> Whole:
    """The model whose transformer is in `file`. What can't be found is in `missing`, with the reason.

    Raises CheckpointError for a file that holds no transformer, InvalidRequest for parts that contradict each other.
    """
    missing: dict[str, str] = {}
    parts = _experts(file, given, missing)
    main = parts["transformer"]
    for wanted in sources.wanted_parts(main):
        if part := _attempt(missing, wanted.name, lambda wanted=wanted: _find(wanted, main.files[0], given)):
            parts[wanted.name] = part
    text = parts.get("text_encoder")
    tokenizer = _attempt(missing, TOKENIZER, lambda: _tokenizer(text, main.files[0], given))
    experts = "transformer_2" in parts or "transformer_2" in missing
    index = original.make_index(parts, experts)
    index |= {name: CLASSES[name] for name in missing if name in CLASSES}
    scheduler = original.make_scheduler(main.identity.task or "t2v", experts)
    processor = original.IMAGE_PROCESSOR if "image_encoder" in parts else None
    return Whole(file, tuple(parts.values()), index, scheduler, processor, tokenizer or Path(), missing)


def replace_parts(folder: Path, index: Mapping[str, Any], given: Given) -> Whole:
    """A diffusers folder, with its model_index.json, of which the given parts come from elsewhere."""
    if BASE in given:
        raise InvalidRequest(f"parts: {BASE} is for a model that is a single file; {folder} is a whole folder")
    parts = {name: sources.read_source(name, path) for name, path in given.items() if name != TOKENIZER}
    index = dict(index) | {name: _class_of(part) for name, part in parts.items()}
    if "transformer" in parts:
        index["_class_name"] = original.pipeline_of(parts["transformer"].identity)
    tokenizer = sources.find_tokenizer(given[TOKENIZER]) if TOKENIZER in given else folder / TOKENIZER
    return Whole(folder, tuple(parts.values()), index, None, None, tokenizer)


def _class_of(part: FoundPart) -> list[str]:
    name = "transformer_2" if part.name in original.EXPERTS else part.name
    return [CLASSES[name][0], part.config.get("_class_name", CLASSES[name][1])]


def _experts(file: Path, given: Given, missing: dict[str, str]) -> dict[str, FoundPart]:
    """The transformer, and the one for low noise where there are two."""
    read, noise = sources.read_source, sources.noise_of(file)
    if noise == "low" and "transformer" not in given and "transformer_2" not in given:
        pair = sources.search_partner(file)  # without the first there is nothing to describe
        return {
            "transformer": sources.read_file("transformer", pair),
            "transformer_2": read("transformer_2", file),
        }
    if "transformer" in given:
        if noise != "low" or "transformer_2" in given:
            raise InvalidRequest(f"parts: {file} is the transformer already; take `transformer` out")
        return {"transformer": read("transformer", given["transformer"]), "transformer_2": read("transformer_2", file)}
    other = given.get("transformer_2")
    if other and noise == "low" and sources.noise_of(other) == "high":
        raise InvalidRequest(f"parts: {file} is for low noise by its name, {other} for high: give them the other way")
    parts = {"transformer": read("transformer", file)}
    identity = parts["transformer"].identity
    if other or noise or (identity.family, identity.task) == ("wan2.2", "i2v"):
        low = _attempt(missing, "transformer_2", lambda: _low_noise(file, other, noise))
        parts |= {"transformer_2": low} if low else {}
    return parts


def _low_noise(file: Path, other: Path | None, noise: str) -> FoundPart:
    if other:
        return sources.read_source("transformer_2", other)
    if not noise:
        raise CheckpointError(
            f"{file} is one of the two experts of a Wan 2.2 picture model, and its name does not say which; give the "
            'high noise file as the model and the other as parts={"transformer_2": PATH}, --part transformer_2=PATH'
        )
    return sources.read_file("transformer_2", sources.search_partner(file))


def _find(wanted: Wanted, file: Path, given: Given) -> FoundPart:
    if wanted.name in given:
        return sources.read_source(wanted.name, given[wanted.name])
    if wanted.name in sources.held_parts([file]):
        return sources.read_file(wanted.name, (file,))
    return sources.read_source(wanted.name, given[BASE]) if BASE in given else sources.search(wanted, file)


def _tokenizer(text: FoundPart | None, file: Path, given: Given) -> Path:
    if source := given.get(TOKENIZER, given.get(BASE)):
        return sources.find_tokenizer(source)
    if "text_encoder" in given and given["text_encoder"].is_dir():
        for place in (given["text_encoder"], given["text_encoder"].parent):
            try:
                return sources.find_tokenizer(place)
            except CheckpointError:
                continue
    return sources.search_tokenizer(text, file)


def _attempt(missing: dict[str, str], name: str, find: Callable[[], Any]) -> Any:
    """What is found, or None with the reason noted."""
    try:
        return find()
    except CheckpointError as error:
        missing[name] = str(error)
        return None


def transformer_file(folder: Path) -> Path:
    """The (first) file of an original folder's transformer, that for high noise where there are two."""
    return original.transformer_files(folder)["transformer"][0]
