"""How the gateway says no: one exception, and the body and headers that the client sees."""

from __future__ import annotations

from typing import Any

from nearfar.errors import ContextError, NearfarError, SchemaError, UsageError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer that is not given.  `param` names the field at fault; `retry_after_s` when it may be worth a try."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """As OpenAI's: {"error": {message, type, param, code}}."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after_s is None else {"retry-after": str(max(1, round(self.retry_after_s)))}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def invalid(param: str, message: str) -> Refusal:
    """400: a field that cannot be used."""
    return Refusal(400, "invalid_value", message, param=param)


def of_error(error: NearfarError, param: str | None = None) -> Refusal:
    """What the sdk or the engine refused, as HTTP."""
    if isinstance(error, ContextError):
        return Refusal(400, "context_length_exceeded", str(error), param=param)
    if isinstance(error, SchemaError):
        return Refusal(400, "invalid_schema", str(error), param=param)
    if isinstance(error, UsageError):
        return Refusal(400, "invalid_value", str(error), param=param)
    return Refusal(500, "request_failed", str(error), param=param)
