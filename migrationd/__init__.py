"""A live-migration endpoint that speaks QMP and QEMU's migration stream."""

__version__ = "0.1.0"
