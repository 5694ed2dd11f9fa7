"""Options of the command line and of a file."""

import uuid
from pathlib import Path

import pytest

from migrationd.cli import main
from migrationd.config import AddedFd, load_config
from migrationd.errors import ConfigError

QMP = ("-qmp", "unix:/run/guest.qmp,server=on,wait=off")


def test_options_with_one_dash_or_two() -> None:
    config = load_config(
        [*QMP, "--qmp=stdio", "--incoming", "defer", "-name", "guest=vm1,debug-threads=on",
         "-uuid", "11223344-5566-7788-99aa-bbccddeeff00", "-S", "--ram-limit", "64G", "-keep",
         "-ram-dir", "/var/lib/x", "--only-migratable", "-log-level", "debug"]
    )  # fmt: skip
    assert config.monitors == (QMP[1], "stdio")
    assert config.incoming == ("defer",)
    assert config.name == "vm1"
    assert config.uuid == uuid.UUID("11223344-5566-7788-99aa-bbccddeeff00")
    assert config.ram_limit_bytes == 64 << 30
    assert config.ram_dir == Path("/var/lib/x")
    assert config.start_stopped
    assert config.keep
    assert config.only_migratable
    assert config.log_level == "debug"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "no monitor"),
        ((*QMP, "-nonsense"), "unknown option '-nonsense'"),
        ((*QMP, "stray"), "unexpected argument 'stray'"),
        ((*QMP, "-name"), "needs a value"),
        ((*QMP, "-uuid", "x"), "expects a UUID"),
        ((*QMP, "-ram-limit", "lots"), "expects a size"),
        ((*QMP, "-ram-limit", "0"), "expects a size"),
        ((*QMP, "-ram-dir", "/x"), "needs -name"),
        ((*QMP, "-name", "../x"), "without '/'"),
        ((*QMP, "-guest", "vm"), "expects 'parked'"),
        ((*QMP, "-guest", "attach:"), "expects 'parked' or 'attach:PATH'"),
        ((*QMP, "-guest", "attach:/x,tracking=none"), "expects one of tracking=auto, tracking=p"),
        ((*QMP, "-guest", "attach:/x", "-name", "x", "-ram-dir", "/x"), "for a parked guest"),
        ((*QMP, "-guest", "attach:/x", "-keep"), "-keep is for a parked guest"),
        ((*QMP, "-ram-prealloc", "1G", "-guest", "attach:/x"), "an attached guest"),
        ((*QMP, "-ram-prealloc", "1G", "-name", "x", "-ram-dir", "/x"), "not with -ram-dir"),
        ((*QMP, "-metrics", "9100"), "expects HOST:PORT"),
        ((*QMP, "-metrics", "host:65536"), "expects HOST:PORT"),
        ((*QMP, "-metrics", "host:" + "9" * 5000), "expects HOST:PORT"),
        ((*QMP, "-log-level", "loud"), "expects one of debug"),
        ((*QMP, "-incoming", "{bad"), "not a JSON MigrationChannel"),
        ((*QMP, "-incoming", '{"a":' * 20000), "not a JSON MigrationChannel"),
        ((*QMP, "-config", "/nonexistent/x"), "cannot read"),
    ],
)
def test_mistakes_are_one_clear_line(words: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        load_config(words)
    assert "\n" not in str(caught.value)


def test_a_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "guest.toml"
    path.write_text('qmp = ["unix:/a", "unix:/b"]\nname = "vm1"\nkeep = true\nram-limit = "1G"\n')
    config = load_config(["-config", str(path), "-name", "vm2"])
    assert config.monitors == ("unix:/a", "unix:/b")
    assert (config.name, config.keep, config.ram_limit_bytes) == ("vm2", True, 1 << 30)


@pytest.mark.parametrize(
    "text", ["qmp = 1.5", "bogus = 1", "qmp = [", "config = 'x'", r'ram-dir = "a\u0000b"']
)
def test_mistakes_in_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "guest.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"guest\.toml"):
        load_config(["-config", str(path)])


def test_sizes() -> None:
    for text, size in (("1k", 1024), ("12", 12), ("1.5G", 3 << 29), ("3T", 3 << 40)):
        assert load_config([*QMP, "-ram-limit", text]).ram_limit_bytes == size


def test_usage_error_exits_2_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-bogus"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "migrationd: unknown option '-bogus'; see -help\n"
    assert captured.out == ""


def test_help_lists_each_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-help"]) == 0
    text = capsys.readouterr().out
    assert all(f"-{name} " in text for name in ("qmp", "incoming", "ram-dir", "keep"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [("127.0.0.1:9100", ("127.0.0.1", 9100)), ("[::1]:0", ("::1", 0)), (":80", ("", 80))],
)
def test_the_address_of_metrics(text: str, parts: tuple[str, int]) -> None:
    assert load_config([*QMP, "-metrics", text]).metrics == parts


def test_pretty_monitors_and_passed_descriptors() -> None:
    config = load_config(
        ["-qmp", "unix:/a", "-qmp-pretty", "stdio", "-add-fd", "fd=7,set=2,opaque=x"]
    )
    assert config.monitors == ("unix:/a", "stdio,pretty=on")
    assert config.added_fds == (AddedFd(7, 2, "x"),)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("fd=1,set=0", "standard input"),
        ("fd=x,set=0", "expects fd=N,set=M"),
        ("set=0", "expects fd=N,set=M"),
        ("fd=7,set=-1", "expects fd=N,set=M"),
        ("fd=7,set=0,mode=1", "unknown setting 'mode'"),
    ],
)
def test_descriptors_that_are_refused(text: str, refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        load_config(["-qmp", "unix:/a", "-add-fd", text])
