"""The one tree of errors.

    MigrationdError
    ├── ConfigError          start-up options; the daemon exits with status 2
    ├── StreamError          bytes from the peer; carries position, section, block
    │   ├── StreamTruncated      the input ended early
    │   ├── StreamCorrupt        the bytes contradict the format
    │   ├── StreamUnsupported    valid, but not something this program takes
    │   └── StreamLimit          more than the configured limits allow
    ├── ChannelError         transport; the OSError is its ``__cause__``
    │   ├── AddressError         an address that cannot be parsed or used
    │   ├── ConnectFailed        nobody answered, nothing could be opened or bound
    │   └── ChannelClosed        the peer or our own shutdown ended the channel
    ├── GuestError           memory or devices of the guest
    ├── MigrationError       the order of things
    │   ├── InvalidState         not in this status or run state
    │   ├── PeerFailed           the peer said that it failed
    │   └── MigrationCancelled   ended on request
    ├── StoreError           a guest at rest
    ├── ObjectError          credentials, secrets and rules that a user makes
    └── QMPError             exactly what a monitor client is told

Base classes and the leaves that several packages raise live here.
"""


class MigrationdError(Exception):
    """Base of every error this program raises on purpose."""


class ConfigError(MigrationdError):
    """A start-up option is wrong; the text is one line for standard error."""


class StreamError(MigrationdError):
    """The peer's bytes cannot be accepted.

    Args:
        message: What is wrong: what was expected and what was found.
        position: Byte position in the stream, from 0.
        section: Section idstr or element that was being read.
        block: RAM block concerned.
        hint: What the user can do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        position: int | None = None,
        section: str | None = None,
        block: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.position = position
        self.section = section
        self.block = block
        self.hint = hint

    def __str__(self) -> str:
        where = [
            text
            for text, value in (
                (f"stream position {self.position}", self.position),
                (f"section '{self.section}'", self.section),
                (f"RAM block '{self.block}'", self.block),
            )
            if value is not None
        ]
        text = self.message
        if where:
            text += f" ({', '.join(where)})"
        if self.hint:
            text += f"; {self.hint}"
        return text


class StreamTruncated(StreamError):
    """The input ended inside an element."""


class StreamCorrupt(StreamError):
    """The bytes contradict the format."""


class StreamUnsupported(StreamError):
    """A valid element that this program does not take."""


class StreamLimit(StreamError):
    """An element asks for more than the limits allow; nothing was allocated for it."""


class ChannelError(MigrationdError):
    """A transport failed; the operating system's error is the ``__cause__``."""


class AddressError(ChannelError):
    """An address cannot be parsed or does not fit its use."""


class ConnectFailed(ChannelError):
    """A connection, file or listener could not be opened."""


class ChannelClosed(ChannelError):
    """A channel ended: the peer went away or it was shut down here."""


class GuestError(MigrationdError):
    """The guest's memory or devices cannot be used as asked."""


class WorkloadGone(GuestError):
    """The process that is the guest has ended."""

    def __init__(self) -> None:
        super().__init__("the workload is gone")


class WorkloadRefused(GuestError):
    """The process that is the guest answered a request with an error."""


class WorkloadSilent(GuestError):
    """The process that is the guest has a request that it did not answer in time."""

    def __init__(self) -> None:
        super().__init__("the workload does not answer")


class MigrationError(MigrationdError):
    """A migration cannot go on."""


class InvalidState(MigrationError):
    """The status or the run state forbids it."""


class PeerFailed(MigrationError):
    """The peer reported a failure."""


class MigrationCancelled(MigrationError):
    """The migration was cancelled on request."""


class StoreError(MigrationdError):
    """A guest at rest cannot be read or written."""


class ObjectError(MigrationdError):
    """An object cannot be made, found or used as asked; the text is QEMU's where it has one."""


class QMPError(MigrationdError):
    """An error reply of the monitor.

    Args:
        desc: Text for the client, verbatim.
        class_: Error class: ``GenericError``, ``CommandNotFound``, ``DeviceNotActive``,
            ``DeviceNotFound`` or ``KVMMissingCap``.
    """

    def __init__(self, desc: str, class_: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.class_ = class_


def forget_frames(error: BaseException) -> None:
    """Let go of what the functions held that an error came through, as pages of a guest.

    For an error that is kept after it was told.

    Args:
        error: The error; so are those that led to it.
    """
    found: list[BaseException | None] = [error]
    seen: set[int] = set()
    while found:
        one = found.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            found += (one.__cause__, one.__context__)
