"""Where Python has zstd: in its library from 3.14 on, in ``backports.zstd`` before."""

import sys

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["zstd"]
