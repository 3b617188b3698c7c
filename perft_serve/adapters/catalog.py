"""Which adapters there are, by name: registered ones, and the sub-folders of a folder of adapters, found when asked for.

In: names and sources. Out: an `AdapterRef`, one version of a name, which a request pins when it comes. Plain Python; it opens
no file of an adapter, so ten thousand names cost a directory listing. It does not know whether an adapter can be loaded.
One thread at a time uses it.
"""

from __future__ import annotations

import os
import re
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perft.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,255}")
# A folder changed so shortly before it was listed may change again without a new time of change.
_RACY_NS = 2_000_000_000


class UnknownAdapterError(AdapterError):
    """There is no adapter of that name."""


class DeletedAdapterError(AdapterError):
    """The adapter was deleted before it was there."""

    def __init__(self, name: str) -> None:
        super().__init__(f"adapter {name!r} was deleted while it was loaded")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRef:
    """One version of a named adapter.

    Args:
        name: as requests name it.
        source: where it is read from: a folder, a Hub id `org/name[@revision]` (also `hf://...`), or a URL for fsspec.
        version: counts what was registered under the name; one number never stands for two registrations.
    """

    name: str
    source: str
    version: int = 1


class AdapterCatalog:
    """Names and what they stand for now.

    A sub-folder of `adapter_dir` that holds an `adapter_config.json` is an adapter under its own name from the moment it is
    there; a registration under the same name goes before it. A name with slashes stands for a folder further down; it is
    found when asked for, and listed from then on. Files changed in place are not noticed: register the name again.

    Args:
        adapters: name to source, registered at once.
        adapter_dir: the folder of adapters.

    Raises:
        AdapterError: a name is not a name, or there is no such folder.
    """

    def __init__(self, adapters: Mapping[str, str] | None = None, adapter_dir: str | None = None) -> None:
        self._dir = (
            None if adapter_dir is None else Path(adapter_dir).absolute()
        )  # a relative path can look like a Hub id
        self._refs: dict[str, AdapterRef] = {}
        self._names: list[str] = []  # the keys of _refs, sorted
        self._versions: dict[str, int] = {}  # the highest number given out, of names that were registered or removed
        self._preparing: dict[
            str, AdapterRef
        ] = {}  # of each name the last that was neither committed nor abandoned yet
        self._deleted: dict[str, int] = {}  # the highest number given out when the name was removed last
        self._in_dir: set[str] = set()  # names of _refs that stand for a sub-folder of the folder of adapters
        self._hidden: set[str] = set()  # removed, whatever the folder holds
        self._listed_ns: int | None = None  # time of change of the folder that the last listing is good for
        self._unfinished: set[str] = set()  # sub-folders that held no adapter yet
        self._dropped: list[AdapterRef] = []  # of sub-folders that are gone, until somebody takes them
        for name, source in (adapters or {}).items():
            self.register(name, source)
        if self._dir is not None:
            if not self._dir.is_dir():
                raise AdapterError(f"no folder of adapters at {adapter_dir!r}")
            self._list_folder()

    def resolve(self, name: str) -> AdapterRef:
        """What `name` stands for now. A folder that has just been put into the folder of adapters is found.

        Raises:
            UnknownAdapterError: there is no adapter of that name.
        """
        ref = self._refs.get(name) or self._find(name)
        if ref is None:
            raise UnknownAdapterError(f"there is no adapter {name!r}")
        return ref

    def register(self, name: str, source: str) -> AdapterRef:
        """Let `name` stand for the adapter at `source` from now on; a taken name gets its next version.

        Raises:
            AdapterError: it cannot be a name, or the source is empty.
        """
        ref = self.prepare(name, source)
        self.commit(ref)
        return ref

    def prepare(self, name: str, source: str) -> AdapterRef:
        """The ref that `register` would make, not yet what the name stands for: its load can be tried first. Then comes
        `commit` or `abandon`.

        Raises:
            AdapterError: as `register`.
        """
        check_name(name)
        if not isinstance(source, str) or not source.strip():
            raise AdapterError(f"adapter {name!r} needs a source: a folder, a Hub id (org/name) or a URL")
        version = self.last_version(name) + 1
        self._versions[name] = version
        ref = self._preparing[name] = AdapterRef(name=name, source=source, version=version)
        return ref

    def abandon(self, ref: AdapterRef) -> None:
        """A prepared ref will not be committed."""
        if self._preparing.get(ref.name) == ref:
            del self._preparing[ref.name]

    def commit(self, ref: AdapterRef) -> None:
        """Let a prepared ref be what its name stands for.

        Raises:
            DeletedAdapterError: the name was removed meanwhile.
            AdapterError: a later version has been committed meanwhile.
        """
        self.abandon(ref)
        if ref.version <= self._deleted.get(ref.name, 0):
            raise DeletedAdapterError(ref.name)
        current = self._refs.get(ref.name)
        if current is not None and current.version > ref.version:
            raise AdapterError(f"adapter {ref.name!r} was registered anew meanwhile; version {ref.version} is not used")
        self._put(ref)
        self._hidden.discard(ref.name)

    def remove(self, name: str) -> AdapterRef:
        """Forget a name, and what is prepared for it; a folder of that name stays hidden until the name is registered again.

        Returns:
            What it stood for, or would have; of what there was or would have been, `last_version` is the latest.

        Raises:
            UnknownAdapterError: there is no adapter of that name.
        """
        ref = self._refs.get(name) or self._find(name) or self._preparing.get(name)
        if ref is None:
            raise UnknownAdapterError(f"there is no adapter {name!r}")
        self._versions[name] = self._deleted[name] = self.last_version(name)
        if name in self._refs:
            self._drop(name)
        self._hidden.add(name)
        return ref

    def page(self, after: str | None = None, limit: int | None = None) -> list[AdapterRef]:
        """Refs ordered by name, new folders included.

        Args:
            after: only names behind this one; it need not exist (any more).
            limit: at most so many.
        """
        self._list_folder()
        start = 0 if after is None else bisect_right(self._names, after)
        stop = None if limit is None else start + limit
        return [self._refs[name] for name in self._names[start:stop]]

    def take_dropped(self) -> list[AdapterRef]:
        """What names stood for whose folders were found gone since the last call: nobody can ask for them any more."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._refs or self._find(name) is not None)

    def __len__(self) -> int:
        self._list_folder()
        return len(self._refs)

    def last_version(self, name: str) -> int:
        """The highest number given out under a name; 0: none was."""
        ref = self._refs.get(name)
        return max(self._versions.get(name, 0), 0 if ref is None else ref.version)

    def _put(self, ref: AdapterRef, *, in_dir: bool = False) -> None:
        if ref.name not in self._refs:
            insort(self._names, ref.name)
        self._refs[ref.name] = ref
        (self._in_dir.add if in_dir else self._in_dir.discard)(ref.name)

    def _drop(self, name: str) -> None:
        del self._refs[name], self._names[bisect_left(self._names, name)]
        self._in_dir.discard(name)

    def _find(self, name: str) -> AdapterRef | None:
        """Look for one name in the folder of adapters."""
        if self._dir is None or name in self._hidden or not is_name(name):
            return None
        folder = self._dir / name
        try:
            if not (folder / CONFIG_FILE).is_file() or not self._is_inside(name):
                return None
        except OSError:  # a part of the path is too long, or not to be read
            return None
        ref = AdapterRef(name=name, source=str(folder), version=self.last_version(name) + 1)
        self._put(ref, in_dir="/" not in name)
        return ref

    def _is_inside(self, name: str) -> bool:
        """Whoever owns the folder may link a sub-folder to anywhere; from there on no link leads further out."""
        assert self._dir is not None
        top, slash, _ = name.partition("/")
        return not slash or (self._dir / name).resolve().is_relative_to((self._dir / top).resolve())

    def _list_folder(self) -> None:
        """Take in new sub-folders and drop the ones that are gone, if the folder has changed."""
        if self._dir is None:
            return
        try:
            changed_ns = os.stat(self._dir).st_mtime_ns
            if changed_ns == self._listed_ns:
                new = self._unfinished
            else:
                self._listed_ns = None if time.time_ns() - changed_ns < _RACY_NS else changed_ns
                with os.scandir(self._dir) as entries:
                    there = {entry.name for entry in entries}
                for name in self._in_dir - there:
                    self._versions[name] = self.last_version(name)
                    self._dropped.append(self._refs[name])
                    self._drop(name)
                new = {name for name in there - self._refs.keys() - self._hidden if is_name(name)}
        except OSError:  # the folder is gone, or out of reach for now: what was found stays known
            return
        found = {name for name in new if os.path.isfile(os.path.join(self._dir, name, CONFIG_FILE))}
        self._unfinished = new - found
        for name in found - self._refs.keys() - self._hidden:
            self._refs[name] = AdapterRef(
                name=name, source=str(self._dir / name), version=self._versions.get(name, 0) + 1
            )
            self._in_dir.add(name)
        if found:
            self._names = sorted(self._refs)


def is_name(name: object) -> bool:
    """Whether `name` can be an adapter's name: it has the right letters, and no part that leads up a folder."""
    return (
        isinstance(name, str)
        and _NAME.fullmatch(name) is not None
        and not any(part in ("", ".", "..") for part in name.split("/"))
    )


def check_name(name: object) -> None:
    """Refuse what cannot be an adapter's name.

    Raises:
        AdapterError: it cannot.
    """
    if not is_name(name):
        raise AdapterError(
            f"{name!r} cannot be an adapter's name: use letters, digits and . _ : / @ + -, 256 characters at most, with a "
            "letter or digit first, and no empty, '.' or '..' part between slashes"
        )
