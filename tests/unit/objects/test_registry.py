import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from migrationd.errors import ObjectError
from migrationd.objects.authorization import Authorization
from migrationd.objects.registry import ObjectRegistry
from migrationd.objects.secret import Secret
from tests.support.certificates import make_authority, make_directory, make_leaf, write_directory

Refusal = Callable[..., str]


@pytest.fixture
def registry() -> ObjectRegistry:
    return ObjectRegistry()


@pytest.fixture
def refusal(registry: ObjectRegistry) -> Refusal:
    def text_of(qom_type: str, object_id: str = "new", **properties: object) -> str:
        named = {name.replace("_", "-"): value for name, value in properties.items()}
        with pytest.raises(ObjectError) as caught:
            registry.add(qom_type, object_id, named)
        assert registry.find(object_id) is None or object_id == "taken"
        return str(caught.value)

    return text_of


def test_ids_are_in_the_order_of_making(registry: ObjectRegistry) -> None:
    for name in ("z", "a", "m"):
        registry.add("secret", name, {"data": name})
    registry.delete("a")
    assert list(registry) == ["z", "m"]
    found = registry.find("m")
    assert found is not None
    assert found.properties == {"data": "m"}
    with pytest.raises(ObjectError, match=r"^object 'a' not found$"):
        registry.delete("a")


def test_ids_and_types_are_refused_in_qemus_words(
    registry: ObjectRegistry, refusal: Refusal
) -> None:
    registry.add("secret", "taken", {"data": "x"})
    assert refusal("secret", "1b", data="x") == "Parameter 'id' expects an identifier"
    assert refusal("quark") == "Parameter 'qom-type' does not accept value 'quark'"
    assert refusal("secret", "taken", data="y") == (
        "attempt to add duplicate property 'taken' to object (type 'container')"
    )


def test_secrets(registry: ObjectRegistry, refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from a file")
    registry.add("secret", "file", {"file": str(tmp_path / "file")})
    registry.add("secret", "base64", {"data": "aGFsbG8=\n", "format": "base64"})
    assert _data(registry, "file") == b"from a file"
    assert _data(registry, "base64") == b"hallo"
    assert refusal("secret") == "Either 'file' or 'data' must be provided"
    assert refusal("secret", data="x", file="y") == "'file' and 'data' are mutually exclusive"
    assert refusal("secret", file="/none/such") == (
        "Unable to read /none/such: Failed to open file “/none/such”: No such file or directory"
    )
    assert refusal("secret", data="!!", format="base64") == (
        "Base64 data contains invalid characters"
    )
    assert refusal("secret", data="x", keyid="none") == "No secret with id 'none'"
    assert refusal("secret", data="x", keyid="file") == "Key should be 32 bytes in length"


def test_a_secret_may_be_encrypted_with_another(registry: ObjectRegistry, refusal: Refusal) -> None:
    key, iv = bytes(range(32)), bytes(range(16))
    padder = PKCS7(128).padder()
    padded = padder.update(b"the password") + padder.finalize()
    encryptor = Cipher(algorithms.AES256(key), modes.CBC(iv)).encryptor()
    sealed = base64.b64encode(encryptor.update(padded) + encryptor.finalize()).decode()
    registry.add("secret", "key", {"data": base64.b64encode(key).decode(), "format": "base64"})
    registry.add("secret", "other", {"data": "k" * 32})
    given = {"data": sealed, "format": "base64", "keyid": "key"}
    registry.add("secret", "sealed", {**given, "iv": base64.b64encode(iv).decode()})
    assert _data(registry, "sealed") == b"the password"
    assert refusal("secret", **given) == "IV is required to decrypt secret"
    assert refusal("secret", **given, iv="aaaa") == "IV should be 16 bytes in length not 3"
    wrong = {**given, "keyid": "other", "iv": base64.b64encode(iv).decode()}
    assert refusal("secret", **wrong).startswith("Incorrect number of padding bytes")


def test_authorization(registry: ObjectRegistry, refusal: Refusal) -> None:
    registry.add("authz-simple", "one", {"identity": "CN=a"})
    rules = [
        {"match": "CN=bad*", "policy": "deny", "format": "glob"},
        {"match": "CN=b*", "policy": "allow", "format": "glob"},
        {"match": "CN=c*", "policy": "allow"},
        {"match": "CN=vm[1]?", "policy": "allow", "format": "glob"},
    ]
    registry.add("authz-list", "many", {"rules": rules})
    registry.add("authz-list", "open", {"policy": "allow"})
    registry.add("authz-list", "closed", {})
    asked = {name: _asker(registry, name) for name in ("one", "many", "open", "closed")}
    assert [asked["one"](text) for text in ("CN=a", "CN=ab")] == [True, False]
    texts = ("CN=bad1", "CN=bee", "CN=cat", "CN=c*", "x", "CN=vm[1]a", "CN=vm1a")
    assert [asked["many"](text) for text in texts] == [False, True, False, True, False, True, False]
    assert asked["open"]("x")
    assert not asked["closed"]("x")
    assert refusal("authz-simple") == "Parameter 'identity' is missing"
    assert refusal("authz-list", rules=[{"match": "x", "policy": "maybe"}]) == (
        "Parameter 'policy' does not accept value 'maybe'"
    )


def test_credentials_are_found_for_the_right_end(registry: ObjectRegistry, tmp_path: Path) -> None:
    directory = str(make_directory(tmp_path / "pki"))
    registry.add("tls-creds-x509", "out", {"dir": directory})
    registry.add("tls-creds-x509", "in", {"dir": directory, "endpoint": "server"})
    registry.add("secret", "other", {"data": "x"})
    registry.add("tls-creds-anon", "anybody", {})
    assert registry.tls_client("out", "here").host == "here"
    assert registry.tls_server("in", None).authorize is None
    for name, text in (
        ("none", "No TLS credentials with id 'none'"),
        ("other", "Object with id 'other' is not TLS credentials"),
        ("in", "Expected TLS credentials for a client endpoint"),
        ("anybody", "anonymous TLS credentials authenticate nobody"),
    ):
        with pytest.raises(ObjectError, match=f"^{text}"):
            registry.tls_client(name, None)
    with pytest.raises(ObjectError, match="Cannot find authorization object 'who'"):
        registry.tls_server("in", "who")


def test_certificates_that_cannot_serve_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    authority, other = make_authority(), make_authority("Other CA")
    leaf = make_leaf(authority, "server", is_server=True)
    past = make_leaf(authority, "server", is_server=True, days=(-9, -1))
    future = make_leaf(authority, "server", is_server=True, days=(1, 9))
    alone = make_leaf(None, "server", is_server=True)
    d = write_directory(tmp_path / "none", authority)
    x509 = "tls-creds-x509"
    server = {"endpoint": "server"}
    assert refusal(x509) == "Missing 'dir' property value"
    assert refusal(x509, dir="/none/such") == (
        "Unable to access credentials /none/such/ca-cert.pem: No such file or directory"
    )
    assert refusal(x509, dir=str(d), **server) == (
        f"Missing server cert '{d}/server-cert.pem' & key '{d}/server-key.pem'"
    )
    for trusted, own, expected in (
        (authority, past, "The server certificate {d}/server-cert.pem has expired"),
        (authority, future, "The server certificate {d}/server-cert.pem is not yet active"),
        (other, leaf, "Cert 'O=migrationd tests,CN=server' has no issuer in CA chain"),
        (
            authority,
            alone,
            "Our own certificate {d}/server-cert.pem failed validation against {d}/ca-cert.pem: "
            "The certificate hasn't got a known issuer",
        ),
        (leaf, leaf, "The certificate {d}/ca-cert.pem basic constraints do not show a CA"),
        (
            authority,
            authority,
            "The certificate {d}/server-cert.pem basic constraints show a CA, but we need one "
            "for a server",
        ),
    ):
        d = write_directory(tmp_path / "pki", trusted, server=own)
        assert refusal(x509, dir=str(d), **server) == expected.format(d=d)
    (d / "ca-cert.pem").write_text("nothing of the kind")
    assert refusal(x509, dir=str(d)) == (
        f"Unable to import certificate {d}/ca-cert.pem: No certificate was found."
    )


def test_an_encrypted_key_needs_its_password(
    registry: ObjectRegistry, refusal: Refusal, tmp_path: Path
) -> None:
    authority = make_authority()
    leaf = make_leaf(authority, "server", is_server=True)
    d = str(write_directory(tmp_path, authority, server=leaf, password=b"geheim"))
    registry.add("secret", "right", {"data": "geheim"})
    registry.add("secret", "wrong", {"data": "falsch"})
    given = {"dir": d, "endpoint": "server"}
    registry.add("tls-creds-x509", "with", {**given, "passwordid": "right"})
    unreadable = f"Unable to import private key {d}/server-key.pem"
    assert refusal("tls-creds-x509", **given) == unreadable
    assert refusal("tls-creds-x509", **given, passwordid="wrong") == unreadable
    assert refusal("tls-creds-x509", **given, passwordid="none") == "No secret with id 'none'"
    other = make_directory(tmp_path / "other")
    (other / "server-key.pem").rename(tmp_path / "server-key.pem")
    assert refusal("tls-creds-x509", **given) == (
        f"Cannot set certificate '{d}/server-cert.pem' & key '{d}/server-key.pem': "
        f"The certificate and the given key do not match."
    )


def test_a_check_can_be_left_out(registry: ObjectRegistry, tmp_path: Path) -> None:
    authority = make_authority()
    past = make_leaf(authority, "server", is_server=True, days=(-9, -1))
    d = str(write_directory(tmp_path, authority, server=past))
    registry.add("tls-creds-x509", "s", {"dir": d, "endpoint": "server", "sanity-check": False})
    assert registry.find("s") is not None


def test_priorities_choose_versions_or_are_refused(
    registry: ObjectRegistry, tmp_path: Path
) -> None:
    d = str(make_directory(tmp_path))
    for name, priority, versions in (
        ("a", "NORMAL:-VERS-TLS1.3", ("TLSv1_2", "TLSv1_2")),
        ("b", "NORMAL:-VERS-ALL:+VERS-TLS1.3", ("TLSv1_3", "TLSv1_3")),
        ("c", "@SYSTEM:-VERS-TLS1.0", ("TLSv1_2", "TLSv1_3")),
    ):
        registry.add("tls-creds-x509", name, {"dir": d, "priority": priority})
        context = registry.tls_client(name, None).context
        assert (context.minimum_version.name, context.maximum_version.name) == versions
    for name, priority in (("d", "quatsch"), ("e", "NORMAL:-VERS-ALL"), ("f", "NORMAL:+CHACHA20")):
        registry.add("tls-creds-x509", name, {"dir": d, "priority": priority})
        with pytest.raises(ObjectError, match=r"Unable to set TLS session priority"):
            registry.tls_client(name, None)


def test_keys_of_psk(registry: ObjectRegistry, refusal: Refusal, tmp_path: Path) -> None:
    psk = "tls-creds-psk"
    d = str(tmp_path)
    assert refusal(psk) == "Missing 'dir' property value"
    assert refusal(psk, dir=d) == (
        f"Unable to access credentials {d}/keys.psk: No such file or directory"
    )
    (tmp_path / "keys.psk").write_text("other:00ff\n")
    assert refusal(psk, dir=d) == f"Username qemu not found in PSK file {d}/keys.psk"
    assert refusal(psk, dir=d, endpoint="server", username="x") == (
        "username should not be set when endpoint=server"
    )
    registry.add(psk, "p", {"dir": d, "username": "other"})
    (tmp_path / "keys.psk").write_text("qemu:0g\n")
    assert refusal(psk, dir=d) == f"PSK file {d}/keys.psk, line 1: expected user:hexkey"


def _data(registry: ObjectRegistry, name: str) -> bytes:
    secret = registry.find(name)
    assert isinstance(secret, Secret)
    return secret.data


def _asker(registry: ObjectRegistry, name: str) -> Callable[[str], bool]:
    found = registry.find(name)
    assert isinstance(found, Authorization)
    return found.is_allowed
