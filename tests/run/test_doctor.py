"""The doctor: what it says of a sound machine, and of each thing that can be wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from geoloc_batch.run import doctor, doctor_speed
from geoloc_batch.run.doctor import Finding, examine


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_speed, "_SECONDS", 0.1)


def _about(topic: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.topic == topic]


def test_a_sound_machine_is_told_by_its_versions_devices_speed_and_folders(tmp_path: Path) -> None:
    findings = examine(out=tmp_path / "later" / "out")
    versions = {finding.topic: finding.text for finding in findings}
    for module, distribution in {"torch": "torch", "open_clip": "open_clip_torch", "h3": "h3", "PIL": "pillow"}.items():
        assert versions[module] == metadata.version(distribution)
    assert {"python", "faiss", "cuda", "cpus", "decode", "output", "hub", "limits"} <= set(versions)
    (speed,) = _about("decode", findings)
    assert speed.level != "problem"
    assert 5 < float(speed.text.split()[0]) < 20_000
    assert _about("output", findings)[0].text.startswith(f"{tmp_path} can be written")
    assert os.listdir(tmp_path) == []
    assert all(finding.remedy for finding in findings if finding.level == "problem")


def test_a_torchvision_of_another_build_is_a_problem_and_the_rest_is_still_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    examine()
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.syspath_prepend(str(tmp_path))
    findings = examine()
    (found,) = _about("torchvision", findings)
    assert found.level == "problem"
    assert "operator torchvision::nms does not exist" in found.text
    assert "from one index" in found.remedy
    assert [finding.topic for finding in findings][-1] == "limits"


def test_absent_broken_and_old_packages_are_problems_with_the_command_that_mends_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    packages = {"no_such_module_here": "no-such-distribution", "webdataset": "webdataset", "numpy": "numpy"}
    monkeypatch.setattr(doctor, "_PACKAGES", packages)
    monkeypatch.setattr(doctor, "_required_versions", lambda: {"numpy": ">=999"})
    findings = {finding.topic: finding for finding in examine()}
    assert findings["no_such_module_here"].text == "is not installed"
    assert findings["no_such_module_here"].remedy == "pip install no-such-distribution"
    assert "does not import" in findings["webdataset"].text
    assert findings["numpy"].remedy == "pip install 'numpy>=999'"
    assert {findings[name].level for name in packages} == {"problem"}


def test_two_faiss_at_once_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("faiss_cpu", "faiss_gpu_cu12"):
        folder = tmp_path / f"{name}-1.2.3.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = _about("faiss", examine())[0]
    assert found.level == "problem"
    assert "faiss-cpu 1.2.3" in found.text
    assert "pip uninstall faiss-cpu" in found.remedy


def test_a_check_that_breaks_is_a_finding_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geoloc_batch.stream.decode", None)
    monkeypatch.setattr(doctor, "quota_cpus", lambda: 1 // 0)
    findings = examine()
    assert (
        _about("cpus", findings)[0].text == "cannot be examined: ZeroDivisionError: integer division or modulo by zero"
    )
    assert _about("decode", findings)[0].level == "problem"
    assert _about("limits", findings)


def test_decode_speed_is_photos_per_second_of_one_thread_and_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = ModuleType("decode")
    slow.decode_photo = lambda data: time.sleep(0.01)  # type: ignore[attr-defined]
    slow.fit = lambda rgb, side: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "geoloc_batch.stream.decode", slow)
    monkeypatch.setattr(doctor_speed, "usable_cpus", lambda: 4)
    words = _about("decode", examine())[0].text.split()
    single, every = float(words[0]), float(words[5])
    assert 40 <= single <= 101
    assert 2.4 * single <= every <= 404


def test_threads_that_do_not_scale_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = ModuleType("decode")
    # A loop that never gives the interpreter away stands for a quota that is tighter than it looks.
    busy.decode_photo = lambda data: sum(range(20_000))  # type: ignore[attr-defined]
    busy.fit = lambda rgb, side: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "geoloc_batch.stream.decode", busy)
    monkeypatch.setattr(doctor_speed, "usable_cpus", lambda: 4)
    found = _about("decode", examine())[0]
    assert found.level == "note"
    assert "--decode-threads" in found.remedy


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("s3://bucket/run", "is an address"),
        ("gs:/bucket/run", "is an address"),
        ("file", "is a file"),
        ("file/below", "is a file"),
        ("/proc/run", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_used_is_a_problem(tmp_path: Path, out: str, expected: str) -> None:
    (tmp_path / "file").write_text("")
    (found,) = _about("output", examine(out=Path(out) if ":" in out or out.startswith("/") else tmp_path / out))
    assert (found.level, expected in found.text, bool(found.remedy)) == ("problem", True, True)


def test_an_output_without_hard_links_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    levels = [finding.level for finding in _about("output", examine(out=tmp_path)) if "hard links" in finding.text]
    assert levels[-1] == "note"
    assert os.listdir(tmp_path) == []


def test_little_space_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 0.5e9})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    assert _about("output", examine(out=tmp_path))[0].level == "problem"


def test_offline_without_the_default_encoder_is_noted_and_with_it_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (found,) = _about("hub", examine())
    assert (found.level, "HF_HOME" in found.remedy) == ("note", True)
    snapshot = tmp_path / "models--geolocal--StreetCLIP" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (found,) = _about("hub", examine())
    assert (found.level, str(tmp_path) in found.text) == ("ok", True)


def test_more_threads_than_cpus_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert [finding.level for finding in _about("cpus", examine())] == ["ok", "note"]


def test_the_doctor_itself_needs_no_torch() -> None:
    script = "import sys, geoloc_batch.run.doctor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
