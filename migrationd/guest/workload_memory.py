"""A workload's memory as a whole: given to another process, taken from one, or made anew.

Reference: ``remap`` of the guest socket, ``guest/protocol.py``.
"""

import json
import os
from collections.abc import Sequence

from migrationd.codec.cpr import CprEntry, CprState, encode_workload_tail
from migrationd.errors import GuestError
from migrationd.guest.handed import HandedMemory, duplicate_all, empty_memfd
from migrationd.guest.memory import SharedMemory, memory_page_bytes
from migrationd.guest.protocol import Remap
from migrationd.guest.workload_block import WorkloadBlock
from migrationd.guest.workload_link import Introduced, WorkloadLink


class WorkloadMemory:
    """The memfds behind the RAM blocks of one workload.

    Args:
        link: Connection to the workload.
        introduced: Has the memfds.
        ram: The blocks, in the same order.
    """

    def __init__(
        self, link: WorkloadLink, introduced: Introduced, ram: Sequence[WorkloadBlock]
    ) -> None:
        self._link = link
        self._introduced = introduced
        self._ram = ram

    def offer(self, machine: str | None) -> HandedMemory:
        """The memory for another process, with what a destination has to know beforehand.

        Args:
            machine: What the stream calls the workload.

        Raises:
            GuestError: There are too many descriptors.
        """
        hello = self._introduced.hello
        told = {
            "machine": machine,
            "page_size": hello.page_size,
            "blocks": [[block.idstr, block.used_length] for block in self._ram],
            "devices": hello.devices,
        }
        entries = tuple(CprEntry(block.idstr) for block in self._ram)
        state = CprState(entries, encode_workload_tail(json.dumps(told).encode()))
        return HandedMemory(state, duplicate_all([fd for _, fd in self._introduced.blocks]))

    def adopt(self, handed: HandedMemory) -> None:
        """Put memory of another process in the place of what is there.

        Raises:
            GuestError: It does not fit, or the workload does not obey.
        """
        found = [handed.fd_of_block(block.idstr, block.used_length) for block in self._ram]
        for block, fd in zip(self._ram, found, strict=True):
            if memory_page_bytes(fd) > (block.backing_page_size or block.page_size):
                raise GuestError(
                    f"the memory of RAM block '{block.idstr}' is in huge pages, here it is not"
                )
        for index, fd in enumerate(found):
            (own,) = duplicate_all([fd])
            self._remap(index, own, is_lent=True)

    def renew(self) -> None:
        """Put empty memory in the place of what is there.

        Raises:
            GuestError: The workload does not obey.
        """
        for index, block in enumerate(self._ram):
            fd = empty_memfd(block.idstr, block.used_length, block.backing_page_size)
            self._remap(index, fd, is_lent=False)

    def _remap(self, index: int, fd: int, *, is_lent: bool) -> None:
        """Replace a block's memory by that of a descriptor, which is owned from now on."""
        block = self._ram[index]
        memory: SharedMemory | None = None
        try:
            memory = SharedMemory(fd, block.used_length, block.page_size)
            self._link.request("remap", Remap(block=block.idstr, is_lent=is_lent), (fd,))
        except BaseException:
            if memory is not None:
                memory.close()
            os.close(fd)
            raise
        old, block.memory = block.memory, memory
        old.close()
        self._introduced.replace_block(index, fd)
