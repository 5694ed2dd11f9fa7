"""Negotiation and the order of request checks."""

import pytest

from migrationd.errors import QMPError
from migrationd.qmp.json_reader import JsonValue
from migrationd.qmp.session import UNSET, Request, RequestError, Session, failure, success
from migrationd.qmp.version import VERSION


def negotiated() -> Session:
    session = Session(VERSION)
    session.negotiate([])
    return session


def test_greeting_has_the_version_and_the_capabilities() -> None:
    greeting = Session(VERSION).greeting()
    assert greeting == {"QMP": {"version": VERSION, "capabilities": []}}


@pytest.mark.parametrize(
    ("value", "text", "request_id"),
    [
        ([], "QMP input must be a JSON object", UNSET),
        (5, "QMP input must be a JSON object", UNSET),
        ({}, "QMP input lacks member 'execute'", UNSET),
        ({"id": 1}, "QMP input lacks member 'execute'", 1),
        ({"execute": 1, "id": None}, "QMP input member 'execute' must be a string", None),
        (
            {"execute": "x", "arguments": None},
            "QMP input member 'arguments' must be an object",
            UNSET,
        ),
        ({"execute": "x", "bogus": 1}, "QMP input member 'bogus' is unexpected", UNSET),
        ({"exec-oob": "x"}, "QMP input member 'exec-oob' is unexpected", UNSET),
    ],
)
def test_malformed_requests(value: object, text: str, request_id: object) -> None:
    with pytest.raises(RequestError) as caught:
        negotiated().check_request(value)
    assert caught.value.error.desc == text
    assert caught.value.id == request_id


def test_only_negotiation_before_it_and_never_again_after() -> None:
    session = Session(VERSION)
    with pytest.raises(RequestError, match="Expecting capabilities negotiation") as caught:
        session.check_request({"execute": "query-status"})
    assert caught.value.error.class_ == "CommandNotFound"
    assert session.check_request({"execute": "qmp_capabilities"}).command == "qmp_capabilities"
    session.negotiate([])
    with pytest.raises(RequestError, match="already complete"):
        session.check_request({"execute": "qmp_capabilities"})


def test_id_is_echoed_whatever_it_is() -> None:
    request = negotiated().check_request({"execute": "stop", "id": {"a": [None]}})
    assert request == Request("stop", {}, {"a": [None]})
    assert success(request.id, {}) == {"return": {}, "id": {"a": [None]}}
    assert "id" not in success(UNSET, {})
    assert "id" not in failure(UNSET, QMPError("x"))


def test_out_of_band_has_to_be_enabled() -> None:
    session = Session(VERSION, ("oob",))
    assert session.greeting()["QMP"] == {"version": VERSION, "capabilities": ["oob"]}
    with pytest.raises(QMPError, match="Capability oob not available"):
        Session(VERSION).negotiate(["oob"])
    assert not session.is_oob(JsonValue({"exec-oob": "x"}))
    session.negotiate(["oob"])
    assert session.is_oob(JsonValue({"exec-oob": "x"}))
    assert not session.is_oob(JsonValue({"execute": "x"}))
    assert session.check_request({"exec-oob": "x", "id": 1}) == Request("x", {}, 1, is_oob=True)


def test_both_kinds_of_execution_while_oob_is_off() -> None:
    with pytest.raises(RequestError, match="'exec-oob' is unexpected"):
        negotiated().check_request({"execute": "x", "exec-oob": "x"})
    with pytest.raises(RequestError, match="'exec-oob' must be a string"):
        negotiated().check_request({"exec-oob": 5})
