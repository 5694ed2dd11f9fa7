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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.replay_compare import differences
from tests.conformance.replay_differences import DIFFERENCES, NOT_APPLICABLE, PARKED_GUEST

ROOT = Path(__file__).resolve().parents[2]
RECORDER = ROOT / "tests" / "conformance" / "recorder" / "record.py"
RECORDINGS = ROOT / "tests" / "conformance" / "recordings"
LIMIT_S = 150.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One scenario of one release.

    Attributes:
        scenario: Its name.
        found: What differs, a text each.
    """

    scenario: str
    found: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """``identical``, ``differs`` or ``not applicable``."""
        if self.scenario in NOT_APPLICABLE:
            return "not applicable"
        return "differs" if self.found else "identical"

    @property
    def reason(self) -> str:
        """Why it may differ; empty if nobody said."""
        return NOT_APPLICABLE.get(self.scenario) or DIFFERENCES.get(self.scenario, "")

    @property
    def is_unexplained(self) -> bool:
        """Whether it differs without a reason."""
        return self.verdict == "differs" and not self.reason


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
    source = source or launcher("parked" if scenario in PARKED_GUEST else "attached")
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
    """Compare a played scenario with its recording."""
    if not played.exists():
        return Outcome(scenario, ("it was not played to its end",))
    golden = RECORDINGS / version / f"{scenario}.jsonl"
    return Outcome(scenario, tuple(differences(golden, played)))


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
    out = sys.stdout
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.out or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        missing = [name for name in names if not (directory / f"{name}.jsonl").exists()]
        replay_all(missing, directory, options.jobs)
        failed = 0
        for version in ("11.1", "10.0", "7.2"):
            known = [name for name in names if name in scenarios(version)]
            outcomes = [judge(version, name, directory / f"{name}.jsonl") for name in known]
            counts = {
                verdict: sum(item.verdict == verdict for item in outcomes)
                for verdict in ("identical", "differs", "not applicable")
            }
            out.write(f"{version}: {counts}\n")
            if version != "11.1":
                continue
            for item in outcomes:
                if item.verdict != "identical":
                    out.write(f"  {item.scenario:28}{item.verdict:16}{item.reason or '???'}\n")
                for text in item.found if options.show else ():
                    out.write(f"      {text}\n")
            failed = sum(item.is_unexplained for item in outcomes)
            stale = [item for item in outcomes if item.verdict == "identical" and item.reason]
            for item in stale:
                out.write(f"  {item.scenario:28}identical, remove its reason\n")
    return int(failed or bool(stale))


if __name__ == "__main__":
    sys.exit(main())
