"""A job's script that starts itself in two processes on each of NODES nodes; asked to end, each takes a second.

Each leaves a file beside the script, `ready` with the GPUs that it sees and then `saved`, by the number of its process.
"""

import os
import signal
import sys
import time
from pathlib import Path

from mistral_prune_lora.workflow.together import start_together

start_together(2, int(os.environ["NODES"]), "srun")
here, rank = Path(__file__).parent, os.environ["RANK"]


def save(number, frame):
    time.sleep(1)
    (here / f"saved.{rank}").touch()
    sys.exit(128 + number)


signal.signal(signal.SIGTERM, save)
(here / f"ready.{rank}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
time.sleep(60)
