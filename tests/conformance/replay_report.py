"""The table of replayed scenarios: ``python -m tests.conformance.replay_report [NAME ...]``.

Plays each recorded script against migrationd and compares what comes back with what QEMU
said. Exit status 1 where a scenario of 11.1 differs without a reason in
``replay_differences``, or has a reason and does not differ.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.conformance.replay_compare import Difference, differences, shape_differences
from tests.conformance.replay_differences import (
    DIFFERENCES,
    GUESTS,
    NOT_APPLICABLE,
    Allowed,
    Why,
)

ROOT = Path(__file__).resolve().parents[2]
RECORDER = ROOT / "tests" / "conformance" / "recorder" / "record.py"
RECORDINGS = ROOT / "tests" / "conformance" / "recordings"
LIMIT_S = 150.0
MIRRORED = "11.1"
VERDICTS = ("identical", "as 11.1", "as decided", "differs", "not applicable")
_DECIDED = set(Why) - {Why.OTHER}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One scenario of one release.

    Attributes:
        scenario: Its name.
        version: The release.
        found: What differs from the recording.
        machineless: What of that is a QEMU's answer that has no machine (``-machine none``).
        is_played: Whether the script came to its end.
        is_newer: Whether something differs from an older release as 11.1 does.
        known: What differs from 11.1 as well, and why.
    """

    scenario: str
    version: str
    found: tuple[Difference, ...]
    machineless: tuple[Difference, ...] = ()
    is_played: bool = True
    is_newer: bool = False
    known: Mapping[tuple[str, str], tuple[Why | None, str]] = field(default_factory=dict)

    @property
    def kinds(self) -> set[Why | None]:
        """Kinds of what differs; None for a difference that nobody explained."""
        return {self.explain(item)[0] for item in self.found}

    def explain(self, item: Difference) -> tuple[Why | None, str]:
        """Kind of a difference, and why it is there."""
        if item in self.machineless:
            return Why.NO_MACHINE, "what QEMU 11.1 says with -machine none"
        if (item.where, item.what) in self.known:
            return self.known[item.where, item.what]
        for allowed in DIFFERENCES.get(self.scenario, ()):
            if allowed.request in item.what:
                return allowed.why, allowed.reason
        return None, "???"

    @property
    def verdict(self) -> str:
        """One of ``VERDICTS``."""
        if not self.is_played:
            return "differs"
        if not self.found:
            return "as 11.1" if self.is_newer else "identical"
        if self.scenario in NOT_APPLICABLE:
            return "not applicable"
        return "as decided" if self.kinds <= _DECIDED else "differs"

    @property
    def is_unexplained(self) -> bool:
        """Whether something differs without a reason."""
        return self.verdict != "not applicable" and (not self.is_played or None in self.kinds)

    @property
    def stale(self) -> list[Allowed]:
        """What may differ, and does not."""
        return [
            allowed
            for allowed in DIFFERENCES.get(self.scenario, ())
            if not any(allowed.request in item.what for item in self.found)
        ]

    def reasons(self) -> list[str]:
        """Why it is not identical, a line each."""
        if self.verdict == "not applicable":
            return [NOT_APPLICABLE[self.scenario]]
        if not self.is_played:
            return ["it was not played to its end"]
        return list(dict.fromkeys(self.explain(item)[1] for item in self.found))


def scenarios(version: str) -> list[str]:
    """Names of the recorded scenarios of a release."""
    return sorted(path.stem for path in (RECORDINGS / version).glob("*.jsonl"))


def launcher(guest: str, *options: str) -> str:
    """The command that stands in for a QEMU."""
    words = [sys.executable, "-m", "tests.conformance.replay_launcher", "--guest", guest, *options]
    return shlex.join(words)


def play(
    scenario: str, directory: Path, *, source: str | None = None, destination: str | None = None
) -> Path:
    """Play a script.

    Args:
        scenario: Its name.
        directory: For the recording and all else.
        source: Command of the source; migrationd by default.
        destination: Command of the destination; as the source by default.

    Returns:
        The recording.
    """
    source = source or launcher(GUESTS.get(scenario, "attached"))
    command = [sys.executable, str(RECORDER), "run", "--only", scenario, "--accel", "tcg"]
    command += ["--qemu", source, "--dst-qemu", destination or source, "--out", str(directory)]
    # The path of a socket is short.
    with tempfile.TemporaryDirectory(prefix="replay") as work:
        subprocess.run(
            [*command, "--workdir", work],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=LIMIT_S,
            check=False,
        )
    return directory / f"{scenario}.jsonl"


def judge(version: str, scenario: str, played: Path) -> Outcome:
    """Compare a played scenario with its recordings."""
    if not played.exists():
        return Outcome(scenario, version, (), is_played=False)
    golden = RECORDINGS / version / f"{scenario}.jsonl"
    if version != MIRRORED:
        mirrored = [RECORDINGS / MIRRORED / f"{scenario}.jsonl"]
        mirrored += _further(MIRRORED, "again", scenario)
        found, ours_alone = shape_differences(golden, played, mirrored)
        newest = judge(MIRRORED, scenario, played)
        return Outcome(
            scenario,
            version,
            tuple(ours_alone),
            is_newer=bool(found),
            known={(item.where, item.what): newest.explain(item) for item in newest.found},
        )
    again = _further(version, "again", scenario)
    found = differences(golden, played, *again)
    real = differences(golden, played, *again, *_further(version, "none", scenario))
    machineless = tuple(item for item in found if item not in real)
    return Outcome(scenario, version, tuple(found), machineless)


def _further(version: str, kind: str, scenario: str) -> list[Path]:
    path = RECORDINGS / f"{version}.{kind}" / f"{scenario}.jsonl"
    return [path] if path.exists() else []


def replay_all(names: Sequence[str], directory: Path, jobs: int) -> None:
    """Play scripts, some at a time: they wait more than they work."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda name: play(name, directory), names))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="replay recorded QMP scenarios")
    parser.add_argument("names", nargs="*", help="scenarios; all of 11.1 by default")
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="print what differs")
    parser.add_argument("--out", type=Path, help="keep the recordings, and take those there are")
    options = parser.parse_args()
    names = options.names or scenarios("11.1")
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.out or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        missing = [name for name in names if not (directory / f"{name}.jsonl").exists()]
        replay_all(missing, directory, options.jobs)
        newest = _print_release("11.1", names, directory, shows_all=options.show)
        for version in ("10.0", "7.2"):
            _print_release(version, names, directory)
    failed = [item for item in newest if item.is_unexplained]
    stale = [(item.scenario, allowed) for item in newest for allowed in item.stale]
    for item in failed:
        sys.stdout.write(f"differs without a reason: {item.scenario}\n")
    for scenario, allowed in stale:
        sys.stdout.write(f"does not differ, remove it: {scenario}: {allowed.request}\n")
    return int(bool(failed or stale))


def _print_release(
    version: str, names: Sequence[str], directory: Path, *, shows_all: bool = False
) -> list[Outcome]:
    known = [name for name in names if name in scenarios(version)]
    outcomes = [judge(version, name, directory / f"{name}.jsonl") for name in known]
    counts = {verdict: sum(i.verdict == verdict for i in outcomes) for verdict in VERDICTS}
    applicable = len(outcomes) - counts["not applicable"]
    sys.stdout.write(f"{version}: {counts}, of {applicable} applicable\n")
    for item in outcomes if version == "11.1" else ():
        if item.verdict != "identical":
            for number, reason in enumerate(item.reasons()):
                head = ("", "") if number else (item.scenario, item.verdict)
                sys.stdout.write(f"  {head[0]:28}{head[1]:16}{reason}\n")
        for difference in item.found if shows_all else ():
            sys.stdout.write(f"      {difference}\n")
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
