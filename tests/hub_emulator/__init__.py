"""A Hugging Face Hub in a test: its bucket API, its content store and its S3 door, over HTTP on 127.0.0.1.

The real `huggingface_hub`, `hf_xet` and S3 clients talk to it; nothing of them is replaced. What it copies from the
service is what the service documents and what the clients send; what is unproven about the service (listings that lag,
late or lost replies) is a knob here, so that tests can assume the worst.
"""

from tests.hub_emulator.emulator import HubEmulator
from tests.hub_emulator.faults import Cut, Fault, Late, LoseReply, Status, Truncate
from tests.hub_emulator.server import running_emulator

__all__ = ["Cut", "Fault", "HubEmulator", "Late", "LoseReply", "Status", "Truncate", "running_emulator"]
