"""The API against its own OpenAPI description: each answer is one of those it describes."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS, load_all_checks

from embedkit.serve import Rules
from tests.serve.place import Place

_EXAMPLES = 10
_LEFT_OUT = {
    # By the description random bytes are an upload, and yet they are no picture: 422 is right.
    "positive_data_acceptance",
    # A query parameter that is not known is passed over, as everywhere on the web.
    "negative_data_rejection",
}


def test_every_answer_is_one_that_is_described(place: Place) -> None:
    load_all_checks()
    checks = [check for check in CHECKS.get_all() if check.__name__ not in _LEFT_OUT]
    schema = schemathesis.openapi.from_asgi("/v1/openapi.json", place.app(Rules()))
    seen = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=_EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=checks)

        check()
        seen.append(operation.label)
    assert len(seen) == 11
