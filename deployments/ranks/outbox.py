"""Sends events to a Prefect server that may be slow, hung or gone, without making the sender wait.

Prefect's own client reconnects for seconds per event, and at exit waits for the server without a limit. Six steps took
83 s after the server was killed, and 115 s with a server that hangs. A rank must not lose that time. So `put` stores
the event without using the network, and a daemon thread posts events in batches. While the server answers, every event
is posted at least once. If it comes back after an outage, the newest 10,000 events are posted. The server drops an
event whose id it has already.

Password, key, certificates and headers are those of Prefect's settings. If the server does not accept them, events wait
as during an outage, and one warning is logged.
"""

from __future__ import annotations

import atexit
import contextvars
import json
import logging
import threading
from collections import deque
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.events import Event
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

MAX_WAITING = 10_000
_MAX_BATCH = 200
_POST_TIMEOUT_SECONDS = 2.0
_FLUSH_SECONDS = 2.0
#: Statuses after which a batch is dropped, since the server would refuse the same bytes again. All others are retried.
_FINAL_REFUSALS = frozenset({400, 413, 422})
_JSON = {"Content-Type": "application/json"}

logger = logging.getLogger(__name__)


class EventOutbox:
    """Holds events until the server has them: `put` never blocks and never raises."""

    def __init__(self, api_url: str, retry_seconds: float = 5.0) -> None:
        """Starts the thread. `retry_seconds` is the pause after a post that failed."""
        self._api_url = api_url
        self._retry_seconds = retry_seconds
        self._waiting: deque[dict[str, Any]] = deque(maxlen=MAX_WAITING)
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_warned = False
        # In the caller's context, which has Prefect's settings.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), name="weightline-outbox", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, item: tuple[str, Event]) -> None:
        """Stores a pair of a kind and an event. The oldest event is dropped when `MAX_WAITING` wait."""
        _, event = item
        with self._changed:
            self._waiting.append(event.model_dump(mode="json"))
            self._changed.notify()

    @property
    def num_waiting(self) -> int:
        """The number of events that the server has not confirmed."""
        return len(self._waiting)

    def close(self) -> None:
        """Posts the waiting events, for at most two seconds. The events that are left are lost. Safe to repeat."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout=_FLUSH_SECONDS)

    def _run(self) -> None:
        with _client_of(self._api_url) as client:
            while batch := self._next_batch():
                if self._post(client, batch):
                    for _ in batch:
                        self._waiting.popleft()
                elif self._pause():
                    return

    def _post(self, client: SyncPrefectClient, batch: list[dict[str, Any]]) -> bool:
        """Returns whether the batch is done with. Logs the first refusal; does not log connection errors."""
        try:
            client.request("POST", "/events", content=json.dumps(batch), headers=_JSON)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if not self._is_warned and status < 500:
                logger.warning(
                    "the Prefect server refuses events of this process (HTTP %d): %s", status, _remedy(status)
                )
                self._is_warned = True
            return status in _FINAL_REFUSALS
        # ValueError: Prefect's client asks for a CSRF token first, and the answer was no JSON.
        except (httpx.HTTPError, ValueError):
            return False
        return True

    def _next_batch(self) -> list[dict[str, Any]]:
        """Waits for events and returns the oldest. Returns an empty list when the outbox closes and none is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            return [self._waiting[index] for index in range(min(len(self._waiting), _MAX_BATCH))]

    def _pause(self) -> bool:
        """Waits before the next try. Returns True when it is time to give up."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing, timeout=self._retry_seconds)
            return self._is_closing


def _client_of(api_url: str) -> SyncPrefectClient:
    # trust_env off: a rank reaches its own server without the environment's proxies.
    return SyncPrefectClient(
        api_url,
        auth_string=PREFECT_API_AUTH_STRING.value(),
        api_key=PREFECT_API_KEY.value(),
        httpx_settings={"timeout": _POST_TIMEOUT_SECONDS, "trust_env": False},
    )


def _remedy(status: int) -> str:
    if status in _FINAL_REFUSALS:
        return "they are lost"
    return "they wait here. Is PREFECT_API_AUTH_STRING (or PREFECT_API_KEY) what the server wants?"
