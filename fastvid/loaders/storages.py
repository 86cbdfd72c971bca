"""Checks a file of torch.save before torch reads it: that each storage has as many bytes as the pickle says.

torch memory-maps such a file and takes a storage's bytes from where its record begins, without a look at where it ends.

    archive/data.pkl    the pickle; a storage in it is ("storage", its class, its key, device, number of values)
    archive/data/KEY    the bytes of a storage
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from typing import Any, BinaryIO

from fastvid.files import open_regular

MAX_PICKLE = 1 << 24  # bytes; of a model's pickle, without the storages, under 1 MB
MAX_RECORDS = 1 << 17
# Bytes of a value. The class of an untyped storage counts bytes.
SIZES = {
    **{"DoubleStorage": 8, "LongStorage": 8, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16, "FloatStorage": 4},
    **{"IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1},
    **{"BoolStorage": 1, "UntypedStorage": 1, "QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4},
}


def check_storages(path: str) -> None:
    """Raise ValueError if a record of a file is shorter than its storage, compressed, named twice, or missing.

    Nothing in the pickle is run: all classes and functions that it names are replaced.
    """
    with open_regular(path) as opened, zipfile.ZipFile(opened) as file:
        records = sorted(file.infolist(), key=lambda record: record.header_offset)
        by_name = {record.filename: record for record in records}
        if len(by_name) < len(records) or len(records) > MAX_RECORDS:
            raise ValueError(f"has {len(records)} records, of which {len(by_name)} have names of their own")
        root = next((name[: -len("data.pkl")] for name in by_name if name.endswith("data.pkl")), None)
        if root is None or by_name[f"{root}data.pkl"].file_size > MAX_PICKLE:
            raise ValueError("has no data.pkl, or one that is too large")
        storages = _storages_of(file.read(f"{root}data.pkl"))
        ends = [record.header_offset for record in records[1:]] + [file.start_dir]
        held = {
            record.filename: min(record.file_size, end - _start(record, opened))
            for record, end in zip(records, ends, strict=True)
            if record.compress_type == zipfile.ZIP_STORED
        }
    for key, size in storages.items():
        if held.get(f"{root}data/{key}", -1) < size:
            raise ValueError(f"says that storage {key[:40]} has {size} bytes, which it does not hold as they are")


def _start(record: zipfile.ZipInfo, file: BinaryIO) -> int:
    """Where the bytes of a record begin: behind its header, its name, and a padding."""
    file.seek(record.header_offset)
    header = file.read(30)
    return record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def _storages_of(data: bytes) -> dict[str, int]:
    """Key -> bytes of each storage that a pickle names, at the most where it names it several times."""
    reader = _Reader(io.BytesIO(data))
    reader.load()
    return reader.storages


class _Reader(pickle._Unpickler):
    """Unpickles nothing but containers: what a pickle would call or make is an _Inert.

    The one in Python: that in C takes as much memory for its notes as the pickle asks for.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Inert,), {})

    def persistent_load(self, identity: Any) -> Any:
        kind, of, key, _, count = identity
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError("names a storage in another way than torch does")
        name = getattr(of, "__name__", "")
        if name not in SIZES:
            raise ValueError(f"has a storage of kind {name[:40]!r}, which is not known")
        self.storages[key] = max(self.storages.get(key, 0), count * SIZES[name])
        return _Inert()


class _Inert:
    """Takes whatever a pickle does to an object, and does nothing."""

    def __new__(cls, *args: Any, **options: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __call__(self, *args: Any, **options: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...
