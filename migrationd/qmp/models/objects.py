"""User-made objects and the object tree.

``qom`` is the type that ``qom-list`` shows for a property, where it is not the plain one,
``initial`` what the property is when it was not given.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from migrationd.qmp.models.base import QapiModel, QapiUnion, optional, required

Policy = Literal["deny", "allow"]


class ObjectBase(QapiModel):
    """What every object has."""

    qom_type: Literal[
        "authz-list",
        "authz-simple",
        "iothread",
        "secret",
        "tls-creds-anon",
        "tls-creds-psk",
        "tls-creds-x509",
    ]
    id: str


class AuthzRule(QapiModel):
    """Whom an ``authz-list`` lets in."""

    match: str
    policy: Policy
    format: Literal["exact", "glob"] = optional()


class AuthzListMembers(QapiModel):
    """Properties of an ``authz-list``."""

    policy: Policy = optional(qom="QAuthZListPolicy", initial="deny")
    rules: list[AuthzRule] = optional(qom="QAuthZListRule", initial=[])


class AuthzSimpleMembers(QapiModel):
    """Properties of an ``authz-simple``."""

    identity: str


class IothreadMembers(QapiModel):
    """Properties of an ``iothread``."""

    aio_max_batch: int = optional(initial=0)
    thread_pool_min: int = optional(initial=0)
    thread_pool_max: int = optional(initial=64)
    poll_max_ns: int = optional(initial=32768)
    poll_grow: int = optional(initial=2)
    poll_shrink: int = optional(initial=2)
    poll_weight: int = optional(initial=3)


class SecretMembers(QapiModel):
    """Properties of a ``secret``."""

    format: Literal["raw", "base64"] = optional(qom="QCryptoSecretFormat", initial="raw")
    keyid: str = optional()
    iv: str = optional()
    data: str = optional()
    file: str = optional()


class TlsCredsMembers(QapiModel):
    """Properties of all TLS credentials."""

    verify_peer: bool = optional(initial=True)
    dir: str = optional()
    endpoint: Literal["client", "server"] = optional(
        qom="QCryptoTLSCredsEndpoint", initial="client"
    )
    priority: str = optional()


class TlsCredsPskMembers(TlsCredsMembers):
    """Properties of ``tls-creds-psk``."""

    username: str = optional()


class TlsCredsX509Members(TlsCredsMembers):
    """Properties of ``tls-creds-x509``."""

    sanity_check: bool = optional(initial=True)
    passwordid: str = optional()


class AuthzListOptions(ObjectBase, AuthzListMembers):
    """Object: decides about names by a list of rules."""

    qom_type: Literal["authz-list"]


class AuthzSimpleOptions(ObjectBase, AuthzSimpleMembers):
    """Object: lets one name in."""

    qom_type: Literal["authz-simple"]


class IothreadOptions(ObjectBase, IothreadMembers):
    """Object: a thread for devices, which nothing here has."""

    qom_type: Literal["iothread"]


class SecretOptions(ObjectBase, SecretMembers):
    """Object: a password or key."""

    qom_type: Literal["secret"]


class TlsCredsAnonOptions(ObjectBase, TlsCredsMembers):
    """Object: TLS without identities."""

    qom_type: Literal["tls-creds-anon"]


class TlsCredsPskOptions(ObjectBase, TlsCredsPskMembers):
    """Object: TLS with pre-shared keys."""

    qom_type: Literal["tls-creds-psk"]


class TlsCredsX509Options(ObjectBase, TlsCredsX509Members):
    """Object: TLS with certificates."""

    qom_type: Literal["tls-creds-x509"]


ObjectOptions = Annotated[
    AuthzListOptions
    | AuthzSimpleOptions
    | IothreadOptions
    | SecretOptions
    | TlsCredsAnonOptions
    | TlsCredsPskOptions
    | TlsCredsX509Options,
    Field(discriminator="qom_type"),
    QapiUnion(
        ObjectBase,
        "qom-type",
        {
            "authz-list": AuthzListMembers,
            "authz-simple": AuthzSimpleMembers,
            "iothread": IothreadMembers,
            "secret": SecretMembers,
            "tls-creds-anon": TlsCredsMembers,
            "tls-creds-psk": TlsCredsPskMembers,
            "tls-creds-x509": TlsCredsX509Members,
        },
    ),
]

OBJECT_MEMBERS: dict[str, type[QapiModel]] = {
    "authz-list": AuthzListMembers,
    "authz-simple": AuthzSimpleMembers,
    "iothread": IothreadMembers,
    "secret": SecretMembers,
    "tls-creds-anon": TlsCredsMembers,
    "tls-creds-psk": TlsCredsPskMembers,
    "tls-creds-x509": TlsCredsX509Members,
}
"""Type to its properties."""


class ObjectId(QapiModel):
    """Arguments of ``object-del``."""

    id: str


class QomPath(QapiModel):
    """Arguments of ``qom-list``."""

    path: str


class QomProperty(QapiModel):
    """Arguments of ``qom-get``."""

    path: str
    property: str


class QomSet(QapiModel):
    """Arguments of ``qom-set``."""

    nullable = frozenset(("value",))

    path: str
    property: str
    value: Any = required()


class QomPaths(QapiModel):
    """Arguments of ``qom-list-get``."""

    paths: list[str]


class ObjectPropertyInfo(QapiModel):
    """A property of an object or of a type."""

    name: str
    type: str
    description: str = optional()
    default_value: Any = optional(since="5.0")


class ObjectPropertyValue(QapiModel):
    """A property with its value."""

    name: str
    type: str
    value: Any = optional()


class ObjectPropertiesValues(QapiModel):
    """One entry of ``qom-list-get``."""

    properties: list[ObjectPropertyValue]


class QomListTypes(QapiModel):
    """Arguments of ``qom-list-types``."""

    implements: str = optional()
    abstract: bool = optional()


class ObjectTypeInfo(QapiModel):
    """One entry of ``qom-list-types``."""

    name: str
    abstract: bool = optional()
    parent: str = optional()


class TypeName(QapiModel):
    """Arguments of ``qom-list-properties`` and ``device-list-properties``."""

    typename: str
