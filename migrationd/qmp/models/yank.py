"""What can be cut off."""

from typing import Annotated, Literal

from pydantic import Field

from migrationd.qmp.models.base import QapiModel, QapiUnion


class YankBase(QapiModel):
    """What every instance has."""

    type: Literal["block-node", "chardev", "migration"]


class YankBlockMembers(QapiModel):
    """The connection of a block node."""

    node_name: str


class YankChardevMembers(QapiModel):
    """The connection of a character device."""

    id: str


class YankBlockNode(YankBlockMembers):
    """The connection of a block node."""

    type: Literal["block-node"]


class YankChardev(YankChardevMembers):
    """The connection of a character device."""

    type: Literal["chardev"]


class YankMigration(QapiModel):
    """The connections of the migration."""

    type: Literal["migration"]


YankInstance = Annotated[
    YankBlockNode | YankChardev | YankMigration,
    Field(discriminator="type"),
    QapiUnion(YankBase, "type", {"block-node": YankBlockMembers, "chardev": YankChardevMembers}),
]


class Yank(QapiModel):
    """Arguments of ``yank``."""

    instances: list[YankInstance]
