"""The job of the ranks: the stage writes it to a file, and `tasks.sft.worker` reads it."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nightshift.core.files import write_text
from nightshift.core.paths import PACKED
from nightshift.registry.start import Start
from tasks.sft import SftParams
from tasks.sft.backend import Backend
from tasks.sft.plan import Plan


class Job(BaseModel):
    """One training run.

    Attributes:
        requested: `sft` section of params.yaml.
        params: The same section with `auto` resolved.
        backend: Resolved settings of this machine.
        plan: Compiled plan, without the rows skipped by earlier attempts.
        visible: CUDA_VISIBLE_DEVICES of the stage, or `all`.
        micro_batch_size: Packed rows per forward pass of one rank, after earlier attempts.
        accumulation_steps: Forward passes per optimizer step.
        folder: Folder for checkpoints and results.
        base: Folder of the base model.
        start: Where training starts: from a version, whose model is in data/start, or from the base.
        rows: Arrow file of the packed rows.
        eval_rows: Arrow file of the encoded validation set, or None without evaluations.
        data_digest: DVC digest of the packed rows.
        tracking_uri: MLflow tracking URI.
        spool: Spool file of the MLflow run, or None on a machine that does not track.
        stage: Stage that trains; its name starts messages and parameters.
        worker: Module of the ranks.
        data: Data that the rows come from, for messages and tracking.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requested: SftParams
    params: SftParams
    backend: Backend
    plan: Plan
    visible: str
    micro_batch_size: int
    accumulation_steps: int
    folder: Path
    base: Path
    start: Start = Start()
    rows: Path
    eval_rows: Path | None
    data_digest: str
    tracking_uri: str
    spool: Path | None = None
    stage: str = "sft"
    worker: str = "tasks.sft.worker"
    data: Path = PACKED

    def write(self, file: Path) -> None:
        """Write the job."""
        write_text(file, self.model_dump_json(indent=1))


def read_job(file: Path) -> Job:
    """Read a job."""
    return Job.model_validate_json(file.read_bytes())
