"""Drivers as Ray Jobs: the cluster runs them, and frees everything that they hold when they end, however they end."""

from __future__ import annotations

import shlex
import sys
import time

from ray.job_submission import JobStatus, JobSubmissionClient

from multilora.errors import CapacityError
from orchestrator.config import OrchestratorConfig
from orchestrator.submissions import Submission

STOP_TIMEOUT_S = 30.0


class RayJobs:
    """Runs drivers on the configured cluster; a submission's job bears its name and the time of its start."""

    def __init__(self, config: OrchestratorConfig) -> None:
        """Connect to the cluster's dashboard. Raises CapacityError."""
        self._address = config.ray_address
        try:
            self._client = JobSubmissionClient(config.ray_address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise CapacityError(f"the dashboard of Ray at {config.ray_address} does not answer: {error}") from error

    def start(self, submission: Submission) -> str:
        """Submit the driver as a job; it runs on the head node, whose Python and workspace are those of this command."""
        command = shlex.join([sys.executable, "-m", "orchestrator", "drive", str(submission.folder)])
        try:
            job: str = self._client.submit_job(
                entrypoint=f"exec {command} >> {shlex.quote(str(submission.log_file))} 2>&1",
                submission_id=f"{submission.id}-{time.time_ns()}",
                metadata={"submission": str(submission.folder)},
            )
        except RuntimeError as error:
            raise CapacityError(f"Ray at {self._address} did not take the job: {error}") from error
        return job

    def is_alive(self, job: str) -> bool:
        """Whether the job runs, or waits to."""
        return bool(job) and not self._status(job).is_terminal()

    def kill(self, job: str) -> None:
        """End the job and wait for it."""
        if not self.is_alive(job):
            return
        self._client.stop_job(job)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self.is_alive(job) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _status(self, job: str) -> JobStatus:
        try:
            return self._client.get_job_status(job)
        except RuntimeError:  # a cluster that was started anew knows nothing of it
            return JobStatus.STOPPED
