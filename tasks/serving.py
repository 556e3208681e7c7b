"""The task of serving: find the replica of a chain, move it to a version, write down since when it answers with it."""

from __future__ import annotations

import os
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from tasks.replicas import ReplicaAddress, ensure_replica, replicas_dir
from weightline.chain import open_chain
from weightline.chain.records import Record
from weightline.errors import ApplyError, InputError, TransientStorageError
from weightline.receiver import client
from weightline.receiver.auth import TOKEN_VARIABLE
from weightline.receiver.refresh_records import record_refresh

#: URL of a replica that somebody else runs; its token is in WEIGHTLINE_TOKEN.
SERVING_URL_VARIABLE = "WEIGHTLINE_SERVING_URL"


def _may_pass(task: Any, task_run: Any, state: State[Any]) -> bool:
    """A replica that is coming up or restarting, or a bucket that stutters: ask again."""
    return isinstance(state.result(raise_on_failure=False), ApplyError | TransientStorageError)


@task(
    task_run_name="refresh to v{version}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=_may_pass,
)
def refresh(chain: str, version: int) -> Record:
    """Move the chain's replica to the version and record it. Safe to repeat: a replica never goes back by itself."""
    replica = find_replica(chain)
    opened = open_chain(chain)
    facts = client.refresh(replica.url, replica.token, version)
    return record_refresh(opened, version, facts.replica, facts)


def find_replica(chain: str) -> ReplicaAddress:
    """The replica of WEIGHTLINE_SERVING_URL; in a local stack, one that is started when the first version asks for it.

    InputError when neither is there; ApplyError when the replica follows another chain or gives no answer.
    """
    url = os.environ.get(SERVING_URL_VARIABLE)
    if url is None:
        folder = replicas_dir()
        if folder is None:
            raise InputError(
                f"no replica is known: set {SERVING_URL_VARIABLE} and {TOKEN_VARIABLE}, or start a stack (make up)",
                field=SERVING_URL_VARIABLE,
            )
        return ensure_replica(chain, folder)
    followed = client.status(url).chain
    if followed.rstrip("/") != chain.rstrip("/"):
        raise ApplyError(f"the replica at {url} follows {followed}, not {chain}", url=url)
    return ReplicaAddress(url, os.environ.get(TOKEN_VARIABLE, ""))
