"""Pairs of peers, and how their figures stand beside those of QEMU -> QEMU."""

from benchmarks.measure import Sample, median

Pair = tuple[str, str]

BASE: Pair = ("QEMU", "QEMU")
PAIRS: tuple[Pair, ...] = (
    BASE,
    ("QEMU", "migrationd"),
    ("migrationd", "QEMU"),
    ("migrationd", "migrationd"),
)
QUIET_CPUS = 0.15


def rate(taken: list[Sample], base: list[Sample], memory_mib: int, goal: float | None) -> str:
    """GB/s of guest RAM; with a goal also the ratio to the base's, least and most behind it."""
    text = f"{median((memory_mib << 20) / item.wall_s / 1e9 for item in taken):.2f}"
    if goal is None:
        return text
    ratios = [b.wall_s / a.wall_s for a, b in zip(taken, base, strict=True)]
    text += f"  x {median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
    return text + verdict(median(ratios) >= goal)


def cost(taken: list[float], base: list[float], goal: float, *, ours: bool) -> str:
    """CPU seconds, and their ratio to QEMU's where they are ours."""
    text = f"{median(taken):.2f}"
    if not ours:
        return text
    ratio = median(a / max(b, 0.01) for a, b in zip(taken, base, strict=True))
    return f"{text}  x {ratio:.2f}{verdict(ratio <= goal)}"


def costs(
    pair: Pair, taken: list[Sample], base: list[Sample], goals: tuple[float, float]
) -> tuple[str, str]:
    """The cost at the source and at the destination, beside the same end of the base."""
    here, there = (kind == "migrationd" for kind in pair)
    return (
        cost([s.source_cpu_s for s in taken], [s.source_cpu_s for s in base], goals[0], ours=here),
        cost(
            [s.destination_cpu_s for s in taken],
            [s.destination_cpu_s for s in base],
            goals[1],
            ours=there,
        ),
    )


def verdict(is_met: bool) -> str:
    """How a figure compares with its goal."""
    return " ok" if is_met else " --"


def warn_if_busy(others: list[float]) -> None:
    """Say that the figures are worth little, if they are.

    Args:
        others: CPUs that everything else on the machine used, measurement by measurement.
    """
    if median(others) > QUIET_CPUS:
        print(f"not a quiet machine: others used {median(others):.2f} CPUs: "
              "repeat before you judge")  # fmt: skip
