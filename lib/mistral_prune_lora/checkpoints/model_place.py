"""Where a model that a user names lies: in a directory, or in a Hub repository that is fetched into the Hub's cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.directories import INDEX_FILE, LAYERS_MAP, SINGLE_FILE, is_model_dir
from mistral_prune_lora.checkpoints.families import read_config
from mistral_prune_lora.checkpoints.manifest import MANIFEST, PRUNE_LOG
from mistral_prune_lora.checkpoints.tokenizer import TOKENIZER_FILES
from mistral_prune_lora.errors import CheckpointError, SourceError
from mistral_prune_lora.hub import fetch_files

# What a model's repository is asked for, by name: *.bin can run code when it is loaded.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    SINGLE_FILE,
    "model-*-of-*.safetensors",
    INDEX_FILE,
    *TOKENIZER_FILES,
)
_PRUNED_FILES = (MANIFEST, PRUNE_LOG, LAYERS_MAP, "merge.json")


def model_directory(path: str) -> Path:
    """The directory of a model: the path itself, or where its Hub repository was downloaded to.

    Raises:
        CheckpointError: the path holds no model, or one of a family that is not taken.
        SourceError: a Hub id that cannot be fetched.
    """
    if os.path.exists(path):
        if not is_model_dir(path):
            raise CheckpointError(
                "is neither a model (no config.json) nor a bundle (no layer_XXX.safetensors)",
                where=path,
                mend="Give the directory that pruning or merging wrote",
            )
        read_config(path)
        return Path(os.path.abspath(path))
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        # open_checkpoint words the error: it cannot be a repository's id.
        return open_checkpoint(path).path
    try:
        return fetch_model(path, [*MODEL_FILES, *_PRUNED_FILES])
    except SourceError as error:
        # It may as well be a path with a slip in it.
        raise SourceError(f"is no local directory, and on the Hub {error.what}", where=path, mend=error.mend) from error


def fetch_model(repo_id: str, files: Sequence[str], *, revision: str | None = None, cache: Path | None = None) -> Path:
    """Fetch a model from the Hub; its weights come after its configuration is known to be one that is taken.

    Arguments, result and errors as for `hub.fetch_files`; CheckpointError for a family that is not taken.
    """
    read_config(fetch_files(repo_id, ["config.json"], revision=revision, cache=cache))
    return fetch_files(repo_id, files, revision=revision, cache=cache)
