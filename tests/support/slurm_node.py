"""A Slurm on this machine: munged, slurmctld and two slurmds on the loopback, with GPUs that are none.

Jobs run on the first node. A job that asks for the partition of both nodes may use the second too, which is the same
machine under another name.

Debian's packages slurm-wlm and munge bring the programs. Slurm is read from /etc/slurm alone, since jobs drop
SLURM_CONF, so a machine that has one configured keeps it, and none is started there.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_CONFIGURED, _DEVICES = Path("/etc/slurm/slurm.conf"), Path("/etc/slurm/gres.conf")
_PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo")
BOTH = "both"  # the partition
CPUS, _MEMORY = 8, 64_000  # what a node says it has, so that jobs of two CPUs always run side by side
# Without accounting, sacct answers nothing, and Snakemake's plugin, which turns to it when scontrol was slow for once,
# waits for ever. This one knows what squeue knows.
_SACCT = """\
#!/bin/sh
for name; do :; done
exec squeue --states=all --noheader --format='%i|%T' --name "$name"
"""
_CONF = """\
ClusterName={name}
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MinJobAge=600
OverTimeLimit=0
KillWait=2
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} Gres=gpu:fake:2 State=UNKNOWN
NodeName={nodes[0]} NodeHostname={nodes[0]} NodeAddr=127.0.0.1 Port=6818
NodeName={nodes[1]} NodeHostname={nodes[1]} NodeAddr=127.0.0.1 Port=6819
PartitionName=main Nodes={nodes[0]} Default=YES MaxTime=INFINITE State=UP
PartitionName={both} Nodes=ALL MaxTime=INFINITE State=UP
"""


def answers() -> bool:
    """Whether a Slurm answers already."""
    return shutil.which("sinfo") is not None and _told("sinfo", "--noheader") is not None


def lacking() -> str | None:
    """Why none can be started here; None if it can."""
    if missing := [name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]:
        return f"not installed: {', '.join(missing)} (Debian's slurm-wlm and munge)"
    if os.geteuid() != 0:
        return "only root may start a Slurm"
    if _CONFIGURED.exists():
        return f"{_CONFIGURED} is there, and its Slurm does not answer"
    return None


@contextmanager
def slurm_node(root: Path, cpus: int = CPUS) -> Iterator[None]:
    """Run one for the length of a block; its processes are ended by their ids.

    Args:
        root: a folder for its state and logs, and `bin`, which is to stand first on Snakemake's PATH.
        cpus: how many a node says it has, whatever the machine has.

    Raises:
        TimeoutError: one of its processes does not answer within a minute.
    """
    host, name = socket.gethostname().split(".")[0], f"tests{os.getpid()}"
    nodes = (host, f"{host}-again")
    for folder in ("state", "bin", *(f"spool-{node}" for node in nodes)):
        (root / folder).mkdir(parents=True)
    (root / "bin/sacct").write_text(_SACCT)
    (root / "bin/sacct").chmod(0o755)
    devices = [root / "gpu0", root / "gpu1"]
    for device in devices:
        subprocess.run(["mknod", str(device), "c", "1", "3"], check=True)  # the null device
    with ExitStack() as started:
        started.callback(_end_jobs_of, name)
        with open(_CONFIGURED, "x") as file:  # which fails where another has just put its own there
            started.callback(_CONFIGURED.unlink, missing_ok=True)
            file.write(_CONF.format(root=root, name=name, nodes=nodes, both=BOTH, cpus=cpus, memory=_MEMORY))
        started.callback(_DEVICES.unlink, missing_ok=True)
        entry = "NodeName={nodes} Name=gpu Type=fake File={device}\n"
        _DEVICES.write_text("".join(entry.format(nodes=",".join(nodes), device=device) for device in devices))
        if _told("munge", "-n") is None:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            started.enter_context(_running(root, "runuser", "-u", "munge", "--", "/usr/sbin/munged", "--foreground"))
            _wait_for(lambda: _told("munge", "-n") is not None, "munged")
        started.enter_context(_running(root, "/usr/sbin/slurmctld", "-D"))
        _wait_for(answers, "slurmctld")
        for node in nodes:
            started.enter_context(_running(root, "/usr/sbin/slurmd", "-D", "-N", node))
        _wait_for(lambda: _told("sinfo", "--noheader", "--partition", BOTH, "--format=%t %D") == "idle 2", "slurmd")
        try:
            yield
        finally:
            subprocess.run(["scancel", "--user", "root"], check=True)
            _wait_for(lambda: _told("squeue", "--noheader") == "", "squeue")


def _end_jobs_of(cluster: str) -> None:
    """End processes of its jobs that live on: Slurm loses those whose parents end before them, as a stopped one's do.

    They are known by the name of the cluster in their environment, which is of this process alone.
    """
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            if f"SLURM_CLUSTER_NAME={cluster}".encode() in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


@contextmanager
def _running(root: Path, *command: str) -> Iterator[None]:
    with open(root / "daemons.log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def _told(*command: str) -> str | None:
    """What a command prints; None where it fails."""
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return run.stdout.strip() if run.returncode == 0 else None


def _wait_for(ready, what: str) -> None:
    end = time.monotonic() + 60
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} does not answer")
        time.sleep(0.2)
