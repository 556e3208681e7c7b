"""A vLLM replica's settings: decided by the launcher, read by the middleware in vLLM's process."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from weightline.serving.engines.vllm.engine import VllmEngine
from weightline.serving.http.server import ServerSettings
from weightline.serving.http.service import ReplicaService
from weightline.serving.replica.replica import Replica, ReplicaSettings

SETTINGS_VARIABLE = "WEIGHTLINE_VLLM_REPLICA"


class VllmSettings(BaseModel):
    """`model_folder`: config and tokenizer that vLLM is started with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    server: ServerSettings
    model_folder: str


def build_service(settings: VllmSettings, engine: VllmEngine) -> ReplicaService:
    """The replica of these settings on an engine. Starts nothing."""
    server = settings.server
    options = ReplicaSettings(drain_seconds=server.drain_seconds)
    replica = Replica(server.open_chain(), engine, server.state_dir, server.name, options)
    return ReplicaService(replica, server.following, server.presence(server.port))
