"""Device state as the exact bytes that arrived."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One section that is kept and replayed, not understood.

    Attributes:
        idstr: Handler name.
        instance_id: Instance.
        version_id: Version of the body's format.
        body: The bytes between header and footer.
        kind: Section type: FULL for a device; START, PART or END of a live handler.
        section_id: Id in the stream it came in.
        is_early: It came before RAM contents and has to leave so.
    """

    idstr: str
    instance_id: int
    version_id: int
    body: bytes
    kind: int
    section_id: int
    is_early: bool = False
