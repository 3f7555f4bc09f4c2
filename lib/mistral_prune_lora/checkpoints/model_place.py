"""Where a model that a user names lies: in a directory, or in a Hub repository that is fetched into the Hub's cache."""

from __future__ import annotations

import os
from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.directories import is_model_dir
from mistral_prune_lora.checkpoints.families import read_config
from mistral_prune_lora.errors import CheckpointError, SourceError

# Never the pickled weights, nor the second copy that Mistral's repositories carry.
_FILES = ["*.json", "model*.safetensors", "tokenizer*", "*.jinja", "merges.txt", "vocab.*"]


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
    # Weights come after the configuration is known to be one that is taken.
    read_config(_download(path, ["config.json"]))
    return _download(path, _FILES)


def _download(repo_id: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo_id, allow_patterns=files, ignore_patterns=["consolidated*"])
    except Exception as error:  # huggingface_hub and its HTTP client raise a dozen unrelated kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"is no local directory, and cannot be fetched from the Hub: {first}",
            where=repo_id,
            mend="Check the path; for a Hub id, check the network and, for a gated model, log in with `hf auth login`",
        ) from error
    return Path(folder)
