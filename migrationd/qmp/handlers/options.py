"""Capabilities and parameters."""

from migrationd.migration.bitmap_mapping import BitmapAlias, BitmapMapping, NodeAlias
from migrationd.qmp.command import Invocation
from migrationd.qmp.models.migration import (
    BitmapAliasModel,
    BitmapAliasTransform,
    MigrateSetCapabilities,
    MigrateSetParameters,
    MigrationCapabilityStatus,
    MigrationParameters,
    NodeAliasModel,
)

_FIELDS = {str(field.alias): name for name, field in MigrationParameters.model_fields.items()}
_MAPPING = "block-bitmap-mapping"


def query_capabilities(call: Invocation, _: object) -> list[MigrationCapabilityStatus]:
    """``query-migrate-capabilities``."""
    return [
        MigrationCapabilityStatus.make(state=state, capability=name)
        for name, state in call.control.options.capabilities.items()
    ]


def set_capabilities(call: Invocation, arguments: MigrateSetCapabilities) -> None:
    """``migrate-set-capabilities``: all or nothing; refused while a migration runs."""
    call.control.outgoing.check_capabilities_may_change()
    call.control.options.set_capabilities(
        [(item.capability, item.state) for item in arguments.capabilities]
    )


def query_parameters(call: Invocation, _: object) -> MigrationParameters:
    """``query-migrate-parameters``."""
    values: dict[str, object] = {}
    for name, value in call.control.options.parameters.items():
        values[_FIELDS[name]] = _mapping_models(value) if isinstance(value, tuple) else value
    return MigrationParameters.make(**values)


def set_parameters(call: Invocation, arguments: MigrateSetParameters) -> None:
    """``migrate-set-parameters``: all or nothing, also while a migration runs."""
    given = arguments.model_dump(
        by_alias=True, exclude_unset=True, exclude={"block_bitmap_mapping"}
    )
    for name in arguments.nullable & given.keys():
        given[name] = given[name] or ""
    if "block_bitmap_mapping" in arguments.model_fields_set:
        given[_MAPPING] = _mapping(arguments.block_bitmap_mapping)
    call.control.options.set_parameters(given)
    call.control.outgoing.parameters_changed()


def _mapping(models: list[NodeAliasModel]) -> BitmapMapping:
    return tuple(
        NodeAlias(
            node.node_name,
            node.alias,
            tuple(
                BitmapAlias(
                    bitmap.name,
                    bitmap.alias,
                    bitmap.transform.persistent if bitmap.transform else None,
                    bitmap.transform is not None,
                )
                for bitmap in node.bitmaps
            ),
        )
        for node in models
    )


def _mapping_models(mapping: BitmapMapping) -> list[NodeAliasModel]:
    return [
        NodeAliasModel.make(
            node_name=node.node_name,
            alias=node.alias,
            bitmaps=[
                BitmapAliasModel.make(
                    name=bitmap.name,
                    alias=bitmap.alias,
                    transform=BitmapAliasTransform.make(persistent=bitmap.persistent)
                    if bitmap.has_transform
                    else None,
                )
                for bitmap in node.bitmaps
            ],
        )
        for node in mapping
    ]
