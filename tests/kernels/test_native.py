"""Compiled libraries: built once for a source and compiler, kept where only their user can write."""

import stat
from pathlib import Path

import pytest

from kernels import native
from tests.kernels.native_cases import needs_vectors

pytestmark = needs_vectors


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libraries are kept in this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = native._cache_folder()
    if found is None:
        pytest.skip(f"others can write to a folder above {tmp_path}")
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "number.cpp"
    path.write_text('extern "C" int number() { return 7; }')
    return path


def must_not_build(*arguments: object) -> None:
    raise AssertionError("built again")


def test_a_library_is_built_once_for_each_source(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._compiled(source).number() == 7
    assert [kept.suffix for kept in folder.iterdir()] == [".so"], "nothing else is left there"
    with monkeypatch.context() as patched:
        patched.setattr(native, "_build", must_not_build)
        assert native._compiled(source).number() == 7
    source.write_text('extern "C" int number() { return 8; }')
    assert native._compiled(source).number() == 8
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-DOTHER"))
    assert native._compiled(source).number() == 8
    assert len(list(folder.iterdir())) == 3, "other flags make another library"


@pytest.mark.parametrize("level", [0, 1, 2], ids=["kernels", "longroll", "cache"])
def test_a_folder_that_others_can_write_to_is_not_trusted(level: int, folder: Path, source: Path) -> None:
    opened = (folder, *folder.parents)[level]
    opened.chmod(0o777)
    assert native._compiled(source).number() == 7
    assert not list(folder.iterdir())
    opened.chmod(0o755)
    assert native._compiled(source).number() == 7
    assert len(list(folder.iterdir())) == 1


def test_a_library_that_others_can_write_to_is_built_anew(folder: Path, source: Path) -> None:
    native._compiled(source)
    (kept,) = folder.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o500
    first = kept.stat().st_ino
    kept.chmod(0o522)
    native._compiled(source)
    assert kept.stat().st_ino != first


def test_a_damaged_library_is_not_waited_for(folder: Path, source: Path) -> None:
    native._compiled(source)
    (kept,) = folder.iterdir()
    kept.unlink()
    kept.write_bytes(b"")
    kept.chmod(0o500)
    assert native._compiled(source).number() == 7


def test_the_folder_is_private(folder: Path, source: Path) -> None:
    native._compiled(source)
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0


def test_it_works_without_a_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native._compiled(source).number() == 7
