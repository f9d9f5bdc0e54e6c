"""A JSON body, field by field: typed, bounded, and nothing in it is passed over in silence.

Each look-up names what it expects; `done` refuses what nobody looked up.  A field that is null counts as absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from nearfar_cloud.gateway.refusal import Refusal, invalid


def parse(raw: bytes) -> Fields:
    """The object that a body holds.  Raises Refusal (400): not UTF-8, not JSON, not an object."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise Refusal(400, "invalid_json", f"the body is not UTF-8: byte {error.start}") from None
    except RecursionError:
        raise Refusal(400, "invalid_json", "the body is nested too deeply") from None
    except ValueError as error:
        raise Refusal(400, "invalid_json", f"the body is not JSON: {error}") from None
    return Fields(value)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


class Fields:
    """One object of a body.  `path` is where it stands, for messages."""

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, dict):
            raise invalid(path or "body", f"{path or 'the body'}: expected an object, found {_kind(value)}")
        self.values: Mapping[str, Any] = value
        self.path = path
        self._left = {name for name, item in value.items() if item is not None}

    def name(self, field: str) -> str:
        return f"{self.path}.{field}" if self.path else field

    def any(self, field: str) -> Any:
        """The value as it is, None where it is absent."""
        self._left.discard(field)
        return self.values.get(field)

    def refuse(self, field: str, expected: str) -> Refusal:
        found = _shown(self.values.get(field))
        return invalid(self.name(field), f"{self.name(field)}: expected {expected}, found {found}")

    def whole(self, field: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self.any(field)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.refuse(field, f"a whole number {low}..{high}")
        return value

    def real(self, field: str, low: float, high: float, default: float | None = None) -> float | None:
        value = self.any(field)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise self.refuse(field, f"a number {low:g}..{high:g}")
        return float(value)

    def flag(self, field: str, default: bool = False) -> bool:
        value = self.any(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(field, "true or false")
        return value

    def text(self, field: str, most: int) -> str | None:
        """At most `most` characters."""
        value = self.any(field)
        if value is not None and (not isinstance(value, str) or len(value) > most):
            raise self.refuse(field, f"a text of at most {most} characters")
        return value

    def needed(self, field: str, most: int) -> str:
        value = self.text(field, most)
        if not value:
            raise self.refuse(field, "a text")
        return value

    def choice(self, field: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.any(field)
        if value is None:
            return default
        if value not in allowed:
            raise self.refuse(field, " or ".join(allowed))
        return str(value)

    def items(self, field: str, most: int) -> list[Any] | None:
        value = self.any(field)
        if value is not None and (not isinstance(value, list) or len(value) > most):
            raise self.refuse(field, f"a list of at most {most}")
        return value

    def words(self, field: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
        """A list of some of `allowed`."""
        found = self.items(field, len(allowed)) or []
        for word in found:
            if word not in allowed:
                expected = f"{self.name(field)}: expected a list of {' or '.join(allowed)}"
                raise invalid(self.name(field), f"{expected}, found {_shown(word)} in it")
        return tuple(found)

    def inner(self, field: str) -> Fields | None:
        value = self.any(field)
        return None if value is None else Fields(value, self.name(field))

    def only(self, field: str, *neutral: Any) -> None:
        """A field that changes what comes back and is not served: only values that ask for nothing pass."""
        value = self.any(field)
        if value is not None and value not in neutral:
            shown = " or ".join(json.dumps(v) for v in neutral)
            why = f"only {shown} is served" if neutral else "not served"
            raise Refusal(
                400,
                "unsupported_parameter",
                f"{self.name(field)}: {why}, found {_shown(value)}",
                param=self.name(field),
            )

    def done(self) -> None:
        """Raises Refusal (400) for a field that nobody looked up."""
        if self._left:
            field = self.name(min(self._left))
            raise Refusal(400, "unsupported_parameter", f"{field}: this server does not know it", param=field)


def checked_json(value: Any, param: str, max_bytes: int, max_depth: int) -> None:
    """Raises Refusal (400 schema_too_complex) where a value is too long or too deep to be worked on."""
    if (deep := depth(value)) > max_depth:
        raise Refusal(400, "schema_too_complex", f"{param}: {deep} levels, expected at most {max_depth}", param=param)
    size = len(json.dumps(value))
    if size > max_bytes:
        raise Refusal(400, "schema_too_complex", f"{param}: {size} bytes, expected at most {max_bytes}", param=param)


def depth(value: Any) -> int:
    """Levels of objects and lists; one that holds nothing of the kind is 1.  No recursion: a body may be deep."""
    level, items = 0, [value]
    while items:
        items = [x for item in items if isinstance(item, (dict, list)) for x in _inside(item)]
        level += 1
    return level


def _inside(item: dict[str, Any] | list[Any]) -> list[Any]:
    return list(item.values()) if isinstance(item, dict) else item


def _kind(value: Any) -> str:
    return {"NoneType": "null", "str": "a text", "list": "a list", "bool": "true or false"}.get(
        type(value).__name__, "a number"
    )


def _shown(value: Any) -> str:
    """A number or a word as it is, of everything else only the kind: texts of people do not go into messages."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return f"{value:.10g}" if isinstance(value, float) else str(value)[:40]
    if isinstance(value, str):
        return f"a text of {len(value)} characters"
    return "infinity" if isinstance(value, float) else {"dict": "an object"}.get(type(value).__name__, "a list")
