"""The doctor looks at this machine, survives what is broken, and shows what every operation runs on."""

from __future__ import annotations

import json

import pytest

from fastvid import env
from fastvid.cli import doctor
from fastvid.ops.dispatch import implementations


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in env.all_set():
        monkeypatch.delenv(name)
    return monkeypatch


def test_report_is_whole_and_can_be_written_as_json(clean: pytest.MonkeyPatch) -> None:
    report = doctor.doctor("cpu")
    assert json.loads(json.dumps(report)) == report
    assert not [name for name, facts in report.items() if "error" in facts]
    assert report["host"]["cores"] >= 1 and report["host"]["memory_gib"] > 0
    assert report["packages"]["torch"] and report["python"]["version"]


def test_report_names_the_back_end_of_every_operation(clean: pytest.MonkeyPatch) -> None:
    ops = doctor.doctor("cpu")["ops"]
    assert ops.pop("device") == "cpu"
    assert ops.pop("dtype_auto").startswith(("bfloat16 (products", "float32 (no products"))
    assert set(ops) == set(implementations())
    assert ops["to_rgb"] == {"backend": "reference", "reason": "cpu"}


def test_report_follows_the_environment(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("FASTVID_ATTENTION", "reference")
    clean.setenv("FASTVID_BAKEND", "triton")
    report = doctor.doctor("cpu")
    assert report["ops"]["attention"] == {"backend": "reference", "reason": "asked for"}
    assert report["environment"]["unknown"] == ["FASTVID_BAKEND"]


def test_a_broken_part_is_reported_not_raised(clean: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise OSError("no such driver")

    clean.setattr(doctor, "_cuda", broken)
    report = doctor.doctor("tpu")
    assert report["cuda"] == {"error": "OSError: no such driver"}
    assert report["ops"]["error"].startswith("InvalidRequest: device is 'tpu'")
    assert report["packages"]["torch"]


def test_extension_is_built_or_says_why_not(clean: pytest.MonkeyPatch) -> None:
    extension = doctor.doctor("cpu")["extension"]
    assert extension["built"] == ("why" not in extension)
    clean.setattr("fastvid.ops.dispatch.extension", lambda: "fastvid._C was not built")
    assert "pure Python and Triton" in doctor.doctor("cpu")["extension"]["why"]


def test_text_has_every_fact() -> None:
    text = doctor.render(
        {
            "cuda": {"driver": None, "gpus": [], "works": False},
            "ops": {"device": "cpu", "to_rgb": {"backend": "triton", "reason": "asked for"}},
            "environment": {"set": {"FASTVID_MODEL": "a"}, "unknown": ["FASTVID_X"]},
        }
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines == [
        "cuda",
        "driver none",
        "gpus none",
        "works no",
        "ops",
        "device cpu",
        "to_rgb triton asked for",
        "environment",
        "set FASTVID_MODEL=a",
        "unknown FASTVID_X",
    ]


def test_settings_come_from_the_environment() -> None:
    environ = {"FASTVID_DEVICE": "cuda:1", "FASTVID_MODEL": "", "HOME": "/", "FASTVID_BUILD_CUDA": "0"}
    assert env.read(environ) == env.Settings(device="cuda:1")
    assert env.unknown(environ) == [] and env.unknown({"FASTVID_DEVCE": "cpu"}) == ["FASTVID_DEVCE"]
