"""Monitors by -chardev and -mon."""

import pytest

from migrationd.errors import ConfigError
from migrationd.qmp.chardev_spec import monitors_of
from migrationd.qmp.monitor_spec import MonitorSpec


@pytest.mark.parametrize(
    ("chardev", "mon", "expected"),
    [
        (
            "socket,id=charmonitor,path=/run/m.sock,server=on,wait=off",
            "chardev=charmonitor,id=monitor,mode=control",
            MonitorSpec("unix", path="/run/m.sock", is_server=True, label="charmonitor"),
        ),
        (
            "socket,id=c,fd=25,server=on,wait=off",
            "c,mode=control,pretty=on",
            MonitorSpec("unix", fd=25, is_server=True, is_pretty=True, label="c"),
        ),
        (
            "socket,id=c,host=127.0.0.1,port=4444,server,nowait",
            "chardev=c,mode=control",
            MonitorSpec("tcp", host="127.0.0.1", port=4444, is_server=True, label="c"),
        ),
        (
            "socket,id=c,path=/x,server=on",
            "chardev=c,mode=control",
            MonitorSpec("unix", path="/x", is_server=True, waits=True, label="c"),
        ),
        ("socket,id=c,path=/x", "c,mode=control", MonitorSpec("unix", path="/x", label="c")),
        ("stdio,id=s", "chardev=s,mode=control", MonitorSpec("stdio", label="s")),
    ],
)
def test_monitors(chardev: str, mon: str, expected: MonitorSpec) -> None:
    assert monitors_of([chardev], [mon]) == [expected]


GOOD = "socket,id=c,path=/x,server=on,wait=off"


@pytest.mark.parametrize(
    ("chardevs", "mons", "text"),
    [
        (["pty,id=c"], [], "expects socket or stdio"),
        (["socket,path=/x"], [], "has no id"),
        (["socket,id=c,path=/x,reconnect=5"], [], "unknown setting 'reconnect=5'"),
        (["socket,id=c"], [], "needs one of path, host with port, and fd"),
        (["socket,id=c,path=/x,fd=7"], [], "needs one of path"),
        (["socket,id=c,fd=7"], [], "with server=on"),
        (["socket,id=c,fd=0,server=on"], [], "is a listening socket"),
        (["socket,id=c,host=h,port=http"], [], "expects a port number"),
        (["socket,id=c,host=h,port=²"], [], "expects a port number"),
        (["socket,id=c,path=" + "x" * 200], [], "cannot be a unix socket"),
        (["socket,id=c,path=/x,server=yes"], [], "unknown setting 'server=yes'"),
        ([GOOD, GOOD], [], "duplicate ID 'c'"),
        ([GOOD], [], "nothing uses 'c'"),
        ([GOOD], ["chardev=c"], "human monitor"),
        ([GOOD], ["chardev=c,mode=readline"], "human monitor"),
        ([GOOD], ["chardev=d,mode=control"], 'chardev "d" not found'),
        ([GOOD], ["c,mode=control", "c,mode=control"], "taken already"),
    ],
)
def test_texts(chardevs: list[str], mons: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        monitors_of(chardevs, mons)
