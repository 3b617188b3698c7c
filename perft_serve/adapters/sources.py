"""Where adapters are read from: a source as text, brought to a local folder; and who may name which sources.

A source is a local folder, a Hugging Face Hub repository (`org/name`, `org/name@revision`, `hf://org/name@revision`), or a URL
that fsspec knows (`s3://bucket/folder`, `gs://...`, `memory://...`, `file://...`). A folder that exists goes before a
repository of that name. Only the two files of an adapter are fetched, and nothing here opens them. What is larger than can be
of use is not fetched, where its source tells the size beforehand.

Messages do not name the source: whoever asked for it knows it, and others need not.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from perft.errors import AdapterError
from perft_serve.adapters.catalog import CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_MAX_CONFIG_BYTES = 1 << 20
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@\s]+))?")
_LOCAL_SCHEMES = ("file", "local")
# Extras of this project that bring what fsspec needs for a scheme; for others fsspec says itself what is missing.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def is_remote(source: str) -> bool:
    """Whether a source is read over a network, as far as its text says; nothing is looked at, so this cannot hang."""
    scheme = _SCHEME.match(source)
    if scheme is not None:
        return scheme["scheme"].lower() not in _LOCAL_SCHEMES
    return not os.path.isabs(source) and not source.startswith((".", "~")) and _hub_id(source) is not None


def source_kind(source: str) -> Literal["folder", "hub", "url"]:
    """Where a source is read from, as far as its text says."""
    if not is_remote(source):
        return "folder"
    scheme = _SCHEME.match(source)
    return "hub" if scheme is None or scheme["scheme"].lower() == "hf" else "url"


@contextmanager
def fetched(source: str, max_bytes: int | None = None) -> Iterator[Path]:
    """A folder with the files of the adapter at `source`, for as long as the context lasts. It may take long.

    Args:
        max_bytes: of the weights; larger ones are not fetched from elsewhere if that can be told before.

    Raises:
        AdapterError: there is none, or it cannot be reached; an exception of the store's own library can come as well.
    """
    try:
        folder = _folder(source)
        is_there = folder is not None and folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop of links, nobody's home
        raise AdapterError("its source is no path, no Hub id (org/name) and no URL") from error
    if folder is not None:
        if not is_there:
            raise AdapterError("its folder does not exist")
        yield folder
    elif (hub := _hub_id(source)) is not None:
        yield _fetch_from_hub(*hub, max_bytes)
    elif _SCHEME.match(source):
        with tempfile.TemporaryDirectory(prefix="perft-adapter-") as private:
            _fetch_url(source, Path(private), max_bytes)
            yield Path(private)
    else:
        raise AdapterError(
            "its source is no folder that exists, no Hub id (org/name or org/name@revision) and no URL (s3://...)"
        )


def check_sizes(folder: Path, max_bytes: int | None) -> None:
    """Refuse an adapter that is too large to be read. A file that is not there is for the reader to tell.

    Raises:
        AdapterError: its weights have more than `max_bytes`, or its configuration is no configuration.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with suppress(OSError):
            _check_size(name, (folder / name).stat().st_size, max_bytes)


def _check_size(name: str, num_bytes: int | None, max_bytes: int | None) -> None:
    limit = _MAX_CONFIG_BYTES if name == CONFIG_FILE else max_bytes
    if num_bytes is not None and limit is not None and num_bytes > limit:
        advice = "; start the server with a larger --adapter-memory" if name == WEIGHTS_FILE else ""
        raise AdapterError(f"its {name} has {num_bytes:,} bytes, and no more than {limit:,} are read here{advice}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePolicy:
    """Which sources may be named over HTTP: by default only what lies in the folder of adapters.

    Args:
        allowed: prefixes. A folder (absolute, or one that exists) allows everything below it; a URL or a Hub id or
            organisation allows what continues it behind a `/` or `@`; `*` allows everything.
        adapter_dir: the folder of adapters, if there is one.
    """

    allowed: tuple[str, ...] = ()
    adapter_dir: str | None = None

    def allows(self, source: str) -> bool:
        """Whether `source` may be named."""
        if ".." in re.split(r"[/\\]", unquote(source)) or "::" in source:
            return False  # `::` chains file systems: what is read is not what the text begins with
        prefixes = (*self.allowed, *filter(None, (self.adapter_dir,)))
        try:
            return any(_is_below(source, prefix) for prefix in prefixes)
        except (OSError, ValueError, RuntimeError):  # no path at all: too long, a NUL, a loop of links, nobody's home
            return False

    def check(self, source: str) -> None:
        """Refuse a source that may not be named.

        Raises:
            AdapterError: it may not.
        """
        if not self.allows(source):
            raise AdapterError(
                f"adapters may not be loaded from {source!r} here; the server's operator allows sources with "
                "--allow-adapter-source PREFIX (a folder, a Hub organisation or repository, a URL, or * for all)"
            )


def _is_below(source: str, prefix: str) -> bool:
    if prefix == "*":
        return True
    allowed_folder, folder = _folder(prefix), _folder(source)
    if allowed_folder is not None or folder is not None:
        # links are followed: what counts is where the files are
        return (
            allowed_folder is not None
            and folder is not None
            and folder.resolve().is_relative_to(allowed_folder.resolve())
        )
    text, start = (_without_hub_scheme(each) for each in (source, prefix))
    return text == start or text.startswith((start.rstrip("/") + "/", start.rstrip("/") + "@"))


def _folder(source: str) -> Path | None:
    """The local folder that a source stands for, if it can only be one or is there."""
    scheme = _SCHEME.match(source)
    if scheme is not None:
        return Path(source[scheme.end() :]) if scheme["scheme"].lower() in _LOCAL_SCHEMES else None
    path = Path(source).expanduser()
    if path.is_absolute() or source.startswith((".", "~")) or path.is_dir():
        return path
    return None


def _without_hub_scheme(source: str) -> str:
    scheme = _SCHEME.match(source)
    return source[scheme.end() :] if scheme is not None and scheme["scheme"].lower() == "hf" else source


def _hub_id(source: str) -> tuple[str, str | None] | None:
    """(repository, revision), if the source names one."""
    match = _HUB_ID.fullmatch(_without_hub_scheme(source))
    return None if match is None else (match["repo"], match["revision"])


def _fetch_from_hub(repo: str, revision: str | None, max_bytes: int | None) -> Path:
    # not needed by who serves local folders only, and slow to import
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [CONFIG_FILE, WEIGHTS_FILE]
    try:
        if max_bytes is not None:
            with suppress(DryRunError):  # the Hub is out of reach, but what is wanted may be in the local cache
                for file in snapshot_download(repo, revision=revision, allow_patterns=wanted, dry_run=True):
                    _check_size(file.filename, file.file_size, max_bytes)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except AdapterError:
        raise
    except GatedRepoError as error:
        raise AdapterError("its Hub repository is gated: ask for access, and set HF_TOKEN on the server") from error
    except RepositoryNotFoundError as error:
        raise AdapterError(
            "there is no such Hub repository and no such folder; for a private repository, set HF_TOKEN on the server"
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterError("its Hub repository has no such revision") from error
    except LocalEntryNotFoundError as error:
        raise AdapterError(
            "it is no folder, and as a Hub repository it is not in the local cache, while the Hub cannot be reached "
            "(HF_HUB_OFFLINE is set, or the network is down)"
        ) from error
    except HFValidationError as error:
        raise AdapterError("its source is no folder that exists, and cannot be a Hub id (org/name)") from error
    except EntryNotFoundError as error:
        raise AdapterError("its Hub repository lacks a file of an adapter") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"its Hub repository cannot be fetched ({type(error).__name__})") from error


def _fetch_url(source: str, folder: Path, max_bytes: int | None) -> None:
    import fsspec  # as above

    scheme = source.partition("://")[0].lower()
    if "::" in source:
        raise AdapterError("chained URLs ('::') are not supported as a source")
    try:
        file_system, path = fsspec.core.url_to_fs(source)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        advice = f"pip install 'perft-serve[{extra}]'" if extra else str(error)
        raise AdapterError(f"{scheme}:// needs a package that is not installed: {advice}") from error
    except ValueError as error:
        raise AdapterError(f"{scheme}:// is no kind of source that is known here, or the URL is not whole") from error
    file_system.invalidate_cache()  # listings that were kept may be older than the files
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            remote = f"{path.rstrip('/')}/{name}"
            _check_size(name, file_system.info(remote).get("size"), max_bytes)
            file_system.get_file(remote, os.fspath(folder / name))
        except AdapterError:
            raise
        except FileNotFoundError as error:
            raise AdapterError(f"there is no {name} at its source") from error
        except PermissionError as error:
            raise AdapterError(f"{name} at its source may not be read; check the server's credentials") from error
        except (OSError, ValueError) as error:
            raise AdapterError(f"{name} at its source cannot be read ({type(error).__name__})") from error
