from __future__ import annotations

import os
from pathlib import Path

import pytest

from distrib.devices.xla import XlaDevice
from distrib.errors import TopologyError
from distrib.strategies import xla_health
from distrib.strategies.xla_health import Finding, health, main

NOW = 1_000_000_000.0


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let torch_xla be installed and fit, on the CPU client."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(xla_health, "find_spec", lambda name: object())
    monkeypatch.setattr(xla_health.metadata, "version", lambda name: "2.9.0")
    monkeypatch.setattr(XlaDevice, "check_installation", lambda self: None)
    monkeypatch.setattr(xla_health, "pjrt_device", lambda _: "CPU")


def found(name: str, compile_cache: str | None = None, **env: str) -> Finding:
    return {each.name: each for each in health(compile_cache, env, NOW)}[name]


def graph(folder: Path, name: str, *, size: int, age_s: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(bytes(size))
    os.utime(folder / name, (NOW - age_s, NOW - age_s))


def test_an_installation_that_fits_is_well() -> None:
    finding = found("torch_xla")

    assert finding.is_well
    assert finding.value.startswith("2.9.0, which fits torch ")


def test_without_torch_xla_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_health, "find_spec", lambda name: None)

    assert found("torch_xla") == Finding(
        "torch_xla", "not installed: pip install 'distrib[tpu]'", is_well=False
    )


def test_versions_that_do_not_match_are_shown_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: XlaDevice) -> None:
        raise TopologyError(
            "D0890", "torch_xla 2.9.0 is made for torch 2.9, but torch is 2.13.0", fix="pip install it"
        )

    monkeypatch.setattr(XlaDevice, "check_installation", refuse)

    assert found("torch_xla") == Finding(
        "torch_xla",
        "torch_xla 2.9.0 is made for torch 2.9, but torch is 2.13.0; pip install it",
        is_well=False,
    )


@pytest.mark.parametrize(
    ("kind", "chips", "is_well"), [("CPU", 0, True), ("TPU", 4, True), ("TPU", 0, False), (None, 0, False)]
)
def test_a_device_is_well_when_there_is_one(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, chips: int, is_well: bool
) -> None:
    monkeypatch.setattr(xla_health, "pjrt_device", lambda _: kind)
    monkeypatch.setattr(xla_health, "num_chips", lambda: chips)

    finding = found("PJRT device")

    assert (finding.is_well, (kind or "none") in finding.value) == (is_well, True)


def test_the_cache_of_all_ranks_is_measured(tmp_path: Path) -> None:
    graph(tmp_path / "rank-00000", "a", size=2**20, age_s=3 * 86400)
    graph(tmp_path / "rank-00001", "b", size=2**19, age_s=7200)

    assert found("compile cache", str(tmp_path)).value == f"{tmp_path} (xla.compile_cache), 2 graphs, 1.5 MiB"
    assert found("last compilations", str(tmp_path)).value == "1 in the last 24 hours, the newest 2 hours ago"


def test_torch_xlas_own_variable_names_the_cache_too(tmp_path: Path) -> None:
    value = found("compile cache", XLA_PERSISTENT_CACHE_PATH=str(tmp_path)).value

    assert value == f"{tmp_path} (XLA_PERSISTENT_CACHE_PATH), 0 graphs, 0.0 MiB"


def test_a_cache_that_is_not_there_yet_is_well_and_a_file_in_its_place_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert found("compile cache", str(tmp_path / "new")).is_well
    assert not found("compile cache", str(tmp_path / "file")).is_well


def test_the_command_reads_the_configuration_and_says_ok_or_fail(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text("xla: {compile_cache: cache}\n")
    well = main(["run.yaml"], {})
    text = capsys.readouterr().out
    monkeypatch.setattr(xla_health, "pjrt_device", lambda _: None)
    ill = main([], {})

    assert (well, ill) == (0, 1)
    assert "ok    compile cache  cache (xla.compile_cache), not there yet" in text
    assert "FAIL  PJRT device    none" in capsys.readouterr().out


def test_a_wrong_configuration_is_told_as_everywhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("xla: {spmd: maybe}\n")

    assert main(["run.yaml"], {}) == 2
    assert "error[D0106] run.yaml:1" in capsys.readouterr().err
    assert main(["--what"], {}) == 2
    assert "usage:" in capsys.readouterr().err
