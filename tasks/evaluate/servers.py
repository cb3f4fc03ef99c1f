"""A running server: its models, and their names. Needs no torch."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx

from nightshift.core.errors import ConfigError, StageError
from nightshift.replies import EndpointParams

# Environment variable: vLLM's switch for loading adapters.
ALLOW_ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


class Server(NamedTuple):
    """A running server.

    Attributes:
        version: Version of vLLM, or empty for another server.
        models: Name -> what the server says about the model.
    """

    version: str
    models: dict[str, dict[str, Any]]


def name_weights(digest: str) -> str:
    """Return the name under which a server has the weights with a digest.

    A name that says which weights these are stops a server that still has the weights of another night.
    """
    return f"nightshift-{digest[:12]}"


def authorization(params: EndpointParams) -> dict[str, str]:
    """Return the header with the API key, if there is one.

    Raises:
        ConfigError: The environment variable of the key is not set.
    """
    if params.api_key_env is None:
        return {}
    if not (key := os.environ.get(params.api_key_env)):
        raise ConfigError(
            f"params.yaml: evaluate.endpoint.api_key_env is {params.api_key_env}, but this variable is not "
            "set; set it in the environment, or use null for a server without a key"
        )
    return {"Authorization": f"Bearer {key}"}


def read_server(params: EndpointParams) -> Server:
    """Ask a server for its version and its models.

    Raises:
        ConfigError: The server rejects the key, or is no OpenAI-compatible server.
        StageError: The server does not answer.
    """
    with httpx.Client(headers=authorization(params), timeout=min(60.0, params.timeout_seconds)) as client:
        try:
            listed = client.get(f"{params.base_url}/models")
            version = client.get(f"{params.base_url.removesuffix('/v1')}/version")
        except httpx.TransportError as err:
            raise StageError(
                f"evaluate.endpoint: {params.base_url} does not answer ({type(err).__name__}); start the "
                "server"
            ) from err
    try:
        models = {card["id"]: card for card in listed.raise_for_status().json()["data"]}
        return Server(read_version(version), models)
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(
            f"evaluate.endpoint: {params.base_url}/models returned {listed.status_code}; check base_url, "
            "which ends with /v1, and the key"
        ) from err


def read_version(response: httpx.Response) -> str:
    """Return the version of vLLM; empty if another server answered."""
    try:
        return str(response.json()["version"])
    except (ValueError, KeyError, TypeError):
        return ""


def server_key(params: EndpointParams, server: Server) -> Mapping[str, Any]:
    """Return what the scores of a server depend on, beside the models."""
    lengths = sorted({str(card.get("max_model_len")) for card in server.models.values()})
    return {"url": params.base_url, "version": server.version, "max_model_len": lengths}
