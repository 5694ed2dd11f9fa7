"""What a process imports whose memory and devices migrate; the standard library suffices."""

from migrationd.workload.client import Workload
from migrationd.workload.fields import (
    array,
    boolean,
    buffer,
    equal,
    i8,
    i16,
    i32,
    i64,
    struct,
    u8,
    u16,
    u32,
    u64,
    varray,
)
from migrationd.workload.vmstate import Subsection, VMState, subsection

__all__ = (
    "Subsection",
    "VMState",
    "Workload",
    "array",
    "boolean",
    "buffer",
    "equal",
    "i8",
    "i16",
    "i32",
    "i64",
    "struct",
    "subsection",
    "u8",
    "u16",
    "u32",
    "u64",
    "varray",
)
