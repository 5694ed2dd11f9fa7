"""What ``-incoming`` can say."""

import pytest

from migrationd.daemon.assembly import incoming_channels
from migrationd.errors import ConfigError
from migrationd.qmp.context import MigrationChannel
from migrationd.transport.address import FileAddress, InetAddress, UnixAddress

MAIN = MigrationChannel("main", UnixAddress("/m"))
CPR = MigrationChannel("cpr", UnixAddress("/c"))
CPR_JSON = '{"channel-type": "cpr", "addr": {"transport": "socket", "type": "unix", "path": "/c"}}'


@pytest.mark.parametrize(
    ("texts", "channels"),
    [
        (["defer"], []),
        (["unix:/m"], [MAIN]),
        (["tcp:h:1", "unix:/m"], [MAIN]),
        (["unix:/m", "defer"], []),
        (["defer", CPR_JSON], [CPR]),
        (["unix:/m", CPR_JSON], [MAIN, CPR]),
        (["cpr,addr.transport=socket,addr.type=unix,addr.path=/c", "unix:/m"], [CPR, MAIN]),
        (
            ["main,addr.transport=socket,addr.type=inet,addr.host=h,addr.port=1"],
            [MigrationChannel("main", InetAddress("h", "1"))],
        ),
        (
            ["main,addr.transport=socket,addr.type=inet,addr.host=h,addr.port=1,addr.ipv6=off"],
            [MigrationChannel("main", InetAddress("h", "1", ipv6=False))],
        ),
        (
            ["main,addr.transport=file,addr.filename=7,addr.offset=4096"],
            [MigrationChannel("main", FileAddress("7", 4096))],
        ),
    ],
)
def test_the_last_of_each_type_counts(texts: list[str], channels: list[MigrationChannel]) -> None:
    assert incoming_channels(texts) == channels


@pytest.mark.parametrize(
    "text",
    [
        "cpr,",
        "main,addr.transport=socket",
        "main,addr.transport=file,addr.filename=x,addr.offset=y",
        '{"addr": {}}',
        '{"addr": 3}',
        '{"addr": []}',
        '{"addr": {"transport": "exec", "args": [3]}}',
        '{"addr": {"transport": "socket", "type": "inet", "host": 3, "port": "1"}}',
        '{"addr": {"transport": "file", "filename": "x", "offset": -1.5}}',
        '{"addr": {"transport": "file", "filename": "x", "offset": 0}, "more": 1}',
        '{"channel-type": "x"}',
        '{"channel-type": []}',
        "x:",
    ],
)
def test_what_is_no_channel_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="-incoming"):
        incoming_channels([text])
