"""Names and what they stand for: registrations, folders found when asked for, versions, no way out of the folder."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from perft.adapter import CONFIG_FILE as CONFIG_FILE_OF_PERFT
from perft.errors import AdapterError
from perft_serve.adapters.catalog import (
    CONFIG_FILE,
    AdapterCatalog,
    AdapterRef,
    DeletedAdapterError,
    UnknownAdapterError,
)


def put(root: Path, name: str) -> Path:
    """A folder that looks like an adapter's."""
    (root / name).mkdir(parents=True)
    (root / name / CONFIG_FILE).write_text("{}")
    return root / name


def age(folder: Path) -> None:
    """Make a folder's last change so old that listings of it are kept."""
    long_ago = time.time() - 3600
    os.utime(folder, (long_ago, long_ago))


def names(catalog: AdapterCatalog) -> list[str]:
    return [ref.name for ref in catalog.page()]


def test_the_file_is_called_the_same_everywhere() -> None:
    assert CONFIG_FILE == CONFIG_FILE_OF_PERFT


def test_registered_names_and_their_versions() -> None:
    catalog = AdapterCatalog({"a": "org/a"})
    assert catalog.resolve("a") == AdapterRef(name="a", source="org/a", version=1)
    assert catalog.register("a", "org/b") == AdapterRef(name="a", source="org/b", version=2)
    assert catalog.resolve("a").version == 2
    assert "a" in catalog
    assert "b" not in catalog
    assert len(catalog) == 1
    with pytest.raises(UnknownAdapterError, match="'b'"):
        catalog.resolve("b")


def test_a_reload_is_not_seen_before_it_is_committed() -> None:
    catalog = AdapterCatalog({"a": "old"})
    failed = catalog.prepare("a", "broken")
    assert catalog.resolve("a").source == "old"
    better = catalog.prepare("a", "new")
    assert better.version == failed.version + 1, "a number never stands for two registrations"
    catalog.commit(better)
    assert catalog.resolve("a") == better
    with pytest.raises(AdapterError, match="anew meanwhile"):
        catalog.commit(failed)
    assert catalog.resolve("a") == better


def test_a_removed_name_comes_back_with_a_later_version() -> None:
    catalog = AdapterCatalog({"a": "one"})
    assert catalog.remove("a").version == 1
    assert "a" not in catalog
    assert names(catalog) == []
    with pytest.raises(UnknownAdapterError):
        catalog.remove("a")
    assert catalog.register("a", "two").version == 2


def test_what_is_prepared_for_a_name_goes_with_it() -> None:
    catalog = AdapterCatalog({"a": "one"})
    late = catalog.prepare("a", "two")
    catalog.remove("a")
    assert catalog.last_version("a") == late.version
    first = catalog.prepare("b", "one")
    assert catalog.remove("b") == first
    for ref in (late, first):
        with pytest.raises(DeletedAdapterError, match=f"'{ref.name}' was deleted while it was loaded"):
            catalog.commit(ref)
        assert ref.name not in catalog
        assert catalog.register(ref.name, "three").version == ref.version + 1
    catalog.abandon(catalog.prepare("c", "one"))
    with pytest.raises(UnknownAdapterError):
        catalog.remove("c")


def test_a_new_folder_is_found_by_name_and_listed(tmp_path: Path) -> None:
    put(tmp_path, "old")
    catalog = AdapterCatalog(adapter_dir=str(tmp_path))
    assert names(catalog) == ["old"]
    age(tmp_path)
    assert names(catalog) == ["old"]
    folder = put(tmp_path, "new")
    assert catalog.resolve("new") == AdapterRef(name="new", source=str(folder))
    put(tmp_path, "newer")
    assert names(catalog) == ["new", "newer", "old"]


def test_a_folder_that_is_filled_after_it_was_listed(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    age(tmp_path)
    catalog = AdapterCatalog(adapter_dir=str(tmp_path))
    assert names(catalog) == []
    assert "slow" not in catalog
    (tmp_path / "slow" / CONFIG_FILE).write_text("{}")
    assert names(catalog) == ["slow"], "though the outer folder has not changed"


def test_a_folder_that_is_gone_is_no_longer_listed(tmp_path: Path) -> None:
    put(tmp_path, "a")
    put(tmp_path, "b")
    catalog = AdapterCatalog({"kept": "org/kept"}, adapter_dir=str(tmp_path))
    shutil.rmtree(tmp_path / "a")
    assert catalog.take_dropped() == []
    assert names(catalog) == ["b", "kept"]
    assert catalog.take_dropped() == [AdapterRef(name="a", source=str(tmp_path / "a"))]
    assert catalog.take_dropped() == []
    put(tmp_path, "a")
    assert catalog.resolve("a").version == 2


def test_a_removed_folder_stays_hidden_until_it_is_registered(tmp_path: Path) -> None:
    folder = put(tmp_path, "a")
    catalog = AdapterCatalog(adapter_dir=str(tmp_path))
    catalog.remove("a")
    assert "a" not in catalog
    assert names(catalog) == []
    assert catalog.register("a", str(folder)).version == 2
    assert names(catalog) == ["a"]


def test_a_registration_goes_before_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "a")
    catalog = AdapterCatalog({"a": "org/a"}, adapter_dir=str(tmp_path))
    assert catalog.resolve("a").source == "org/a"
    assert [ref.source for ref in catalog.page()] == ["org/a"]
    shutil.rmtree(tmp_path / "a")
    assert names(catalog) == ["a"]


def test_names_with_slashes_are_folders_further_down(tmp_path: Path) -> None:
    folder = put(tmp_path, "team/one")
    catalog = AdapterCatalog(adapter_dir=str(tmp_path))
    assert names(catalog) == []
    assert catalog.resolve("team/one").source == str(folder)
    assert names(catalog) == ["team/one"]
    age(tmp_path)
    put(tmp_path, "other")
    assert names(catalog) == ["other", "team/one"]


def test_a_linked_folder_is_an_adapter_but_no_way_further_out(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    put(outside, "adapter")
    put(outside, "secret")
    root.mkdir()
    (root / "linked").symlink_to(outside / "adapter")
    (outside / "adapter" / "up").symlink_to(outside)
    catalog = AdapterCatalog(adapter_dir=str(root))
    assert names(catalog) == ["linked"]
    assert catalog.resolve("linked").source == str(root / "linked")
    assert "linked/up/secret" not in catalog


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/..",
        "a//b",
        "/a",
        "a/",
        "a/.",
        ".hidden",
        "a b",
        "ä",
        "a" * 257,
        "a\0b",
        "a\n",
    ],
)
def test_what_is_no_name(tmp_path: Path, name: str) -> None:
    put(tmp_path, "root/b")
    put(tmp_path, "a")
    catalog = AdapterCatalog(adapter_dir=str(tmp_path / "root"))
    assert name not in catalog
    with pytest.raises(UnknownAdapterError):
        catalog.resolve(name)
    with pytest.raises(AdapterError, match="cannot be an adapter's name"):
        catalog.register(name, "org/a")


def test_a_source_is_needed_and_the_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="needs a source"):
        AdapterCatalog({"a": " "})
    with pytest.raises(AdapterError, match="no folder of adapters"):
        AdapterCatalog(adapter_dir=str(tmp_path / "nowhere"))


def test_pages(tmp_path: Path) -> None:
    catalog = AdapterCatalog({f"n{i}": "org/a" for i in range(5)})
    assert [ref.name for ref in catalog.page(limit=2)] == ["n0", "n1"]
    assert [ref.name for ref in catalog.page(after="n1", limit=2)] == ["n2", "n3"]
    assert [ref.name for ref in catalog.page(after="n3")] == ["n4"]
    assert catalog.page(after="n4") == []
    catalog.remove("n2")
    assert [ref.name for ref in catalog.page(after="n2", limit=1)] == ["n3"], "a cursor may be gone"


def test_ten_thousand_folders_are_listed_without_opening_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(10_000):
        (tmp_path / f"a{i}").mkdir()
        (tmp_path / f"a{i}" / CONFIG_FILE).touch()
    age(tmp_path)
    listings = 0
    scandir = os.scandir

    def counted(path: str) -> object:
        nonlocal listings
        listings += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("a file was opened"))
    catalog = AdapterCatalog(adapter_dir=str(tmp_path))
    assert len(catalog) == 10_000
    for i in range(0, 10_000, 100):
        assert catalog.resolve(f"a{i}").version == 1
        assert len(catalog.page(after=f"a{i}", limit=10)) <= 10
    assert listings == 1
