"""Device state as the exact bytes that arrived."""

from dataclasses import dataclass

from migrationd.codec.constants import QEMU_VM_SECTION_FULL, QEMU_VM_SECTION_START
from migrationd.codec.records import OpaqueSection


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

    @classmethod
    def of_section(cls, section: OpaqueSection, *, in_setup: bool) -> "DeviceState":
        """What is kept of a section; ``in_setup`` if it came before RAM contents.

        Only a whole one belongs to the setup phase: in a pass over RAM another live handler
        may have its turn before RAM has.
        """
        return cls(
            section.idstr,
            section.instance_id,
            section.version_id,
            section.body,
            section.kind,
            section.section_id,
            is_early=in_setup and section.kind == QEMU_VM_SECTION_FULL,
        )

    def to_section(self, *, has_footer: bool = True) -> OpaqueSection:
        """The section again."""
        return OpaqueSection(
            self.kind,
            self.section_id,
            self.idstr,
            self.instance_id,
            self.version_id,
            self.body,
            has_footer,
        )

    @property
    def is_device(self) -> bool:
        """Whether it is a device as it stands at the switchover: whole, after all RAM."""
        return self.kind == QEMU_VM_SECTION_FULL and not self.is_early

    @property
    def is_of_setup(self) -> bool:
        """Whether it belongs to the setup phase."""
        return self.is_early or self.kind == QEMU_VM_SECTION_START
