"""Run forms: every field has a name and a help for people, and no field falls into a known trap."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator
from prefect.flows import Flow
from prefect.utilities.callables import parameter_schema

from tests.deployments.test_wiring import BY_NAME, _flow


def _schema(name: str) -> dict[str, Any]:
    flow: Flow[Any, Any] = _flow(BY_NAME[name])
    return parameter_schema(flow).model_dump_for_openapi()


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_field_has_a_name_a_help_and_a_default(name: str) -> None:
    schema = _schema(name)
    for parameter, facts in schema["properties"].items():
        assert facts["title"][0].isupper(), f"{parameter} has no name for people"
        assert facts["title"] != parameter
        assert facts["description"].endswith("."), f"{parameter} has no help"
        # A default that a form cannot see shows as an empty field.
        assert (parameter in schema.get("required", [])) != ("default" in facts)
        assert "oneOf" not in facts
        assert "discriminator" not in facts


@pytest.mark.parametrize(
    ("name", "parameters", "field"),
    [
        ("post-training", {"stages": ["sft", "ppo"]}, "stages"),
        ("post-training", {"run_id": "../outside"}, "run_id"),
        ("post-training", {"recipe": ""}, "recipe"),
        ("evaluate-version", {"chain": "memory://x", "version": -1}, "version"),
        ("evaluate-version", {"chain": "memory://x", "version": "newest"}, "version"),
        ("evaluate-version", {"chain": "memory://x", "version": 1, "limit": 0}, "limit"),
        ("refresh-serving", {"chain": "", "version": 1}, "chain"),
        ("maintain-chain", {"chain": "memory://x", "check": "thorough"}, "check"),
        ("maintain-chain", {"chain": "memory://x", "keep_versions": 0}, "keep_versions"),
        ("publish-model", {"chain": "memory://x", "repo_id": "no-owner"}, "repo_id"),
        ("reconcile", {"grace_seconds": -1}, "grace_seconds"),
    ],
)
def test_a_wrong_value_is_refused_by_the_form_and_by_the_flow(
    name: str, parameters: dict[str, Any], field: str
) -> None:
    """The server checks the same schema before it makes a run (test_deployments)."""
    errors = list(Draft202012Validator(_schema(name)).iter_errors(parameters))
    assert [error.path[0] for error in errors] == [field]
    with pytest.raises(Exception, match=field):
        _flow(BY_NAME[name]).validate_parameters(parameters)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_the_deployment_s_own_values_pass(name: str) -> None:
    defaults = {"chain": "memory://x", "version": 1} if name != "publish-model" else {"chain": "memory://x"}
    needed = {key: value for key, value in defaults.items() if key in _schema(name).get("required", [])}
    Draft202012Validator(_schema(name)).validate(needed | BY_NAME[name].get("parameters", {}))
