"""inspect, verify, diff and convert on small files of every form."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from migrationd.ctl import file_guest
from migrationd.ctl.app import app
from migrationd.ctl.diff_files import differing_pages
from migrationd.ctl.file_guest import FileGuest
from migrationd.ctl.file_summary import summarize
from migrationd.ctl.verify_file import verify
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.store.mapped_ram_reader import read_contents
from tests.unit.store.guests import BLOCKS, PAGE, present_pages, store_guest

FORMS = ("plain", "mapped-ram", "zstd", "libvirt")
XML = "<domain type='qemu'><name>vm</name></domain>"


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return store_guest(tmp_path / "parked")


@pytest.fixture
def convert(stored: Path, tmp_path: Path) -> Callable[[str], Path]:
    domain = tmp_path / "domain.xml"
    domain.write_text(XML)

    def to(form: str) -> Path:
        target = tmp_path / f"guest.{form}"
        arguments = ["--domain", domain] if form == "libvirt" else []
        result = run("convert", stored, target, "--to", form, *arguments)
        assert result.exit_code == 0, result.output + str(result.exception)
        return target

    return to


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_guest(
    form: str, convert: Callable[[str], Path], stored: Path, tmp_path: Path
) -> None:
    target = convert(form)
    assert [f for f in verify(target) if f.level == "error"] == []
    summary = summarize(target)
    assert summary.configuration is not None
    assert summary.configuration.machine == "pc-i440fx-10.0"
    assert [(b.idstr, b.used_length) for b in summary.blocks] == list(BLOCKS)
    for block, present in zip(summary.blocks, present_pages(), strict=True):
        assert np.array_equal(block.present, present)
    result = run("diff", stored, target)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("equal: 667 pages")
    again = tmp_path / "again"
    assert run("convert", target, again, "--to", "mapped-ram").exit_code == 0
    assert run("diff", stored, again).exit_code == 0
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "mapped-ram"])
def test_a_stream_goes_into_a_mapped_ram_file_without_memory_for_its_pages(
    form: str,
    convert: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = convert(form), tmp_path / "again.mapped-ram"
    with monkeypatch.context() as patched:
        patched.delattr(file_guest, "AnonymousMemory")
        result = run("convert", source, target, "--to", "mapped-ram")
    assert result.exit_code == 0, result.output + str(result.exception)
    assert [f for f in verify(target) if f.level == "error"] == []
    assert run("diff", source, target).exit_code == 0


def test_a_save_image_keeps_its_domain(convert: Callable[[str], Path], tmp_path: Path) -> None:
    image = convert("libvirt")
    again = tmp_path / "again"
    assert run("convert", image, again, "--to", "libvirt").exit_code == 0
    assert again.read_bytes() == image.read_bytes()
    other = tmp_path / "other"
    result = run("convert", tmp_path / "parked/vm1.mapped-ram", other, "--to", "libvirt")
    assert result.exit_code == 1
    assert "--domain" in str(result.exception)
    with_image = ("--to", "libvirt", "--domain", image)
    assert run("convert", tmp_path / "parked/vm1.mapped-ram", other, *with_image).exit_code == 0
    assert other.read_bytes() == image.read_bytes()


def test_inspect_shows_machine_blocks_and_sections(convert: Callable[[str], Path]) -> None:
    text = run("inspect", convert("zstd")).output
    for expected in (
        "plain stream, compressed by zstd",
        "pc-i440fx-10.0",
        "running",
        "pc.ram",
        "66.7%",
        "0000:00:05.0/virtio-mem-early",
    ):
        assert expected in text
    tree = json.loads(run("inspect", convert("plain"), "--json").output)
    assert tree["ram-blocks"][0]["present-pages"] == 200
    assert [s["name"] for s in tree["sections"]][1:] == ["timer", "cpu", "globalstate"]


def test_inspect_a_device(stored: Path) -> None:
    result = run("inspect", stored, "--device", "timer")
    assert "24 zero bytes" in result.output
    tree = json.loads(run("inspect", stored, "-d", "virtio-mem-early", "--json").output)
    assert tree["devices"][0]["fields"][0]["value"] == b"body".hex()
    result = run("inspect", stored, "--device", "nvme")
    assert result.exit_code == 1
    assert "there are: 0000:00:05.0/virtio-mem-early, timer, cpu, globalstate" in str(
        result.exception
    )


def test_diff_names_pages_and_sections(stored: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(stored.read_bytes())
    fd = os.open(other, os.O_RDWR)
    block = read_contents(fd, "other").blocks[0]
    os.pwrite(fd, b"\xee", block.pages_position + 3 * PAGE + 5)
    # An absent page's place does not count.
    os.pwrite(fd, b"\xee", block.pages_position + 4 * PAGE)
    data = os.pread(fd, 1 << 24, 0)
    os.pwrite(fd, b"paused\0", data.index(b"\x08running") + 1)
    os.close(fd)
    result = run("diff", stored, other)
    assert result.exit_code == 1
    assert "RAM block pc.ram: 1 of 600 pages differ, first at 0x3005" in result.output
    assert "0x3000-0x4000  1 pages" in result.output
    assert "section globalstate: 1 fields differ" in result.output
    tree = json.loads(run("diff", stored, other, "--json").output)
    assert tree["ram-blocks"] == [
        {
            "name": "pc.ram",
            "only-in": None,
            "lengths": [600 * PAGE, 600 * PAGE],
            "differing-pages": 1,
            "runs": [[3, 1]],
        }
    ]
    assert run("diff", stored, tmp_path / "none").exit_code == 2


def test_differing_pages_agree_with_a_loop_over_pages() -> None:
    random = np.random.default_rng(7)
    blocks = []
    for _ in range(2):
        block = RamBlock(RamBlockSpec("b", 9000 * PAGE, PAGE), AnonymousMemory(9000 * PAGE, PAGE))
        pages = np.flatnonzero(random.random(9000) < 0.4)
        block.present[pages] = True
        block.memory.view.reshape(-1, PAGE)[pages, 17] = random.integers(0, 3, len(pages))
        # What is at an absent page's place is arbitrary.
        absent = np.flatnonzero(~block.present)[::7]
        block.memory.view.reshape(-1, PAGE)[absent, 5] = 9
        blocks.append(block)
    expected = [n for n in range(9000) if blocks[0].page(n) != blocks[1].page(n)]
    assert differing_pages(*blocks).tolist() == expected
    assert expected


@pytest.mark.parametrize("form", FORMS)
def test_verify_finds_damage(form: str, convert: Callable[[str], Path]) -> None:
    target = convert(form)
    data = target.read_bytes()
    for damaged in (data[:-40], data[: len(data) // 2], bytes(4) + data[4:], b""):
        target.write_bytes(damaged)
        result = run("verify", target)
        assert result.exit_code == 1, result.output
        assert "error" in result.output


def test_verify_compares_with_the_record(stored: Path) -> None:
    assert any(f.what == "sums" and f.level == "ok" for f in verify(stored))
    with stored.open("r+b") as file:
        file.seek(read_contents(file.fileno(), "f").blocks[1].bitmap_position)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 2]))
    assert any(f.what == "sums" and f.level == "error" for f in verify(stored))


def test_verify_says_what_stands_behind_the_end(convert: Callable[[str], Path]) -> None:
    plain = convert("plain")
    with plain.open("ab") as file:
        file.write(b"tail")
    assert ("warning", "4 bytes behind") in [(f.level, f.text[:14]) for f in verify(plain)]
    assert run("verify", plain).exit_code == 0


def test_a_target_is_kept_and_a_failure_leaves_nothing(stored: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    assert run("convert", stored, target, "--to", "plain").exit_code == 1
    assert target.read_text() == "mine"
    assert run("convert", stored, target, "--to", "zstd", "--level", 40, "-f").exit_code == 1
    assert target.read_text() == "mine"
    assert run("convert", stored, target, "--to", "zstd", "-f").exit_code == 0
    assert run("convert", stored, tmp_path / "no/target", "--to", "plain").exit_code == 1
    assert run("convert", stored, target, "--to", "tar").exit_code == 2
    assert not list(tmp_path.glob("*.part"))


def test_a_guest_file_that_changes_under_the_reader_is_noticed(stored: Path) -> None:
    with FileGuest(stored) as file:
        file.guest.check_unchanged()
        with stored.open("r+b") as other:
            other.write(b"Q")
            other.truncate(other.seek(0, os.SEEK_END) + 1)
        with pytest.raises(Exception, match="was changed while the guest was held"):
            file.guest.check_unchanged()


def test_a_file_that_claims_more_than_any_guest_is_refused_at_once(
    convert: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing is allocated for it, and no bitmap of it is read."""
    data = convert("plain").read_bytes()
    huge = ((1 << 60) | 4).to_bytes(8, "big")
    total = (sum(length for _, length in BLOCKS) | 4).to_bytes(8, "big")
    target = tmp_path / "huge"
    target.write_bytes(data.replace(total, huge, 1))
    assert "the limit is" in verify(target)[0].text
    mapped = convert("mapped-ram")
    data = mapped.read_bytes()
    with mapped.open("r+b") as file:
        at = data.index(total)
        file.write(data[:at] + huge + data[at + 8 : at + 15] + (1 << 60).to_bytes(8, "big"))
        file.truncate(1 << 43)
    assert "the limit is" in verify(mapped)[0].text


def test_the_source_may_be_called_as_the_target_with_part(stored: Path, tmp_path: Path) -> None:
    source = stored.rename(tmp_path / "guest.part")
    assert run("convert", source, tmp_path / "guest", "--to", "zstd").exit_code == 0
    assert run("diff", source, tmp_path / "guest").exit_code == 0


def test_a_name_is_printed_as_it_is(stored: Path, tmp_path: Path) -> None:
    source = stored.rename(tmp_path / "a [red]guest \x1b[31m")
    text = run("inspect", source).output
    assert "a [red]guest \\x1b[31m" in text
    assert "\x1b" not in text


def test_damage_is_told_with_the_file(convert: Callable[[str], Path], stored: Path) -> None:
    plain = convert("plain")
    os.truncate(plain, 5000)
    result = run("diff", stored, plain)
    assert result.exit_code == 2
    assert f"'{plain}': the input ended" in result.output
    assert str(plain) in str(run("inspect", plain).exception)


def test_preempt_belongs_to_lazy() -> None:
    result = run("-s", "nowhere", "resume", "--preempt", "tcp:127.0.0.1:1")
    assert result.exit_code == 2
    assert "--lazy" in result.output


def run_apart(
    *arguments: object, stdout: int | IO[str] = subprocess.PIPE, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from migrationd.ctl.app import main; main()"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )


def test_an_output_that_takes_nothing_is_told_in_a_line(stored: Path) -> None:
    with open("/dev/full", "w") as full:
        ended = run_apart("verify", stored, stdout=full)
    assert ended.returncode == 1
    assert ended.stderr == "migrationctl: No space left on device\n"


@pytest.mark.parametrize("form", FORMS)
def test_a_target_that_gets_too_large_is_told_with_its_name(
    form: str, convert: Callable[[str], Path], tmp_path: Path
) -> None:
    source, target = convert("plain"), tmp_path / "large"
    domain = ["--domain", tmp_path / "domain.xml"] if form == "libvirt" else []
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, most))
    try:
        result = run("convert", source, target, "--to", form, *domain)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert result.exit_code == 1
    assert f"'{target}': " in str(result.exception)
    assert os.strerror(errno.EFBIG) in str(result.exception)
    assert not target.exists()


def test_an_encoding_without_arrows_does_for_a_diff(
    convert: Callable[[str], Path], tmp_path: Path
) -> None:
    one, other = convert("plain"), tmp_path / "other"
    other.write_bytes(one.read_bytes().replace(b"pc-i440fx-10.0", b"pc-i440fx-10.1"))
    ended = run_apart("diff", one, other, encoding="ascii")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "pc-i440fx-10.0 \\u2192 pc-i440fx-10.1" in ended.stdout
