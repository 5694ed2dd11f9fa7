"""What the machine's memory has to give.

Reference: ``/proc/meminfo`` of ``proc(5)``.
"""


def available_bytes() -> int:
    """Memory that new use can have without swapping; 0 if the kernel does not tell."""
    with open("/proc/meminfo") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0
