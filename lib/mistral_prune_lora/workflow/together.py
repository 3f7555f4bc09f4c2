"""A job of Slurm that several processes do together: its script starts itself again by `torchrun`, on all of its nodes.

How many is a matter of the profile (the resource `processes`), which changes nothing of what is made: they share every
update's forward passes. Imports no torch, since the process that starts the others does nothing else.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from mistral_prune_lora.distillation import schedule
from mistral_prune_lora.errors import PipelineError

_PORTS = 20_000, 10_000  # the first, and how many: jobs that share a node meet at different ones
_LAST_UPDATE = 600  # seconds for those that are asked to end; torchrun's own 30 are less than a large update


def start_together(processes: int | None, nodes: int | None = None, mpi: str | None = None) -> None:
    """Run this process's own script in several and end with their exit code; return where it is to work itself.

    It works itself where nothing asks for more than one process, and in each of those that were started. The script is
    the file that Snakemake made for the job, which all nodes must see.

    Args:
        processes: how many on each node; None is one.
        nodes: how many the job asks for; None is one. The job's environment does not say it: Slurm's executor takes
            such variables away.
        mpi: what starts a process on each node: srun, with options or without. Of no use where the job has one node.

    Raises:
        PipelineError: the job is none of Slurm's, whose GPUs are the job's own; it has several nodes and nothing but
            srun starts processes there; it has other nodes than it asked for; it is one of an array, and has mpi.
    """
    nodes = nodes or 1
    if mpi and "SLURM_ARRAY_TASK_ID" in os.environ:
        told = "with mpi, Slurm's executor runs the first job of an array in all of them"
        raise PipelineError(told, where=f"mpi={mpi}", mend="take the rule out of slurm-array-jobs, or leave mpi out")
    if "RANK" in os.environ or (processes or 1) * nodes == 1:
        return
    if "SLURM_JOB_ID" not in os.environ:
        told = "several processes for a job are for Slurm, which gives it GPUs of its own"
        raise PipelineError(told, where=f"processes={processes}", mend="leave it out; jobs take a GPU each")
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes or 1}"]
    torchrun += [f"--shutdown_timeout={_LAST_UPDATE}"]
    if nodes == 1:
        sys.exit(_exit_code([*torchrun, "--standalone", sys.argv[0]], subprocess.Popen.send_signal))
    srun = (mpi or "").split()
    if not srun or Path(srun[0]).name != "srun":
        told = f"the job has {nodes} nodes, and no srun starts processes on them"
        raise PipelineError(told, where=f"mpi={mpi}", mend="set mpi to srun, or nodes to 1")
    # One process on each node, which may use all that the job has there. Whatever the site has set: where one ends, the
    # others have the time to save what they have, and no more, should they wait for one that never came.
    srun += [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]
    srun += ["--kill-on-bad-exit=0", f"--wait={_LAST_UPDATE}"]
    sys.exit(_exit_code([*srun, *torchrun, *_meeting(nodes), sys.argv[0]], _tell_the_steps))


def _exit_code(command: list[str], tell: Callable[[subprocess.Popen, int], None]) -> int:
    """Run a command to its end; whoever asks this process to end asks the command, which then saves what it has.

    Its session is its own: what a terminal or Slurm tells a whole group of processes reaches it once, from here.
    """
    with subprocess.Popen(command, start_new_session=True) as started:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: tell(started, number))
        code = started.wait()
    return code if code >= 0 else 128 - code


def _tell_the_steps(srun: subprocess.Popen, number: int) -> None:
    """Send a signal to what srun has started, through Slurm: srun itself kills it where it is asked to end.

    Where Slurm ends the job it has told them already, and refuses.
    """
    command = ["scancel", "--quiet", f"--signal={number}", os.environ["SLURM_JOB_ID"]]
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


def _meeting(nodes: int) -> list[str]:
    """Where the nodes' processes meet: on the first of them."""
    job, (port, ports) = os.environ["SLURM_JOB_ID"], _PORTS
    names = _names(job)
    if len(names) != nodes:
        told = f"the job has the nodes {', '.join(names)}, and asked for {nodes}"
        raise PipelineError(told, where=f"Slurm's job {job}", mend="set the resource nodes to what Slurm gives it")
    endpoint = f"{names[0]}:{port + int(job) % ports}"
    return [f"--nnodes={nodes}", f"--rdzv_id={job}", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}"]


def _names(job: str) -> list[str]:
    """The nodes of a job of Slurm."""
    listed = re.search(r"\bNodeList=(\S+)", _scontrol("job", job))
    return _scontrol("hostnames", listed[1]).split() if listed else []


def _scontrol(*what: str) -> str:
    try:
        return subprocess.run(["scontrol", "show", *what], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        why = str(getattr(error, "stderr", None) or error).strip()
        raise PipelineError(f"Slurm does not say which nodes the job has: {why}", where="scontrol") from error


def share_of(whole: int) -> int:
    """This process's share of something that those of its node have together, at least 1; all where it is alone."""
    return max(1, whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def log_of(log: str) -> str:
    """The job's log for the first process; the others' words go to Slurm's alone."""
    return log if os.environ.get("RANK", "0") == "0" else os.devnull


def shared_settings(settings: Mapping) -> dict:
    """A training's settings for one of the processes: the forward passes of an update, divided by their number.

    Raises:
        PipelineError: they cannot be divided so.
    """
    processes, optimiser = schedule.processes(), settings["optimiser"]
    passes, rest = divmod(optimiser["gradient_accumulation"], processes)
    if rest:
        told = f"{optimiser['gradient_accumulation']} forward passes cannot be shared by {processes} processes"
        raise PipelineError(told, where="gradient_accumulation", mend="set processes and nodes to what divides it")
    return {**settings, "optimiser": {**optimiser, "gradient_accumulation": passes}}
