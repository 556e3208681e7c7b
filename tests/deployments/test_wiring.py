"""deployments/prefect.yaml against the flows that it names, without a server."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.events import DeploymentEventTrigger
from prefect.flows import Flow

from tests import ROOT
from weightline.deployments.server.consumer_runs import CONSUMERS
from weightline.deployments.server.events import COMMITTED, PAYLOAD_FIELDS
from weightline.deployments.server.flow_runs import POST_TRAINING, RECONCILE
from weightline.deployments.worker import WORK_POOL, WORK_QUEUES
from weightline.stages.load import load_recipe

DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["deployments"]
BY_NAME = {deployment["name"]: deployment for deployment in DEPLOYMENTS}
#: The payload of the event that announces a commit: part of what users build on.
COMMIT_FACTS = {
    "chain", "version", "commit_id", "kind", "stage", "run_id", "global_step", "is_milestone",
    "num_changed", "num_elements", "payload_nbytes", "full_nbytes",
}  # fmt: skip


def _flow(deployment: dict[str, Any]) -> Flow[Any, Any]:
    module, _, name = deployment["entrypoint"].rpartition(".")
    found: Flow[Any, Any] = getattr(importlib.import_module(module), name)
    return found


def test_every_flow_is_deployed() -> None:
    assert sorted(BY_NAME) == [
        "evaluate-version", "maintain-chain", "post-training", "publish-model", "reconcile", "refresh-serving",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_deployment_bears_the_name_of_its_flow(name: str) -> None:
    flow = _flow(BY_NAME[name])
    assert isinstance(flow, Flow)
    assert flow.name == name
    assert flow.fn.__doc__


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_parameters_of_deployments_and_triggers_fit_the_flow(name: str) -> None:
    deployment = BY_NAME[name]
    accepted = inspect.signature(_flow(deployment).fn).parameters
    assert set(deployment.get("parameters", {})) <= set(accepted)
    required = {parameter for parameter, facts in accepted.items() if facts.default is inspect.Parameter.empty}
    for trigger in deployment.get("triggers", []):
        assert required <= set(trigger["parameters"]) <= set(accepted)


@pytest.mark.parametrize("name", ["evaluate-version", "refresh-serving"])
def test_a_commit_triggers_the_consumers_with_what_it_says(name: str) -> None:
    assert {"chain", *PAYLOAD_FIELDS} == COMMIT_FACTS
    (trigger,) = BY_NAME[name]["triggers"]
    parsed = DeploymentEventTrigger.model_validate({key: value for key, value in trigger.items() if key != "type"})
    assert parsed.expect == {COMMITTED}
    assert parsed.enabled
    assert trigger["parameters"]["or_newer"] is True
    for template in (value for name, value in trigger["parameters"].items() if name != "or_newer"):
        found = re.fullmatch(r"\{\{ event\.payload\.(\w+) \}\}", template)
        assert found, f"{template} would not keep its type"
        assert found[1] in COMMIT_FACTS


def test_every_work_queue_has_a_deployment_and_every_deployment_a_work_queue() -> None:
    assert {deployment["work_pool"]["name"] for deployment in DEPLOYMENTS} == {WORK_POOL}
    used = {deployment["work_pool"]["work_queue_name"] for deployment in DEPLOYMENTS}
    assert used == set(WORK_QUEUES)


def test_deployments_are_called_what_our_code_calls_them() -> None:
    known = {f"{_flow(deployment).name}/{deployment['name']}" for deployment in DEPLOYMENTS}
    assert known >= {*CONSUMERS.values(), POST_TRAINING, RECONCILE}


def test_the_recipe_of_the_form_is_there() -> None:
    assert load_recipe(BY_NAME["post-training"]["parameters"]["recipe"]).stages


@pytest.mark.parametrize("path", sorted((ROOT / "flows").glob("*.py")), ids=lambda path: path.stem)
def test_no_flow_file_shadows_an_installed_module(path: Path) -> None:
    """Prefect puts flows/ on sys.path when it loads a flow by its file's path."""
    if path.stem.startswith("__"):
        return
    assert path.stem not in sys.stdlib_module_names
    spec = importlib.util.find_spec(path.stem)
    assert spec is None or Path(spec.origin or "").parent == path.parent


@pytest.mark.process
def test_a_stack_is_known_without_prefect_or_torch() -> None:
    """Prefect reads the stack's environment as it is imported, so it must not be imported before."""
    program = (
        "import sys, weightline.deployments.stack.pipeline\n"
        "print([name for name in ('prefect', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
