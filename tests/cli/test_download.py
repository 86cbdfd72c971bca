"""`fastvid download --quantize`: an 8-bit copy of what was downloaded; everything is checked before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastvid
from fastvid.cli.commands import main
from fastvid.loaders import names
from fastvid.loaders.checkpoint import open_checkpoint


def test_a_quantized_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def find_folder(name: str, download: bool = False) -> Path:
        asked.append(name)
        return Path(fastvid.__file__).parent / "embedded"

    monkeypatch.setattr(names, "find_folder", find_folder)
    monkeypatch.chdir(tmp_path)
    words = ["download", "wan2.1-t2v-1.3b", "--quiet"]
    assert main([*words, "--quantize", "int8", "--json", "-o", "wan2.1-t2v-1.3b-int8"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": words[1], "path": "wan2.1-t2v-1.3b-int8"}
    part = open_checkpoint(tmp_path / "wan2.1-t2v-1.3b-int8").check().part("transformer")
    assert {spec.format for spec in part.quantized.values()} == {"int8"} and asked == [words[1]]
    for wrong, message in (
        (
            ["--quantize", "int8", "-o", "wan2.1-t2v-1.3b-int8"],
            "exists already; give a new name by -o",
        ),
        (["-o", "other"], "give --quantize too"),
        (["--quantize", "int7"], "the nearest is int8"),
    ):
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert len(asked) == 1, "nothing is downloaded before the flags are checked"
