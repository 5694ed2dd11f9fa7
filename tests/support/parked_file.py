"""A real guest saved to a plain migration file."""

from pathlib import Path

from tests.support.moves import Host, memory_digest


async def save_guest(host: Host, path: Path) -> tuple[str, str]:
    """Let a guest run, stop it and save it.

    Returns:
        SHA-256 of its RAM, and what it printed.
    """
    async with await host.start("QEMU A") as qemu:
        await qemu.wait_serial(4)
        await qemu.execute("stop")
        await qemu.migrate(f"exec:cat > {path}", return_path=False)
        await qemu.wait_migration("completed")
        return await memory_digest(qemu, host), qemu.serial
