"""Sets of descriptors."""

from migrationd.qmp.models.base import QapiModel, optional


class AddFd(QapiModel):
    """Arguments of ``add-fd``."""

    fdset_id: int = optional()
    opaque: str = optional()


class AddfdInfo(QapiModel):
    """Return of ``add-fd``."""

    fdset_id: int
    fd: int


class RemoveFd(QapiModel):
    """Arguments of ``remove-fd``."""

    fdset_id: int
    fd: int = optional()


class FdsetFdInfo(QapiModel):
    """One descriptor of a set."""

    fd: int
    opaque: str = optional()


class FdsetInfo(QapiModel):
    """One entry of ``query-fdsets``."""

    fdset_id: int
    fds: list[FdsetFdInfo]
