"""`python tests/attack --help`."""

import os
import sys
from pathlib import Path

sys.path[0:1] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "support")]
# Before anything heavy is imported: a process that is forked must have no threads, and needs no network.
os.environ.update(
    OMP_NUM_THREADS="1",
    JE_ARROW_MALLOC_CONF="background_thread:false",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

from attack.campaign import main  # noqa: E402

sys.exit(main())
