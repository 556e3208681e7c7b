"""Defines the worker type of this project, its work pool and its queues. Importing this imports no Prefect."""

WORKER_TYPE = "weightline"
#: The work pool of deployments/prefect.yaml.
WORK_POOL = "weightline"
#: The work queues of the pool, with the modules that a worker imports in advance for the runs of each.
WORK_QUEUES: dict[str, tuple[str, ...]] = {
    "training": ("weightline.flows.post_training",),
    "evaluation": ("weightline.flows.version_eval", "weightline.evaluation.harness"),
    "serving": ("weightline.flows.serving_refresh",),
    "upkeep": ("weightline.flows.reconcile",),
}
