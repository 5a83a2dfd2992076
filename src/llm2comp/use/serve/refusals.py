"""What is refused, and how it is told: in OpenAI's shape below /v1, else in that of
text-embeddings-inference.
"""

from __future__ import annotations

from fastapi import Response
from pydantic import BaseModel

from llm2comp.errors import Llm2CompError

OPENAI_PREFIX = "/v1/"
# A request that cannot be understood; 400 is what OpenAI's clients expect.
INVALID, INVALID_OPENAI = 422, 400
# Status → what OpenAI and text-embeddings-inference call such errors, and what it means here.
KINDS = {
    INVALID_OPENAI: ("invalid_request_error", "Validation", "A request that cannot be understood."),
    401: ("authentication_error", "Unauthorized", "No API key, or a wrong one."),
    404: ("invalid_request_error", "NotFound", "No such model, path or prompt."),
    405: ("invalid_request_error", "Validation", "Another method is expected."),
    408: ("invalid_request_error", "Timeout", "The request took too long to arrive."),
    413: ("invalid_request_error", "Validation", "Too many texts, or too long ones."),
    INVALID: ("invalid_request_error", "Validation", "A request that cannot be understood."),
    424: ("server_error", "Backend", "The model gave no finite answer."),
    429: ("rate_limit_error", "Overloaded", "Too much waits: try again after Retry-After."),
    499: ("invalid_request_error", "Gone", "The client left."),
    500: ("server_error", "Backend", "The model failed."),
    503: (
        "server_error",
        "Unhealthy",
        "It is stopping, its model failed, or its index is unusable.",
    ),
    504: ("server_error", "Timeout", "No answer within the deadline."),
}


class OpenAIProblem(BaseModel):
    """What went wrong; `param` is the field, `code` a word for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(BaseModel):
    """OpenAI's shape of an error."""

    error: OpenAIProblem


class TeiError(BaseModel):
    """The shape of an error of text-embeddings-inference."""

    error: str
    error_type: str


class RefusedError(Llm2CompError):
    """A request that gets no answer.

    Args:
        status: of HTTP.
        problem: what is wrong.
        param: which field. code: a word for programs.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        problem: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(problem)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def told(self, path: str) -> Response:
        """As the answer to a request for `path`."""
        body: BaseModel
        status = self.status
        if path.startswith(OPENAI_PREFIX):
            status = INVALID_OPENAI if status == INVALID else status
            problem = OpenAIProblem(
                message=self.problem, type=KINDS[status][0], param=self.param, code=self.code
            )
            body = OpenAIError(error=problem)
        else:
            body = TeiError(error=self.problem, error_type=KINDS[status][1])
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(body.model_dump_json(), status, headers, "application/json")


def documented(shape: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, object]]:
    """What a route may answer instead of a result, for the OpenAPI document."""
    found: dict[int | str, dict[str, object]] = {}
    for status in sorted(statuses):
        found[status] = {"model": shape, "description": KINDS[status][2]}
        if status == 429:
            header = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
            found[status]["headers"] = {"Retry-After": header}
    return found
