"""The objects of this process, by id.

Reference: ``object-add``, ``object-del`` and ``-object`` of QEMU, texts of 11.1.
"""

from collections.abc import Callable, Iterator
from functools import partial

from migrationd.errors import ObjectError
from migrationd.objects.authorization import Authorization, AuthzList, AuthzSimple
from migrationd.objects.base import FindObject, Properties, UserObject, is_identifier
from migrationd.objects.credentials import AnonymousCredentials, TlsCredentials
from migrationd.objects.iothread import IoThread
from migrationd.objects.psk import PskCredentials
from migrationd.objects.secret import Secret
from migrationd.transport.tls_settings import TlsClient, TlsServer


def _make_x509(properties: Properties, find: FindObject) -> UserObject:
    # Its imports take their time, and few need it.
    from migrationd.objects.x509 import X509Credentials

    return X509Credentials(properties, find)


def _make_iothread(object_id: str, properties: Properties, find: FindObject) -> UserObject:
    return IoThread(object_id, properties)


_MAKERS: dict[str, Callable[[Properties, FindObject], UserObject]] = {
    "authz-list": lambda properties, _: AuthzList(properties),
    "authz-simple": lambda properties, _: AuthzSimple(properties),
    "secret": Secret,
    "tls-creds-anon": lambda properties, _: AnonymousCredentials(properties),
    "tls-creds-psk": lambda properties, _: PskCredentials(properties),
    "tls-creds-x509": _make_x509,
}

OBJECT_TYPES = tuple(sorted((*_MAKERS, "iothread")))
"""Names of the types that can be made."""

OBJECTS_LIMIT = 10_000


class ObjectRegistry:
    """Objects by id, in the order in which they were made."""

    def __init__(self) -> None:
        self._objects: dict[str, UserObject] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._objects)

    def add(self, qom_type: str, object_id: str, properties: Properties) -> None:
        """Make an object.

        Raises:
            ObjectError: With QEMU's text.
        """
        if not is_identifier(object_id):
            raise ObjectError("Parameter 'id' expects an identifier")
        make = _MAKERS.get(qom_type)
        if qom_type == "iothread":
            make = partial(_make_iothread, object_id)
        if make is None:
            raise ObjectError(f"Parameter 'qom-type' does not accept value '{qom_type}'")
        if object_id in self._objects:
            raise ObjectError(
                f"attempt to add duplicate property '{object_id}' to object (type 'container')"
            )
        if len(self._objects) >= OBJECTS_LIMIT:
            raise ObjectError(f"there are {OBJECTS_LIMIT} objects already")
        self._objects[object_id] = make(properties, self.find)

    def delete(self, object_id: str) -> None:
        """Forget an object; who uses it keeps what it needs.

        Raises:
            ObjectError: There is none.
        """
        found = self._objects.pop(object_id, None)
        if found is None:
            raise ObjectError(f"object '{object_id}' not found")
        found.close()

    def find(self, object_id: str) -> UserObject | None:
        """The object of an id."""
        return self._objects.get(object_id)

    def tls_client(self, credentials_id: str, host: str | None) -> TlsClient:
        """TLS of the connecting side.

        Args:
            credentials_id: Id of client credentials.
            host: Name that the server's certificate must be for; None takes the address's.

        Raises:
            ObjectError: There are none of this id, or they cannot be used.
        """
        credentials = self._credentials(credentials_id, is_server=False)
        return TlsClient(
            credentials.context(), credentials.checks_names, host, credentials.why_refused
        )

    def tls_server(self, credentials_id: str, authorization_id: str | None) -> TlsServer:
        """TLS of the listening side.

        Args:
            credentials_id: Id of server credentials.
            authorization_id: Id of the object that is asked about clients; None asks nobody.

        Raises:
            ObjectError: There are none of this id, or they cannot be used.
        """
        credentials = self._credentials(credentials_id, is_server=True)
        authorize = None
        if authorization_id is not None:
            authorization = self.find(authorization_id)
            if not isinstance(authorization, Authorization):
                raise ObjectError(f"Cannot find authorization object '{authorization_id}'")
            authorize = partial(_authorize, authorization)
        return TlsServer(credentials.context(), authorize, credentials.why_refused)

    def _credentials(self, credentials_id: str, *, is_server: bool) -> TlsCredentials:
        credentials = self.find(credentials_id)
        if credentials is None:
            raise ObjectError(f"No TLS credentials with id '{credentials_id}'")
        if not isinstance(credentials, TlsCredentials):
            raise ObjectError(f"Object with id '{credentials_id}' is not TLS credentials")
        if credentials.is_server != is_server:
            end = "server" if is_server else "client"
            raise ObjectError(f"Expected TLS credentials for a {end} endpoint")
        return credentials


def _authorize(authorization: Authorization, certificate: bytes | None) -> None:
    from migrationd.objects.certificates import name_of

    name = name_of(certificate) if certificate is not None else ""
    if not authorization.is_allowed(name):
        raise ObjectError(f"TLS x509 authz check for {name} is denied")
