"""What infra/ says, as far as a machine without containers can tell: schemas, names, and that files exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft7Validator
from prefect.settings import get_current_settings
from prefect.utilities.templating import apply_values

from tests import ROOT
from weightline.deployments.worker import WORK_QUEUES
from weightline.launch.command import RANK_PROGRAM

INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
#: The release whose schemas are asked.
RELEASE = "1.33"
OBJECT_FILES = ("namespace", "storage", "postgres", "prefect-server", "workers", "machines", "vllm")
DOCKERFILES = sorted((INFRA / "images").glob("*.Dockerfile"))


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text()))


def _compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
    return loaded


@pytest.mark.parametrize("name", OBJECT_FILES)
def test_kubernetes_takes_every_object(name: str) -> None:
    for document in _documents(name):
        kubernetes_validate.validate(document, RELEASE, strict=True)


def test_a_wrong_object_would_be_found() -> None:
    (claim,) = _documents("storage")
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(claim, RELEASE, strict=True)


def test_kustomize_lists_every_object() -> None:
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(f"{name}.yaml" for name in OBJECT_FILES)


def _job_of_the_work_pool(**chosen: Any) -> dict[str, Any]:
    """As Prefect's worker fills it in."""
    template = json.loads((KUBERNETES / "work-pool.json").read_text())
    values = {name: facts.get("default") for name, facts in template["variables"]["properties"].items()}
    values |= {
        "command": ["prefect", "flow-run", "execute"], "labels": {"prefect.io/flow-run-name": "x"},
        "env": [{"name": "PREFECT_API_URL", "value": "http://prefect:4200/api"}],
    } | chosen  # fmt: skip
    job: dict[str, Any] = apply_values(template["job_configuration"], values)["job_manifest"]
    return job


def test_the_work_pool_starts_a_pod_a_machine() -> None:
    job = _job_of_the_work_pool(machines=2, gpus=4)
    kubernetes_validate.validate(job, RELEASE, strict=True)
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
    pod = spec["template"]["spec"]
    assert pod["subdomain"] in {document["metadata"]["name"] for document in _documents("machines")}
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert "{{" not in json.dumps(job)


def _containers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Of all pods that Kubernetes starts, by name."""
    objects = [*(document for name in OBJECT_FILES for document in _documents(name)), _job_of_the_work_pool()]
    for one in objects:
        pod = one.get("spec", {}).get("template", {}).get("spec", {})
        for container in (*pod.get("initContainers", ()), *pod.get("containers", ())):
            yield container["name"], container


def test_who_mounts_the_folder_of_runs_names_it_in_kubernetes() -> None:
    mounted = {
        name: (mount["mountPath"], container["env"])
        for name, container in _containers()
        for mount in container.get("volumeMounts", ())
        if mount["name"] == "runs"
    }
    assert set(mounted) == {"worker", "prefect-job"}
    name, value = "WEIGHTLINE_RUNS_DIR", mounted["worker"][0]
    assert {"name": name, "value": value} in mounted["worker"][1]
    template = json.loads((KUBERNETES / "work-pool.json").read_text())
    assert template["variables"]["properties"]["env"]["default"] == {name: mounted["prefect-job"][0]}


def test_who_mounts_the_folder_of_runs_names_it_in_compose() -> None:
    mounted = {name: s for name, s in _compose()["services"].items() if "runs:/runs" in s.get("volumes", ())}
    assert set(mounted) == {"worker", "dashboard"}
    assert all(service["environment"]["WEIGHTLINE_RUNS_DIR"] == "/runs" for service in mounted.values())
    assert all("WEIGHTLINE_CHAINS" in service["environment"] for service in mounted.values())
    assert " /runs/ ${WEIGHTLINE_CHAINS:-} " in mounted["dashboard"]["command"]


def test_the_worker_of_kubernetes_looks_after_chains() -> None:
    (worker,) = (container for name, container in _containers() if name == "worker")
    assert "--work-queue=upkeep" in worker["command"]
    assert any(one["name"] == "WEIGHTLINE_CHAINS" and one["value"] for one in worker["env"])


def test_no_deployment_waits_in_a_queue_that_no_worker_serves() -> None:
    """Those of deployments/prefect.yaml are deployed first; of one with the same name the later stands."""
    deployed: dict[str, Any] = {}
    for path in (ROOT / "deployments/prefect.yaml", KUBERNETES / "prefect.yaml"):
        deployed |= {one["name"]: one for one in yaml.safe_load(path.read_text())["deployments"]}
    (worker,) = (container for name, container in _containers() if name == "worker")
    queues = {part.partition("=")[2] for part in worker["command"] if part.startswith("--work-queue=")}
    assert queues <= set(WORK_QUEUES)
    for one in deployed.values():
        pool = one["work_pool"]
        assert pool["name"] == "machines" or pool["work_queue_name"] in queues
    (nightly,) = deployed["post-training"]["schedules"]
    assert (nightly["slug"], nightly["active"]) == ("nightly", False)


def test_the_deployment_for_machines_sets_variables_that_the_pool_has() -> None:
    (deployment,) = yaml.safe_load((KUBERNETES / "prefect.yaml").read_text())["deployments"]
    template = json.loads((KUBERNETES / "work-pool.json").read_text())
    assert set(deployment["work_pool"]["job_variables"]) <= set(template["variables"]["properties"])


def test_a_jobset_s_job_is_a_job() -> None:
    (jobset,) = _documents("jobset")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
    kubernetes_validate.validate(job, RELEASE, strict=True)
    command = job["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    assert f"-m {RANK_PROGRAM}" in command
    assert (INFRA / "accelerate" / "zero3_machines.yaml").exists()


def test_compose_takes_its_file() -> None:
    schema = json.loads((Path(__file__).parent / "schemas" / "compose_spec.json").read_text())
    document = _compose()
    document.pop("name")  # younger than the schema
    errors = [error.message for error in Draft7Validator(schema).iter_errors(document)]
    assert errors == []


def test_every_port_of_compose_stays_on_this_machine() -> None:
    ports = [port for service in _compose()["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def _prefect_variables() -> Iterator[tuple[str, str]]:
    for path in [INFRA / "compose.yaml", *KUBERNETES.glob("*.yaml"), *DOCKERFILES]:
        for name in re.findall(r"\bPREFECT_[A-Z_]+\b", path.read_text()):
            yield path.name, name


def test_prefect_knows_every_setting() -> None:
    known = set(get_current_settings().to_environment_variables(exclude_unset=False))
    # Without a value by default, so not among them.
    known |= {"PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"}
    known |= {"PREFECT_API_URL", "PREFECT_SERVER_UI_API_URL"}
    assert {name for _, name in _prefect_variables()} <= known


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_copies_what_there_is_from_a_named_base(path: Path) -> None:
    text = path.read_text()
    for line in text.splitlines():
        if line.startswith("COPY "):
            assert [source for source in line.split()[1:-1] if not (ROOT / source).exists()] == []
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert ":" in base
    assert not base.endswith(":latest")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_copies_every_folder_of_the_package(path: Path) -> None:
    """Some are links to folders of the repository: what they lead to must be there when the package is built."""
    folders = {file.resolve() for file in (ROOT / "weightline").rglob("*") if file.is_symlink()}
    assert len(folders) == 4
    copied = {(ROOT / line.split()[1]).resolve() for line in path.read_text().splitlines() if line.startswith("COPY ")}
    assert folders | {ROOT / "weightline"} <= copied


def test_a_replica_gets_requests_when_it_serves_and_serves_what_passed_its_gate() -> None:
    (deployment,) = (one for one in _documents("vllm") if one["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert "--ref=serving" in container["args"]


def test_images_are_named_by_version() -> None:
    images = [service["image"] for service in _compose()["services"].values()]
    assert all(":" in image for image in images if image != "weightline")
    assert not any(image.endswith(":latest") for image in images)


@pytest.mark.process
def test_accelerate_reads_the_file_for_several_machines() -> None:
    program = (
        "import sys; from accelerate.commands.config.config_args import load_config_from_file as load; "
        "config = load(sys.argv[1]); print(config.num_machines, config.num_processes, config.distributed_type.value, "
        "config.deepspeed_config['deepspeed_multinode_launcher'])"
    )
    argv = [sys.executable, "-c", program, str(INFRA / "accelerate" / "zero3_machines.yaml")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-4:] == ["2", "16", "DEEPSPEED", "standard"]


@pytest.mark.process
def test_a_peer_s_pod_waits_for_calls_and_the_first_one_runs_the_flow() -> None:
    argv = [sys.executable, "-m", "weightline.launch.peer", "--indexed-job", sys.executable, "-c", "print('the flow')"]
    env = {"PYTHONPATH": str(ROOT), "JOB_COMPLETION_INDEX": "0"}
    assert subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout == "the flow\n"
