"""Requests that nobody would think of: schemathesis makes them from the OpenAPI document, and holds
the answers against it.
"""

import pytest

from serving import TINY, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    with serving(max_texts=8, max_body_bytes=100_000, deadline_seconds=20) as found:
        yield found


def ask(operation, mode, statuses):
    """Sends requests that one operation describes, or that break its description."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    held = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]

    @seed(0)
    @settings(
        max_examples=50,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(operation.as_strategy(generation_mode=mode))
    def one(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = TINY
        statuses.add(case.call_and_validate(checks=held).status_code)

    one()


def test_no_request_makes_it_fail_and_every_answer_is_as_described(served):
    import schemathesis

    found = {}
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    for operation in (result.ok() for result in schema.get_all_operations()):
        statuses = found.setdefault(operation.path, set())
        ask(operation, schemathesis.GenerationMode.POSITIVE, statuses)
        if operation.body:
            ask(operation, schemathesis.GenerationMode.NEGATIVE, statuses)
    assert {200, 400} <= found["/v1/embeddings"]
    assert {200, 422} <= found["/rerank"] & found["/embed"]
    assert found["/info"] == {200}
    assert served.embeddings("still here").status_code == 200
