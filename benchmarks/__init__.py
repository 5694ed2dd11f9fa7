"""Rates and costs beside a real QEMU, measured in one run: ``make bench``."""
