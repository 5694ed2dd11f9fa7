import json

import pytest

from migrationd.errors import ObjectError
from migrationd.objects.authorization import Authorization
from migrationd.objects.option import add_from_option
from migrationd.objects.registry import ObjectRegistry

RULES = [{"match": "CN=a,O=b", "policy": "allow"}, {"match": "x", "policy": "deny"}]


@pytest.mark.parametrize(
    "text",
    [
        "authz-list,id=z,rules.0.match=CN=a,,O=b,rules.0.policy=allow,"
        "rules.1.match=x,rules.1.policy=deny",
        json.dumps({"qom-type": "authz-list", "id": "z", "rules": RULES}),
        "qom-type=authz-list,id=z,rules.1.match=x,rules.1.policy=deny,"
        "rules.0.match=CN=a,,O=b,rules.0.policy=allow",
    ],
)
def test_both_forms_make_the_same_object(text: str) -> None:
    registry = ObjectRegistry()
    add_from_option(registry, text)
    made = registry.find("z")
    assert isinstance(made, Authorization)
    assert made.properties == {"rules": RULES}
    assert made.is_allowed("CN=a,O=b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("secret", "Parameter 'id' is missing"),
        ("id=x,data=y", "Parameter 'qom-type' is missing"),
        ("secret,id=x,data", "Expected '=' after parameter 'data'"),
        ("secret,id=x,colour=red", "Parameter 'colour' is unexpected"),
        ("tls-creds-x509,id=x,verify-peer=maybe", "Parameter 'verify-peer' expects 'on' or 'off'"),
        ("authz-list,id=x,rules.1.match=a", "Parameter 'rules' has a gap in its numbers"),
        ('{"qom-type": "secret", "id": 5}', "Invalid parameter type for 'id', expected: string"),
        (
            '{"qom-type": "secret", "id": "x", "data": 5}',
            "Invalid parameter type for 'data', expected: string",
        ),
        (
            '{"qom-type": "tls-creds-x509", "id": "x", "verify-peer": "on"}',
            "Invalid parameter type for 'verify-peer', expected: boolean",
        ),
        ('{"qom-type"', "not JSON: "),
    ],
)
def test_mistakes_are_told(text: str, message: str) -> None:
    with pytest.raises(ObjectError) as caught:
        add_from_option(ObjectRegistry(), text)
    assert str(caught.value).startswith(message)
