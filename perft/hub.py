"""Bringing an adapter to the Hugging Face Hub: the files that belong to it, in one commit.

In: an adapter folder, a repository's name, a token that huggingface_hub finds (`HF_TOKEN`, `hf auth login`). Out: the commit's
URL. Checkpoints and whatever else lies in the folder stay where they are.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, errors

from perft.adapter import CONFIG_FILE, WEIGHTS_FILE
from perft.errors import PerftError
from perft.lora import read_any_adapter
from perft.provenance import CARD_FILE, TRAINING_FILE, method_name

# written by a training run, and pushed if they are there
_BESIDE = (CARD_FILE, TRAINING_FILE, "training_log.jsonl", "loss.png")


def push_adapter(
    folder: str | Path, repo_id: str, *, public: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Uploads the adapter in `folder`, all of it checked before, and returns the URL of the commit.

    Args:
        folder: the adapter's.
        repo_id: `org/name`; made if it is not there. One that is there keeps its visibility.
        public: make a new repository public.
        revision: the branch, made if it is not there; `None`: the default one.
        message: the commit's.

    Raises:
        AdapterError: the adapter is broken.
        PerftError: the Hub cannot be reached, or refuses.
    """
    path = Path(folder)
    adapter = read_any_adapter(path)
    files = [CONFIG_FILE, WEIGHTS_FILE, *(name for name in _BESIDE if (path / name).is_file())]
    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="model", private=not public, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            operations=[CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path / name)) for name in files],
            commit_message=message or f"{method_name(adapter)} adapter {adapter.digest[:12]}",
            revision=revision,
        )
    except errors.HFValidationError as error:  # raised before anything is sent
        raise PerftError(f"{repo_id!r} cannot be the name of a repository on the Hub (org/name): {error}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalTokenNotFoundError) as error:
        raise PerftError(_unreachable(error)) from error
    except errors.HfHubHTTPError as error:
        raise PerftError(_refusal(repo_id, error)) from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # httpx's: no connection, or none that held
        raise PerftError(
            f"the Hub cannot be reached ({type(error).__name__}: {error}); nothing was pushed to {repo_id}"
        ) from error
    return str(commit.commit_url)


def _unreachable(error: Exception) -> str:
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub is switched off here (HF_HUB_OFFLINE is set); unset it to push"
    return "no token for the Hub: run `hf auth login`, or set HF_TOKEN to a token that may write"


def _refusal(repo_id: str, error: errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the Hub knows no valid token (401): run `hf auth login`, or set HF_TOKEN, to push to {repo_id}"
    if status == 403:
        return f"the token may not write to {repo_id} (403): use one with write access, or a namespace of your own"
    reason = error.server_message or str(error).splitlines()[0]
    return f"the Hub refuses {repo_id} ({status}): {reason}"
