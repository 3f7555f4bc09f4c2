"""Whether a machine has GPUs, and which of them is this job's: one that no other job of the same user computes on.

A job holds a lock (flock) on a file that stands for its GPU for as long as it lives. The kernel takes the lock away
however the job ends, by a kill too, so nothing is ever left to be cleaned up. The files lie in the machine's own
temporary folder and are named after the machine, in case that folder is not its own after all.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from mistral_prune_lora.errors import DeviceError, printable

_LOOK_AGAIN = 1.0  # seconds
_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")
_held: list[int] = []  # descriptors, open until the process ends


def has_gpus() -> bool:
    """Whether a GPU's driver is there, NVIDIA's or AMD's, in Windows' Linux too; torch, which is slow to load, is not
    asked, and may be unable to use it."""
    return any(map(os.path.exists, _DRIVERS))


def batch_job() -> str | None:
    """The job of a cluster that this process runs in, as "SLURM_JOB_ID 4711"; None outside of any."""
    # JOB_ID alone may be anybody's; Grid Engine sets it beside names of its own.
    names = ["SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"]
    names += ["JOB_ID"] if any(name.startswith("SGE_") for name in os.environ) else []
    return next((f"{name} {os.environ[name]}" for name in names if os.environ.get(name)), None)


def own_gpu(count: int) -> int:
    """The number of a GPU that nobody else holds, among those that this process sees; waits for one, and says so.

    Args:
        count: how many it sees.

    Raises:
        DeviceError: the locks' folder cannot be used.
    """
    names = _names(count)
    files, said = [_folder() / f"{socket.gethostname()}.gpu-{_plain(name)}.lock" for name in names], False
    while True:
        for number, file in enumerate(files):
            if _take(file):
                return number
        if not said:
            told = f"all {count} GPUs are held by other jobs of yours: waiting for one"
            print(f"{told} (locks in {printable(str(files[0].parent))})", file=sys.stderr, flush=True)
            said = True
        time.sleep(_LOOK_AGAIN)


def _names(count: int) -> list[str]:
    """What the machine calls the GPUs that this process sees, so that processes that see different ones agree."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[:count] if len(visible) >= count else [str(number) for number in range(count)]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]", "_", name)


def _folder() -> Path:
    """The folder of this user's locks, which nobody else may write to."""
    folder = Path(tempfile.gettempdir(), f"mistral_prune_lora-{os.getuid()}")
    try:
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
    except OSError as error:
        raise _unusable(folder, error.strerror) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise _unusable(folder, "it is not a folder of yours")
    return folder


def _take(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(file, error.strerror) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError as error:
        os.close(descriptor)
        raise _unusable(file, error.strerror) from None
    _held.append(descriptor)
    return True


def _unusable(place: Path, why: str | None) -> DeviceError:
    told = f"the locks by which jobs share this machine's GPUs cannot be taken: {why}"
    return DeviceError(told, where=place, mend="let TMPDIR name a local folder that you may write to")
