"""Settings of the endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from multilora.spec import Part

Role = Annotated[float, Field(gt=0, lt=1)] | Literal["shadow"]
"""Share of a task's requests that its challenger answers; in shadow it answers all of them, and the caller none the wiser."""


class ServeConfig(Part):
    """Settings of one replica; plain values, so that Ray can carry them."""

    tracking_uri: str
    """Absolute MLflow URI whose champion aliases the replica follows."""
    downloads_dir: Path
    """Folder for adapter versions fetched from the registry."""
    num_slots: int = Field(default=16, ge=1)
    """Adapters resident on the device at once, per base."""
    num_host_adapters: int = Field(default=256, ge=1)
    """Adapters in host memory at once; the least recently used of more is fetched again when it is next asked for."""
    max_rank: int = Field(default=16, ge=1, le=256)
    """Rank that slots have room for at first; a larger adapter makes them grow."""
    max_batch_tokens: int = Field(default=4096, ge=64)
    """Most padded tokens in one forward pass."""
    max_wait_s: float = Field(default=0.002, ge=0)
    """How long an idle engine waits for more requests to share a batch with the first."""
    max_queue_inputs: int = Field(default=2048, ge=1)
    """Inputs that may wait; more are answered with 429."""
    max_inputs_per_request: int = Field(default=256, ge=1)
    """Inputs in one request."""
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    """Bytes of one request; more are answered with 413."""
    max_bytes_in_flight: int = Field(default=256 * 2**20, ge=1024)
    """Bytes of all requests that are not answered yet; more are answered with 429."""
    deadline_s: float = Field(default=30.0, gt=0)
    """Seconds until a request without an answer gets a 504."""
    max_base_tokens: int = Field(default=1024, ge=1)
    """Most tokens of a text that a base itself writes where it is asked by its own name."""
    target_requests_per_replica: int = Field(default=64, ge=1)
    """Requests in a replica, waiting ones included, above which more replicas are started where that is allowed."""
    upscale_delay_s: float = Field(default=30.0, ge=0)
    """Seconds for which more requests than that must come before a replica is added."""
    downscale_delay_s: float = Field(default=600.0, ge=0)
    """Seconds for which fewer requests must come before a replica goes."""
    keys_file: Path | None = None
    """API keys (see serve/auth.py); omit to ask for none, which is for this machine only."""
    audit_file: Path | None = None
    """One line per request: who asked what, without the text; omit to have it in the replica's log alone."""
    challengers: dict[str, Role] = Field(default={})
    """By task, what the version behind the alias `challenger` does; omit for champions alone."""
    live_dir: Path | None = None
    """Folder for the counts of what champions and challengers answered; omit to keep none."""
    metrics_dir: Path | None = None
    """Folder where the replicas of a machine count together; omit to have each count alone."""
    reports_dir: Path | None = None
    """Folder of the regression reports, whose newest one is shown at /report; omit to show none."""
    mlflow_url: str | None = Field(default=None, pattern="^https?://")
    """Address of MLflow's pages, for a link on the endpoint's page."""
    poll_s: float = Field(default=1.0, gt=0)
    """Seconds between looks at the registry for new champions."""
    retry_s: float = Field(default=30.0, ge=0)
    """Seconds until a champion that could not be fetched or loaded is tried again; one that does not fit never is."""

    @model_validator(mode="after")
    def _check(self) -> ServeConfig:
        if self.max_queue_inputs < self.max_inputs_per_request:
            raise ValueError("max_queue_inputs is below max_inputs_per_request; the largest request could never be answered")
        if self.max_bytes_in_flight < self.max_body_bytes:
            raise ValueError("max_bytes_in_flight is below max_body_bytes; the largest request could never be answered")
        return self
