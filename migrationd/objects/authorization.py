"""``authz-simple`` and ``authz-list``: whether an identity may come in."""

import fnmatch
import re
from dataclasses import dataclass

from migrationd.errors import ObjectError
from migrationd.objects.base import Properties, UserObject, required_text, text_of

_RULES_LIMIT = 10_000


class Authorization(UserObject):
    """Decides about identities."""

    def is_allowed(self, identity: str) -> bool:
        """Whether this identity may come in."""
        raise NotImplementedError


class AuthzSimple(Authorization):
    """Allows exactly one identity.

    Raises:
        ObjectError: ``identity`` is missing.
    """

    qom_type = "authz-simple"

    def __init__(self, properties: Properties) -> None:
        super().__init__(properties)
        self._identity = required_text(properties, "identity")

    def is_allowed(self, identity: str) -> bool:
        """Whether this is the one identity."""
        return identity == self._identity


@dataclass(frozen=True, slots=True)
class _Rule:
    match: str
    allows: bool
    is_glob: bool

    def applies_to(self, identity: str) -> bool:
        if self.is_glob:  # of QEMU's there are two: * and ?
            pattern = fnmatch.translate(self.match.replace("[", "[[]"))
            return re.match(pattern, identity) is not None
        return identity == self.match


class AuthzList(Authorization):
    """Allows and denies by rules: the first that matches decides, else the policy.

    Args:
        properties: ``policy`` (``deny`` when not given) and ``rules``.

    Raises:
        ObjectError: A rule is malformed.
    """

    qom_type = "authz-list"

    def __init__(self, properties: Properties) -> None:
        super().__init__(properties)
        self._allows = _allows(text_of(properties, "policy") or "deny")
        rules = properties.get("rules")
        if rules is None:
            rules = []
        if not isinstance(rules, list) or len(rules) > _RULES_LIMIT:
            raise ObjectError("Invalid parameter type for 'rules', expected: array")
        self._rules = [_rule(rule) for rule in rules]

    def is_allowed(self, identity: str) -> bool:
        """What the first rule that matches says, else the policy."""
        for rule in self._rules:
            if rule.applies_to(identity):
                return rule.allows
        return self._allows


def _rule(value: object) -> _Rule:
    if not isinstance(value, dict):
        raise ObjectError("Invalid parameter type for 'rules', expected: object")
    kind = text_of(value, "format") or "exact"
    if kind not in ("exact", "glob"):
        raise ObjectError(f"Parameter 'format' does not accept value '{kind}'")
    return _Rule(
        match=required_text(value, "match"),
        allows=_allows(required_text(value, "policy")),
        is_glob=kind == "glob",
    )


def _allows(policy: str) -> bool:
    if policy not in ("allow", "deny"):
        raise ObjectError(f"Parameter 'policy' does not accept value '{policy}'")
    return policy == "allow"
