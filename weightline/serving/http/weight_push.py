"""The routes by which trainers push weights into a vLLM server, and their refusal: weights come through the chain."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse

from weightline.errors import UnsupportedFeatureError, http_status
from weightline.serving.http.errors import error_body

#: What TRL's client of `vllm_mode="server"` calls besides the routes that generate.
PUSH_ROUTES = (
    ("GET", "/server_info"),
    ("GET", "/get_world_size"),
    ("POST", "/init_weight_transfer_engine"),
    ("POST", "/start_weight_update"),
    ("POST", "/update_weights"),
    ("POST", "/finish_weight_update"),
    ("POST", "/reset_prefix_cache"),
)


async def weight_push_refused(request: Request) -> JSONResponse:
    """Answers 501: a status that clients do not take for a failure that passes."""
    error = UnsupportedFeatureError(
        f"{request.url.path}: weights cannot be pushed here, since this server loads each version from its chain. "
        "Commit versions with weightline's callback, and leave the trainer's own synchronization out",
        feature="weight push",
    )
    return JSONResponse(error_body(str(error), str(error.kind), error.facts), http_status(error))
