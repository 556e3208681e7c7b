"""A vLLM replica's settings: decided by the launcher, read by the middleware in vLLM's process."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from weightline.chain import Chain, open_chain
from weightline.format.signature import load_trusted_keys
from weightline.receiver.engines.vllm.engine import VllmEngine
from weightline.receiver.replica import Replica, ReplicaSettings
from weightline.receiver.server import ServerSettings
from weightline.receiver.service import ReplicaService

SETTINGS_VARIABLE = "WEIGHTLINE_VLLM_REPLICA"


class VllmSettings(BaseModel):
    """`model_folder`: config and tokenizer that vLLM is started with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    server: ServerSettings
    model_folder: str


def settings_chain(server: ServerSettings) -> Chain:
    """The chain that the replica serves, with the keys that it demands."""
    trusted = None if server.trusted_keys is None else load_trusted_keys(server.trusted_keys)
    return open_chain(server.chain_url, trusted)


def build_service(settings: VllmSettings, engine: VllmEngine) -> ReplicaService:
    """The replica of these settings on an engine. Starts nothing."""
    server = settings.server
    chain = settings_chain(server)
    replica = Replica(chain, engine, server.state_dir, server.name, ReplicaSettings(drain_seconds=server.drain_seconds))
    return ReplicaService(replica, server.following, server.presence(server.port))
