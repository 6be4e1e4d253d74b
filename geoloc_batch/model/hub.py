"""Files from a Hugging Face hub, fetched only when asked for. Free of torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

from geoloc_batch.errors import CheckpointError, HubError
from geoloc_batch.model.config import STREETCLIP
from geoloc_batch.model.heads import HEADS_LICENCE, HEADS_REPO

STREETCLIP_REVISION = "e3561ba2ad9bf14c9efd6b0092607b8497efbfea"
"""The commit of the default encoder: the last of main, "Update README.md", as the repository's page shows it."""

KNOWN_LICENCES = {STREETCLIP: "CC-BY-NC 4.0", HEADS_REPO: HEADS_LICENCE}
"""Shown even where the model card is not at hand."""

PINNED_REVISIONS = {STREETCLIP: STREETCLIP_REVISION}
"""What an id without @REVISION stands for; every other repository stands for its main branch."""

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weights of a checkpoint, in the order in which they are preferred."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def split_hub_id(encoder: str) -> tuple[str, str | None] | None:
    """Tell OWNER/NAME[@REVISION] apart: the repository and its revision, or None where the text is no hub id."""
    repo, _, revision = encoder.partition("@")
    if not _REPO.fullmatch(repo) or repo.startswith((".", "/")) or encoder.endswith("@"):
        return None
    return repo, revision or PINNED_REVISIONS.get(repo)


def fetch(repo: str, filename: str, *, revision: str | None = None) -> Path:
    """One file of a repository, from the local cache or over the network.

    HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN are honoured, as huggingface_hub reads them.

    Args:
        repo: OWNER/NAME.
        filename: path inside the repository.
        revision: branch, tag or commit; None is the main branch.

    Returns:
        The file's path in the cache: .../snapshots/COMMIT/FILENAME.

    Raises:
        HubError: the file is not there, or cannot be had; the message says which and what helps.
    """
    path = _fetch_or_none(repo, filename, revision, is_lone=True)
    if path is None:
        raise HubError(
            f"{_asked(repo, filename, revision)}: the repository has no such file; check the name and revision"
        )
    return path


def cached(repo: str, filename: str) -> Path | None:
    """The file as the cache has it for the main branch; None where it lacks it. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, filename)
    return Path(path) if isinstance(path, str) else None


def commit_of(path: Path) -> str | None:
    """The commit that a file of the cache belongs to: .../snapshots/COMMIT/...; None for a file from elsewhere."""
    above = (parent.name for parent in path.parents if parent.parent.name == "snapshots")
    return next((name for name in above if _COMMIT.fullmatch(name)), None)


def fetch_checkpoint(repo: str, revision: str | None) -> Path:
    """The files of a CLIP checkpoint as a folder: config.json, the weights, and what of the rest exists.

    All files come from one commit, the one that ``revision`` stood for when config.json was fetched: the folder's name.

    Raises:
        HubError: a file could not be had.
        CheckpointError: the repository has no config.json, or no weights of a known form.
    """
    config = _fetch_or_none(repo, "config.json", revision)
    if config is None:
        raise CheckpointError(f"{repo} has no config.json: it is not a Hugging Face CLIP checkpoint")
    commit = config.parent.name
    weights = _first_of(repo, WEIGHT_FILES, commit)
    if weights is None:
        raise CheckpointError(f"{repo}@{commit} has no weights: looked for {', '.join(WEIGHT_FILES)}")
    if weights.name.endswith(".index.json"):
        for shard in shards_of(weights):
            fetch(repo, shard, revision=commit)
    # Other pixels would come out as other features without a word: an unknown answer is an error here.
    if _fetch_or_none(repo, "preprocessor_config.json", commit) is None:
        _fetch_or_none(repo, "processor_config.json", commit)
    _fetch_quietly(repo, "README.md", commit)
    return config.parent


def shards_of(index: Path) -> list[str]:
    """File names that an index of sharded weights names, sorted, each once.

    Raises:
        CheckpointError: the index cannot be read, or names a file outside its folder.
    """
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of sharded weights: {error!r}; fetch it again") from None
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names the shard {shard!r}, which is not a plain file name beside it")
    if not shards:
        raise CheckpointError(f"{index} names no shards: its weight_map is empty")
    return shards


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _first_of(repo: str, names: tuple[str, ...], revision: str) -> Path | None:
    """The first of several files that exists; None when the hub says that none of them does."""
    unknown: HubError | None = None
    for name in names:
        try:
            # Once the hub could not be asked, only what lies in the cache counts, and no second timeout is waited for.
            path = _fetch_or_none(repo, name, revision, cached_only=unknown is not None)
        except HubError as error:
            unknown = unknown or error
            continue
        if path is not None:
            return path
    if unknown is not None:
        raise unknown
    return None


def _fetch_quietly(repo: str, filename: str, revision: str) -> None:
    try:
        _fetch_or_none(repo, filename, revision)
    except HubError:
        return


def _fetch_or_none(
    repo: str, filename: str, revision: str | None, *, cached_only: bool = False, is_lone: bool = False
) -> Path | None:
    """The file's path, or None when the repository is known to lack it; HubError when neither is known.

    `is_lone` where the file is wanted by itself, and not the checkpoint that it is a part of.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    by_hand = _file_by_hand(repo, filename, revision) if is_lone else _by_hand(repo, revision)
    try:
        # A commit never changes: what the cache knows about it needs no question, and no wait where none is answered.
        if _COMMIT.fullmatch(revision or "") and (
            try_to_load_from_cache(repo, filename, revision=revision) is _CACHED_NO_EXIST
        ):
            return None
        return Path(hf_hub_download(repo, filename, revision=revision, local_files_only=cached_only))
    except HFValidationError as error:
        raise CheckpointError(f"{repo!r} is no hub id: {first_line(error)}") from None
    except LocalEntryNotFoundError as error:
        raise HubError(_no_answer(repo, filename, revision, error, by_hand)) from error
    except EntryNotFoundError:
        return None
    except Exception as error:
        # huggingface_hub lets through whatever its HTTP library raises, and that library has changed between releases.
        raise HubError(_refused(repo, filename, revision, error, by_hand)) from error


def _asked(repo: str, filename: str, revision: str | None) -> str:
    from huggingface_hub import constants

    return f"{filename} of {repo}@{revision or 'main'} from {constants.ENDPOINT}"


def _by_hand(repo: str, revision: str | None) -> str:
    return (
        f"On a machine with network: `hf download {repo} --revision {revision or 'main'} --local-dir FOLDER`, "
        "then copy FOLDER here and pass it as --encoder; or copy the hub's cache and point HF_HOME at it"
    )


def _file_by_hand(repo: str, filename: str, revision: str | None) -> str:
    return (
        f"On a machine with network: `hf download {repo} {filename} --revision {revision or 'main'} --local-dir "
        f"FOLDER`, then copy FOLDER here and give FOLDER/{filename} in place of the name (--head, --cells); or copy "
        "the hub's cache and point HF_HOME at it"
    )


def _no_answer(repo: str, filename: str, revision: str | None, error: Exception, by_hand: str) -> str:
    """Message for a file that is not in the cache while the hub could not be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set. Unset it, or:"
    else:
        reason = first_line(error.__cause__ or error)
        why = f"the hub gave no answer ({reason}). Check HF_ENDPOINT and the network, or:"
    return (
        f"{_asked(repo, filename, revision)} is needed, is not in the cache {constants.HF_HUB_CACHE}, and {why} "
        f"{by_hand}"
    )


def _refused(repo: str, filename: str, revision: str | None, error: Exception, by_hand: str) -> str:
    """Message for an answer of the hub that is not the file."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    asked = _asked(repo, filename, revision)
    if type(error).__name__ == "RevisionNotFoundError":
        return f"{asked}: no such revision; check what stands after the @"
    if status in (401, 403) or type(error).__name__ == "GatedRepoError":
        return (
            f"{asked}: access refused (HTTP {status}): no such repository, or a gated or private one. Check the name; "
            f"accept its terms on its page and set HF_TOKEN, or run `hf auth login`. {by_hand}"
        )
    if status == 404:
        return f"{asked}: no such repository (HTTP 404); check OWNER/NAME, or pass a folder as ./FOLDER"
    return f"{asked}: {first_line(error)}. Try again, or: {by_hand}"
