"""The Hugging Face Hub: every download, and one wording of every failure. Its library is imported when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_prune_lora.errors import PipelineError, SourceError

if TYPE_CHECKING:
    from datasets import DatasetBuilder

_CONNECT = "connect to the network (unset HF_HUB_OFFLINE), or copy it here and give its local path"


def fetch_files(repo_id: str, files: Sequence[str], *, revision: str | None = None, cache: Path | None = None) -> Path:
    """Fetch those files of a model's repository that match one of some patterns; what was fetched once is not again.

    Args:
        repo_id: owner/name.
        files: names or globs. What can run code when it is loaded (pickles) is up to the caller to leave out.
        revision: a commit, branch or tag; None means the default branch.
        cache: where downloads are kept; None means the Hub library's own place.

    Returns:
        The directory that holds them, in the cache.

    Raises:
        SourceError: they cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    given = {"revision": revision, "cache_dir": cache}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        folder = snapshot_download(repo_id, allow_patterns=list(files), **options)
    except Exception as error:  # the library and its HTTP client raise a dozen unrelated kinds
        what, mend = _fault(error, repo_id, revision)
        raise SourceError(what, where=f"the Hub model {repo_id}", mend=mend) from error
    return Path(folder)


def fetched_files(repo_id: str, files: Sequence[str]) -> Path | None:
    """The directory of a model's files in the local cache; None if they were never fetched. Asks no network."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(files), local_files_only=True))
    except Exception:  # as above; whatever it is, they are not there
        return None


def fetch_dataset_file(repo_id: str, file: str, *, revision: str, kind: type[PipelineError], mend: str) -> Path:
    """Fetch one file of a dataset's repository.

    Args:
        repo_id: owner/name.
        file: its path in the repository.
        revision: a commit or reference.
        kind: the error to raise.
        mend: what the error says to do.

    Raises:
        kind: it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, file, repo_type="dataset", revision=revision))
    except Exception as error:
        what, _ = _fault(error, repo_id, revision)
        raise kind(f"{file}: {what}", where=f"the Hub dataset {repo_id}", mend=mend) from error


def open_dataset(repo_id: str, *, revision: str, config: str | None, kind: type[PipelineError]) -> DatasetBuilder:
    """A dataset of the Hub at one commit, its rows not fetched yet.

    Without network the dataset library takes what its cache holds under the dataset's name, whatever commit that is of;
    of another commit, it is refused here.

    Args:
        repo_id: owner/name.
        revision: a commit, 40 hex digits.
        config: which of its configurations; None takes the only or the default one.
        kind: the error to raise.

    Raises:
        kind: it cannot be found, or is of another commit.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(f"hf://datasets/{repo_id}", config, revision=revision)
    except Exception as error:
        raise dataset_error(error, repo_id, revision, kind) from error
    if builder.hash != revision:
        raise kind(
            f"the Hub cannot be reached, and the local cache holds commit {builder.hash}, not {revision}",
            where=f"the Hub dataset {repo_id}",
            mend=_CONNECT,
        )
    return builder


def dataset_error(error: Exception, repo_id: str, revision: str, kind: type[PipelineError]) -> PipelineError:
    """The error to raise for one of the dataset library while it finds, fetches or reads a dataset of the Hub."""
    import datasets.exceptions
    from huggingface_hub import errors

    of_hub = next(
        (e for e in (error, error.__cause__, error.__context__) if isinstance(e, errors.HfHubHTTPError)), None
    )
    where = f"the Hub dataset {repo_id}"
    if isinstance(error, (ConnectionError, errors.OfflineModeIsEnabled)):
        return kind("the Hub cannot be reached, and the local cache does not hold it", where=where, mend=_CONNECT)
    if of_hub is None and isinstance(error, (datasets.exceptions.DatasetNotFoundError, FileNotFoundError)):
        return kind(
            f"there is no such dataset, or it is private, or it has no commit {revision}",
            where=where,
            mend="check id and commit, or log in with `hf auth login`",
        )
    if of_hub is None and isinstance(error, ValueError):  # a split or a configuration that it has not
        return kind(str(error).splitlines()[0].rstrip("."), where=where, mend="ask for what it has")
    what, mend = _fault(of_hub or error, repo_id, revision)
    return kind(what, where=where, mend=mend)


def _fault(error: Exception, repo_id: str, revision: str | None) -> tuple[str, str]:
    """What went wrong and how to mend it."""
    from huggingface_hub import errors

    # The more special ones first: a gated repository is a kind of repository that is not found.
    if isinstance(error, errors.GatedRepoError):
        login = "log in with `hf auth login` (or set HF_TOKEN)"
        return "the repository is gated", f"accept its terms at https://huggingface.co/{repo_id} and {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no commit {revision}", "copy the hash from its commit history"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private", "check the id, or log in with `hf auth login`"
    if isinstance(error, errors.HFValidationError):
        return f"is not a repository id: {error}", "write owner/name"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the Hub cannot be reached, and the local cache does not hold it", _CONNECT
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file any more", "name another revision"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the download failed: {first}", "run it again; files that are complete are not fetched twice"
