"""The guest of a daemon, of either kind."""

from migrationd.guest.attached import AttachedGuest
from migrationd.guest.parked import ParkedGuest

HeldGuest = ParkedGuest | AttachedGuest
"""Engines treat both alike; what only one of them can do is behind ``live`` and ``file``."""
