"""Random input draws the same replies from a real QEMU 11.1 and from our reader."""

import json
import random
import socket
from pathlib import Path

import pytest

from migrationd.ctl.qemu_process import QemuProcess
from tests.support.fake_control import FakeControl
from tests.support.monitor import Monitor
from tests.support.releases import qemu_binary

pytestmark = [pytest.mark.interop, pytest.mark.matrix]

VERSION = "11.1"
ROUNDS = 3000

PIECES: tuple[bytes, ...] = (
    *(bytes((byte,)) for byte in b"{}[]:,\"'\\ \t\r\n-+.eEA_%/#01\x00\x01\x7f\x80\xfe\xff"),
    *(b"{{", b"}}", b"[[", b"]]", b'"a"', b"'b'", b'"k":', b'{"a":1}', b'{"execute":"x","id":'),
    *(b"12", b"01", b"-01", b"-0", b"1.5", b".5", b"1e5", b"1E5", b"1e", b"1e+", b"0.0e5"),
    *(b"18446744073709551615", b"18446744073709551616", b"-9223372036854775808"),
    *(b"true", b"false", b"null", b"nil", b"a1"),
    *(b"\\u0041", b"\\ud83d\\ude00", b"\\ud800", b"\\udc00", b'"\\u', b'"\\x"', b'"\\u00e9"'),
    *(b'"\\u0000"', b'"\\ufffe"', b'"\\ud83f\\udfff"', b'"x\\"y"', b"\xc3\xa9", b'"\xc3("'),
    *(b'"\xf0\x9f\x98\x80"', b'"\xef\xbf\xbf"', b'"\xc0\x80"'),
)


class RawClient:
    """A blocking client that counts nothing and parses nothing."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.stream = self.sock.makefile("rb")
        self.stream.readline()

    def exchange(self, data: bytes, last: str) -> list[dict[str, object]]:
        """Replies up to the one with the id ``last``."""
        self.sock.sendall(data)
        replies = []
        while not replies or replies[-1].get("id") != last:
            # An id beyond a double's range comes back from QEMU as what is not JSON.
            line = self.stream.readline().replace(b"inf", b"1e999")
            replies.append(json.loads(line))
        return replies

    def close(self) -> None:
        self.stream.close()
        self.sock.close()


def random_input(rng: random.Random) -> bytes:
    text = b"".join(rng.choices(PIECES, k=rng.choice((1, 2, 3, 4, 5, 8, 12, 20))))
    return b'{"execute":"x","id":' + text + b"}" if rng.random() < 0.3 else text


async def test_replies_are_equal(tmp_path: Path, closing: list[object]) -> None:
    path = tmp_path / "second.sock"
    extra = ["-qmp", f"unix:{path},server=on,wait=off"]
    closing.append(
        await QemuProcess.start(qemu_binary(VERSION), memory_mib=16, paused=True, arguments=extra)
    )
    client = RawClient(path)
    monitor = Monitor(FakeControl())
    rng = random.Random(11)
    negotiate = b'{"execute": "qmp_capabilities", "id": "m"}'
    assert client.exchange(negotiate, "m") == await monitor.feed(negotiate)
    for number in range(ROUNDS):
        mark = f"m{number}"
        data = random_input(rng) + b'\x01\n{"execute": "none", "id": "%b"}' % mark.encode()
        assert await monitor.feed(data) == client.exchange(data, mark), data
    client.close()
