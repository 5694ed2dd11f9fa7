"""The example workload as a child process."""

from migrationd.ctl.dirtier_process import PROGRAM, DirtierProcess, Progress

__all__ = ("PROGRAM", "DirtierProcess", "Progress")
