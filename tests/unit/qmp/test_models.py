"""Arguments are refused in QEMU's words, the first problem in schema order."""

import pytest

from migrationd.errors import QMPError
from migrationd.qmp.models.base import parse_arguments
from migrationd.qmp.models.migration import (
    Migrate,
    MigrateIncoming,
    MigrateSetCapabilities,
    MigrateSetParameters,
)


def socket_channel(**addr: object) -> dict[str, object]:
    return {"channels": [{"channel-type": "main", "addr": addr}]}


@pytest.mark.parametrize(
    ("model", "arguments", "text"),
    [
        (Migrate, {"uri": 1}, "Invalid parameter type for 'uri', expected: string"),
        (Migrate, {"uri": None}, "Invalid parameter type for 'uri', expected: string"),
        (
            Migrate,
            {"bogus": 1, "resume": 1},
            "Invalid parameter type for 'resume', expected: boolean",
        ),
        (Migrate, {"bogus": 1}, "Parameter 'bogus' is unexpected"),
        (Migrate, {"channels": {}}, "Invalid parameter type for 'channels', expected: array"),
        (Migrate, {"channels": [{}]}, "Parameter 'channels[0].channel-type' is missing"),
        (
            Migrate,
            {"channels": [{"channel-type": "x", "addr": {}}]},
            "Parameter 'channel-type' does not accept value 'x'",
        ),
        (Migrate, socket_channel(transport="x"), "Parameter 'transport' does not accept value 'x'"),
        (
            Migrate,
            socket_channel(transport="socket", type="inet", host="h", port=1),
            "Invalid parameter type for 'channels[0].addr.port', expected: string",
        ),
        (
            Migrate,
            socket_channel(transport="file", filename="f", offset="x"),
            "Parameter 'channels[0].addr.offset' expects uint64",
        ),
        (
            MigrateIncoming,
            {"exit-on-error": "no"},
            "Invalid parameter type for 'exit-on-error', expected: boolean",
        ),
        (MigrateSetCapabilities, {}, "Parameter 'capabilities' is missing"),
        (
            MigrateSetCapabilities,
            {"capabilities": [{"capability": "bogus", "state": True}]},
            "Parameter 'capability' does not accept value 'bogus'",
        ),
        (
            MigrateSetCapabilities,
            {"capabilities": [{"capability": "events"}]},
            "Parameter 'capabilities[0].state' is missing",
        ),
        (
            MigrateSetCapabilities,
            {"capabilities": [{"capability": "events", "state": True, "x": 0}, {}], "y": 0},
            "Parameter 'capabilities[0].x' is unexpected",
        ),
        (MigrateSetParameters, {"max_bandwidth": 5}, "Parameter 'max_bandwidth' is unexpected"),
        (
            MigrateSetParameters,
            {"max-bandwidth": 1 << 64},
            "Parameter 'max-bandwidth' expects uint64",
        ),
        (
            MigrateSetParameters,
            {"cpr-exec-command": ["a", 1]},
            "Invalid parameter type for 'cpr-exec-command[1]', expected: string",
        ),
        (
            MigrateSetParameters,
            {"block-bitmap-mapping": [{"node-name": "n", "alias": "a"}]},
            "Parameter 'block-bitmap-mapping[0].bitmaps' is missing",
        ),
        (
            Migrate,
            {"channels": [{"channel-type": "main", "addr": None}]},
            "Invalid parameter type for 'channels[0].addr', expected: object",
        ),
        (
            Migrate,
            socket_channel(transport="socket", type="inet", host="h", port="1", to=-1),
            "Parameter 'channels[0].addr.to' expects uint16_t",
        ),
        (
            Migrate,
            socket_channel(transport="socket", type="x"),
            "Parameter 'type' does not accept value 'x'",
        ),
        (
            Migrate,
            socket_channel(transport="socket"),
            "Parameter 'channels[0].addr.type' is missing",
        ),
        (
            MigrateSetParameters,
            {"multifd-channels": 256},
            "Parameter 'multifd-channels' expects uint8_t",
        ),
        (MigrateSetParameters, {"max-bandwidth": 1.5}, "Parameter 'max-bandwidth' expects uint64"),
        (
            MigrateSetParameters,
            {"tls-creds": 0},
            "Invalid parameter type for 'tls-creds', expected: StrOrNull",
        ),
        (
            MigrateSetParameters,
            {"multifd-compression": "bzip2"},
            "Parameter 'multifd-compression' does not accept value 'bzip2'",
        ),
        (
            MigrateSetParameters,
            {"multifd-compression": 0},
            "Invalid parameter type for 'multifd-compression', expected: string",
        ),
    ],
)
def test_refusals(
    model: type[Migrate | MigrateIncoming | MigrateSetCapabilities | MigrateSetParameters],
    arguments: dict[str, object],
    text: str,
) -> None:
    with pytest.raises(QMPError) as caught:
        parse_arguments(model, arguments)
    assert caught.value.desc == text


def test_negative_sizes_wrap_as_in_qemu() -> None:
    parsed = parse_arguments(MigrateSetParameters, {"max-bandwidth": -1, "tls-creds": None})
    assert parsed.max_bandwidth == 2**64 - 1
    assert parsed.model_dump(by_alias=True, exclude_unset=True) == {
        "max-bandwidth": 2**64 - 1,
        "tls-creds": None,
    }


def test_channels_of_every_kind() -> None:
    for addr in (
        {"transport": "socket", "type": "inet", "host": "h", "port": "1"},
        {"transport": "socket", "type": "unix", "path": "/x"},
        {"transport": "socket", "type": "vsock", "cid": "1", "port": "2"},
        {"transport": "socket", "type": "fd", "str": "name"},
        {"transport": "exec", "args": ["cat"]},
        {"transport": "file", "filename": "/x", "offset": 0},
        {"transport": "rdma", "host": "h", "port": "1"},
    ):
        parsed = parse_arguments(Migrate, socket_channel(**addr))
        dumped = parsed.channels[0].addr.model_dump(by_alias=True, exclude_unset=True)
        assert dumped == addr
