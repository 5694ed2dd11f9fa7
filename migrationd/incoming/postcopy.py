"""What the commands of postcopy do to a guest on its way in, and who owns it meanwhile.

    ADVISE       before any section: which pages come is kept from now on
    RAM_DISCARD  pages that must come again
    PACKAGED     { LISTEN  device sections  PING  RUN }
    then         pages in any order, to the end of the stream

A source gives its guest up when it hears that the package was loaded: the answer to
PING 0x42, of QEMU 10.2 and later. Older ones give it up as they send the package. From
that moment nothing that is here may be forgotten, whatever happens to the stream: the
rest of the memory is at a source that will never run the guest again. A lost channel is
a pause then, and a new connection goes on:

    RECV_BITMAP  of each block; answered by which of its pages came
    RESUME       answered by RESUME_ACK; pages flow again

Reference: stream format 4.3-4.6, 6.4 and 6.6.
"""

from collections.abc import Callable, Sequence
from enum import Enum

import numpy as np

from migrationd.codec.constants import (
    MIG_CMD_PING,
    MIG_CMD_POSTCOPY_ADVISE,
    MIG_CMD_POSTCOPY_LISTEN,
    MIG_CMD_POSTCOPY_RAM_DISCARD,
    MIG_CMD_POSTCOPY_RESUME,
    MIG_CMD_RECV_BITMAP,
)
from migrationd.codec.postcopy import (
    PING_PACKAGE_LOADED,
    decode_advise,
    decode_discard,
    decode_recv_bitmap,
    pack_received,
)
from migrationd.codec.records import Command, OpaqueSection, Package
from migrationd.codec.return_path import Pong, RecvBitmap, ResumeAck, ReturnPathMessage
from migrationd.errors import StreamCorrupt, StreamError, StreamUnsupported
from migrationd.guest.ram_block import RamBlock
from migrationd.incoming.loader import StreamLoader
from migrationd.migration.status import Cause

RESUME_ACK_VALUE = 1


class Phase(Enum):
    """How far a guest has turned to postcopy."""

    PRECOPY = "precopy"
    ADVISED = "advised"
    LISTENING = "listening"
    RUNNING = "running"
    """The source has given the guest up."""
    RECOVERING = "recovering"
    """As before, on a new connection, until both know which pages are missing."""


class PostcopyArrival:
    """Obeys the commands of postcopy for one arriving guest; used by its loading thread.

    Args:
        takes_ram: Whether ``postcopy-ram`` is on here.
        answer: Sends a message on the return path.
        report: Told what the status machine has to know; on the loading thread.

    Attributes:
        phase: How far it is.
        has_ram: Whether pages come by postcopy; else dirty bitmaps only.
        launch: Loads a guest that is to run, and calls :meth:`commit`; given the values of the
            package's pings. None for a guest that is only kept.
    """

    def __init__(
        self,
        *,
        takes_ram: bool,
        answer: Callable[[ReturnPathMessage], None],
        report: Callable[[Cause], object],
    ) -> None:
        self._takes_ram = takes_ram
        self._answer = answer
        self._report = report
        self.launch: Callable[[list[int]], None] | None = None
        self.phase = Phase.PRECOPY
        self.has_ram = False

    @property
    def owns_guest(self) -> bool:
        """Whether the source has given the guest up."""
        return self.phase in (Phase.RUNNING, Phase.RECOVERING)

    def obey(self, command: Command, loader: StreamLoader) -> None:
        """Obey a command of postcopy that came on the main stream.

        Raises:
            StreamError: It is malformed, or not legal now.
        """
        position = loader.position
        try:
            self._obey(command, loader, position)
        except StreamError as error:
            if error.position is None:
                error.position = position
            raise

    def _obey(self, command: Command, loader: StreamLoader, position: int) -> None:
        match command.number:
            case n if n == MIG_CMD_POSTCOPY_ADVISE:
                self._advise(command.payload, loader)
            case n if n == MIG_CMD_POSTCOPY_RAM_DISCARD:
                self._discard(command.payload, loader)
            case n if n == MIG_CMD_RECV_BITMAP:
                self._require(Phase.RECOVERING, "RECV_BITMAP", position)
                block = _block(loader, decode_recv_bitmap(command.payload), "RECV_BITMAP")
                assert block.received is not None
                self._answer(RecvBitmap(block.idstr, pack_received(block.received)))
            case n if n == MIG_CMD_POSTCOPY_RESUME:
                self._require(Phase.RECOVERING, "POSTCOPY_RESUME", position)
                self._answer(ResumeAck(RESUME_ACK_VALUE))
                self.phase = Phase.RUNNING
                loader.pages_may_come()
                self._report(Cause.RECOVERED)
            case _:
                raise StreamCorrupt(
                    f"command {command.number} outside a package", position=position
                )

    def prepare(self, blocks: tuple[RamBlock, ...]) -> None:
        """Keep from the first page on which ones came."""
        if self.has_ram:
            for block in blocks:
                block.track_received()

    def unpack(self, package: Package, loader: StreamLoader) -> None:
        """Take the device state; the source gives the guest up.

        Raises:
            StreamError: The package is malformed, or not legal now.
        """
        position = loader.position
        self._require(Phase.ADVISED, "a package", position)
        if not loader.blocks:
            raise StreamCorrupt("a package before the RAM block list", position=position)
        first = package.records[0]
        if not isinstance(first, Command) or first.number != MIG_CMD_POSTCOPY_LISTEN:
            raise StreamCorrupt("the package does not begin with LISTEN", position=position)
        pings = []
        for record in package.records[1:-1]:
            match record:
                case OpaqueSection():
                    loader.keep_section(record)
                case Command(number, payload) if number == MIG_CMD_PING:
                    pings.append(int.from_bytes(payload, "big"))
                case Command(number):
                    raise StreamCorrupt(f"command {number} in a package", position=position)
        self.phase = Phase.LISTENING
        loader.listen()
        self._report(Cause.POSTCOPY)
        if self.launch is not None:
            self.launch(pings)
        else:
            self.commit(pings)

    def commit(self, pings: Sequence[int]) -> None:
        """The devices are loaded: tell the source, which gives the guest up.

        Raises:
            ChannelError: It cannot be told; it keeps the guest if it waits for the word.
        """
        if PING_PACKAGE_LOADED not in pings:
            self.phase = Phase.RUNNING
        for value in pings:
            self._answer(Pong(value))
        self.phase = Phase.RUNNING
        self._report(Cause.PACKAGE_LOADED)

    def recover(self) -> None:
        """A new connection is there; its first commands ask which pages came."""
        self.phase = Phase.RECOVERING

    def _advise(self, payload: bytes, loader: StreamLoader) -> None:
        position = loader.position
        self._require(Phase.PRECOPY, "POSTCOPY_ADVISE", position)
        if loader.has_sections:
            raise StreamCorrupt("POSTCOPY_ADVISE behind a section", position=position)
        advise = decode_advise(payload)
        if advise is not None:
            # The source may turn to postcopy at any time from now on: what cannot be taken
            # is refused while its guest still runs there.
            if not self._takes_ram:
                raise StreamUnsupported(
                    "RAM postcopy is off here but on at the source",
                    position=position,
                    hint="turn postcopy-ram on, or off, at both ends",
                )
            if advise.target_page_size != loader.page_size:
                raise StreamUnsupported(
                    f"target pages of {advise.target_page_size} bytes, expected {loader.page_size}",
                    position=position,
                )
            self.has_ram = True
        elif self._takes_ram:
            raise StreamUnsupported(
                "RAM postcopy is on here but off at the source",
                position=position,
                hint="turn postcopy-ram on, or off, at both ends",
            )
        self.phase = Phase.ADVISED

    def _discard(self, payload: bytes, loader: StreamLoader) -> None:
        position = loader.position
        self._require(Phase.ADVISED, "RAM_DISCARD", position)
        discard = decode_discard(payload)
        block = _block(loader, discard.idstr, "RAM_DISCARD")
        starts, lengths = discard.ranges[:, 0], discard.ranges[:, 1]
        size, end = np.uint64(block.page_size), np.uint64(block.used_length)
        is_whole = (starts % size == 0) & (lengths % size == 0) & (lengths > 0)
        is_inside = (lengths <= end) & (starts <= end - np.minimum(lengths, end))
        if not (is_whole & is_inside).all():
            start, length = discard.ranges[int(np.argmin(is_whole & is_inside))].tolist()
            why = f"outside the block of {block.used_length:#x} bytes"
            if start % block.page_size or length % block.page_size or not length:
                why = "not of whole pages"
            raise StreamCorrupt(
                f"RAM_DISCARD of {length:#x} bytes at {start:#x} is {why}",
                position=position,
                block=block.idstr,
            )
        block.discard((discard.ranges // size).astype(np.int64))

    def _require(self, phase: Phase, what: str, position: int) -> None:
        if self.phase is not phase:
            raise StreamCorrupt(f"{what} when {self.phase.value}", position=position)


def _block(loader: StreamLoader, idstr: str, what: str) -> RamBlock:
    for block in loader.blocks:
        if block.idstr == idstr:
            return block
    raise StreamCorrupt(
        f"{what} of RAM block {idstr!r}, which this guest does not have", position=loader.position
    )
