"""Arguments of commands of old releases."""

from migrationd.qmp.models.base import QapiModel, required


class Speed(QapiModel):
    """Arguments of ``migrate_set_speed``."""

    value: int = required(unit="bytes/second")


class Downtime(QapiModel):
    """Arguments of ``migrate_set_downtime``."""

    value: float = required(unit="s")


class CacheSize(QapiModel):
    """Arguments of ``migrate-set-cache-size``."""

    value: int = required(unit="bytes")
