"""Settings of the endpoint."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from multilora.spec import Part


class ServeConfig(Part):
    """Settings of one replica; plain values, so that Ray can carry them."""

    tracking_uri: str
    """Absolute MLflow URI whose champion aliases the replica follows."""
    downloads_dir: Path
    """Folder for adapter versions fetched from the registry."""
    num_slots: int = Field(default=16, ge=1)
    """Adapters resident on the device at once, per base."""
    max_rank: int = Field(default=16, ge=1, le=256)
    """Rank that slots have room for at first; a larger adapter makes them grow."""
    max_batch_tokens: int = Field(default=4096, ge=64)
    """Most padded tokens in one forward pass."""
    max_queue_inputs: int = Field(default=2048, ge=1)
    """Inputs that may wait; more are answered with 429."""
    max_inputs_per_request: int = Field(default=256, ge=1)
    """Inputs in one request."""
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    """Bytes of one request; more are answered with 413."""
    keys_file: Path | None = None
    """API keys (see serve/auth.py); omit to ask for none, which is for this machine only."""
    audit_file: Path | None = None
    """One line per request: who asked what, without the text; omit to have it in the replica's log alone."""
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
        return self
