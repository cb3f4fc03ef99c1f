"""What every rank has to know: the stage writes it to a file, and `tasks.sft.worker` reads it."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nightshift.core.files import write_text
from tasks.sft import SftParams
from tasks.sft.backend import Backend
from tasks.sft.plan import Plan


class Job(BaseModel):
    """One training.

    Attributes:
        requested: The section sft.
        params: The same, with what was chosen in the place of `auto`.
        backend: What was chosen.
        plan: The compiled plan, without the rows that earlier attempts left out.
        visible: CUDA_VISIBLE_DEVICES as the stage found it, or `all`.
        micro_batch_size: Packed rows in one forward pass of one rank, after the attempts so far.
        accumulation_steps: Forward passes before an optimiser step.
        folder: Where checkpoints and results go.
        base: Folder of the base model.
        rows: The packed rows.
        eval_rows: The encoded validation set, or None without evaluations.
        data_digest: DVC's digest of the packed rows.
        tracking_uri: Address of MLflow.
        spool: File of what the run is told, or None on a machine that does not tell it.
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
    rows: Path
    eval_rows: Path | None
    data_digest: str
    tracking_uri: str
    spool: Path | None = None

    def write(self, file: Path) -> None:
        """Write the job."""
        write_text(file, self.model_dump_json(indent=1))


def read_job(file: Path) -> Job:
    """Read a job."""
    return Job.model_validate_json(file.read_bytes())
