"""Launch the ranks of a training run, on one machine or several, and stop them with their stage."""

import base64
import json
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from nightshift.core.errors import ConfigError, TrainingError
from nightshift.core.ports import free_port
from nightshift.core.stage import OFFLINE
from nightshift.core.state import tools_environment, user_path
from nightshift.pipeline import supervise
from tasks.sft import SftParams
from tasks.sft.job import Job
from tasks.sft.machine import VISIBLE
from tasks.sft.terminal import line_printer

# On SIGTERM a rank finishes its step and saves. DeepSpeed's launcher gives it 30 seconds.
GRACE_SECONDS = 40.0
# Environment variables of torch's GPU allocator, and the value used if neither is set.
ALLOCATOR, OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
EXPANDABLE = "expandable_segments:True"


def launch(job: Job, file: Path) -> int:
    """Start the launcher under the supervisor, wait, and return its exit code.

    Args:
        job: Job of the ranks.
        file: Path of the job file to write.

    Raises:
        ConfigError: The environment does not define the rendezvous of a multi-node run.
    """
    (file.parent / "output").mkdir(parents=True, exist_ok=True)
    job.write(file)
    address, port = rendezvous(job.params)
    command = [*build_command(job, address, port), str(file)]
    signal.signal(signal.SIGTERM, partial(on_sigterm, job.stage))
    try:
        with line_printer() as show:
            code = supervise.run(
                command,
                on_line=show,
                env=rank_environment(job.backend.device, job.backend.devices),
                grace_seconds=GRACE_SECONDS,
            )
    finally:
        # DeepSpeed's CPU ranks leave shared memory behind: 132 MiB per training run.
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code


def on_sigterm(stage: str, _signum: int, _frame: FrameType | None) -> None:
    """Stop the ranks, which save first, and end this stage with an error that allows a resume.

    Raises:
        TrainingError: Always.
    """
    # A second SIGTERM, from another supervisor, must not interrupt the shutdown.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise TrainingError(
        "preempted", f"{stage}: received SIGTERM; run again to resume from the last checkpoint"
    )


def node_rank(params: SftParams) -> int:
    """Return the index of this machine in the hostfile, from 0: NODE_RANK, as in torchrun.

    Raises:
        ConfigError: NODE_RANK is not an index, or is set without a hostfile.
    """
    value = os.environ.get("NODE_RANK", "0")
    if not value.isdecimal():
        raise ConfigError(
            f"NODE_RANK={value} is not an index from 0; set it to this machine's line in the hostfile"
        )
    if int(value) and params.hostfile is None:
        raise ConfigError(f"NODE_RANK={value}, but sft.hostfile is null; set it, or unset NODE_RANK")
    return int(value)


def rendezvous(params: SftParams) -> tuple[str, int]:
    """Return the rendezvous address and port of the ranks.

    The address is "" where DeepSpeed requests it by ssh from the first machine of the hostfile.

    Raises:
        ConfigError: Each machine starts its own ranks, and MASTER_ADDR or MASTER_PORT is missing.
    """
    if params.hostfile is None:
        return "127.0.0.1", free_port()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if "NODE_RANK" in os.environ and not (address and port.isdecimal()):
        raise ConfigError(
            f"NODE_RANK is set, so each machine starts its own ranks; they cannot meet at "
            f"MASTER_ADDR={address!r}, MASTER_PORT={port!r}; set both to the same values on all machines"
        )
    return address, int(port) if port.isdecimal() else free_port()


def build_command(job: Job, address: str, port: int) -> list[str]:
    """Build the command that starts the ranks: DeepSpeed's launcher, or a single process.

    Args:
        job: Job with parameters and backend.
        address: Rendezvous address, or ""; see `rendezvous`.
        port: Rendezvous port.
    """
    params, backend = job.params, job.backend
    if backend.strategy == "single":
        return [sys.executable, "-m", job.worker]
    if params.hostfile is None:
        # The command that `deepspeed` runs on one machine. Given a number of GPUs, `deepspeed` would
        # take the first ones, even if they are in use, and it does not accept UUIDs.
        ids: Sequence[str | int] = backend.devices or range(backend.num_processes)
        world = base64.urlsafe_b64encode(json.dumps({"localhost": list(ids)}).encode()).decode()
        command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    else:
        command = [
            str(Path(sys.executable).with_name("deepspeed")),
            f"--hostfile={user_path(params.hostfile)}",
        ]
        if "NODE_RANK" in os.environ:
            command += ["--no_ssh", f"--node_rank={node_rank(params)}"]
    if address:
        command += [f"--master_addr={address}"]
    return [*command, f"--master_port={port}", "--no_local_rank", "--module", job.worker]


def rank_environment(device: str, devices: Sequence[str]) -> dict[str, str]:
    """Build the environment variables of the ranks.

    Args:
        device: cuda or cpu.
        devices: GPUs visible to the ranks.
    """
    code = str(Path(__file__).absolute().parents[2])
    env = {
        **tools_environment(),
        # The ranks run this stage's code from any working directory, and keep the PYTHONPATH of the
        # stage.
        "PYTHONPATH": os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")])),
        **OFFLINE,
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cuda":
        # Rows differ in length; expandable segments avoid fragmentation.
        memory = os.environ.get(ALLOCATOR) or os.environ.get(OLD_ALLOCATOR) or EXPANDABLE
        env |= {VISIBLE: ",".join(devices), ALLOCATOR: memory}
    if device == "cpu":
        # One thread per rank makes the arithmetic, and so the adapter, reproducible.
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return env
