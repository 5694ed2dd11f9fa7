"""Why a migration does not come to its end, as its monitor says it."""

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.deadline import until


async def wait_stall(daemon: DaemonProcess, words: str) -> None:
    """Wait until ``query-migrate`` gives these words as the reason."""

    async def is_explained() -> bool:
        return words in str((await daemon.query_migrate()).get("error-desc"))

    await until(is_explained, f"the reason {words!r}")
