"""A command's new file: whole under its name, or no trace of it."""

import errno
import os
from pathlib import Path

import pytest

from migrationd.ctl.new_file import new_file
from migrationd.errors import StoreError


@pytest.fixture(params=["nameless", "named"])
def places(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that know files without a name, and others."""
    real = os.open

    def refuse(path: object, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    if request.param == "named":
        monkeypatch.setattr(os, "open", refuse)


@pytest.mark.usefixtures("places")
def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "guest"
    neighbour = tmp_path / "guest.part"
    neighbour.write_bytes(b"another's")
    with new_file(target, overwrite=False) as fd:
        os.write(fd, b"one")
        assert not target.exists()
    with new_file(target, overwrite=True) as fd:
        os.write(fd, b"two")
        assert target.read_bytes() == b"one"
    assert target.read_bytes() == b"two"
    assert sorted(tmp_path.iterdir()) == [target, neighbour]
    assert neighbour.read_bytes() == b"another's"
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("places")
def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        new_file(tmp_path / "guest", overwrite=True),
    ):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("places")
def test_a_name_that_is_taken_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "guest"
    with (
        pytest.raises(StoreError, match="is there already; --force replaces it"),
        new_file(target, overwrite=False),
    ):
        target.write_bytes(b"faster")
    assert target.read_bytes() == b"faster"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "no regular file"),
        ("", "no regular file"),
        ("/", "no regular file"),
        ("/dev/null", "'/dev/null' is no regular file"),
        ("missing/guest", "No such file or directory"),
        ("file/guest", "Not a directory"),
        ("n" * 300, "File name too long"),
    ],
)
def test_names_that_cannot_be(
    name: str, message: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(StoreError, match=message), new_file(Path(name), overwrite=overwrite):
        pass
    assert Path("/dev/null").is_char_device()


def test_a_name_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    with new_file(target, overwrite=False) as fd:
        os.write(fd, b"x")
    assert target.read_bytes() == b"x"
