"""Where adapters come from: folders, fsspec's file systems, the Hub (its client mocked), and who may name which."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import fsspec
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from staging import make_adapter, read

from perft.adapter import WEIGHTS_FILE as WEIGHTS_FILE_OF_PERFT
from perft.errors import AdapterError
from perft_serve.adapters.sources import WEIGHTS_FILE, SourcePolicy, check_sizes, fetched, is_remote


def digest_at(source: str) -> str:
    with fetched(source) as folder:
        return read(str(folder)).digest


def test_the_file_is_called_the_same_everywhere() -> None:
    assert WEIGHTS_FILE == WEIGHTS_FILE_OF_PERFT


@pytest.mark.parametrize(
    ("source", "remote"),
    [
        ("/a/b", False),
        ("./a", False),
        ("~/a", False),
        ("file:///a", False),
        ("folder", False),
        ("a/b/c", False),
        ("org/name", True),
        ("org/name@main", True),
        ("hf://org/name", True),
        ("s3://bucket/a", True),
        ("memory://a", True),
    ],
)
def test_what_is_read_over_a_network(source: str, remote: bool) -> None:
    assert is_remote(source) == remote


def test_a_folder_is_used_where_it_is(tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    with fetched(source) as folder:
        assert folder == tmp_path / "a"


def test_fsspec_in_memory_and_on_disk(tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    memory = fsspec.filesystem("memory")
    memory.put(source, "/bucket/a", recursive=True)
    want = read(source).digest
    assert digest_at("memory://bucket/a") == want
    assert digest_at("memory://bucket/a/") == want
    assert digest_at(f"file://{source}") == want
    with fetched("memory://bucket/a") as folder:
        assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not folder.exists(), "the private copy is gone"
    memory.rm("/bucket/a/adapter_model.safetensors")
    with (
        pytest.raises(AdapterError, match=r"there is no adapter_model\.safetensors at its source"),
        fetched("memory://bucket/a"),
    ):
        pass
    memory.rm("/bucket", recursive=True)


def test_what_is_too_large_is_not_fetched(tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "a")
    memory = fsspec.filesystem("memory")
    memory.put(source, "/bucket/a", recursive=True)
    size = (tmp_path / "a" / WEIGHTS_FILE).stat().st_size
    with fetched("memory://bucket/a", size) as folder:
        assert read(str(folder)).digest == read(source).digest
        check_sizes(folder, size)
        with pytest.raises(AdapterError, match="has"):
            check_sizes(folder, size - 1)
    message = rf"its adapter_model\.safetensors has {size:,} bytes, and no more than {size - 1:,} are read here"
    with pytest.raises(AdapterError, match=message), fetched("memory://bucket/a", size - 1):
        pass
    memory.rm("/bucket", recursive=True)
    with (tmp_path / "a" / "adapter_config.json").open("ab") as file:
        file.truncate(1 << 21)
    with pytest.raises(AdapterError, match=r"its adapter_config\.json has 2,097,152 bytes"):
        check_sizes(tmp_path / "a", None)
    check_sizes(tmp_path / "nowhere", 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/a", "its folder does not exist"),
        ("./nowhere", "its folder does not exist"),
        ("nowhere", "no folder that exists, no Hub id"),
        ("a/b/c", "no folder that exists, no Hub id"),
        ("memory://nowhere/a", r"no adapter_config\.json"),
        ("no-such-thing://a", "no kind of source"),
        ("zip://a::memory://b", "chained"),
        ("/a\0b", "no path|does not exist"),
        ("~nobody-of-that-name/a", "no path"),
        ("a" * 5000, "no path|no folder"),
    ],
)
def test_what_is_wrong_with_a_source(source: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught, fetched(source):
        pass
    assert source not in str(caught.value)


def test_a_package_that_is_missing_is_named_by_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(source: str) -> None:
        raise ImportError(f"Install it to access {source}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(AdapterError, match=r"pip install 'perft-serve\[s3\]'"), fetched("s3://bucket/a"):
        pass
    with pytest.raises(AdapterError, match="Install it to access abfs"), fetched("abfs://bucket/a"):
        pass


class TestHub:
    """`snapshot_download` alone is mocked."""

    @pytest.mark.parametrize(
        ("source", "repo", "revision"),
        [
            ("org/name", "org/name", None),
            ("org/name@v1.0", "org/name", "v1.0"),
            ("hf://org/name", "org/name", None),
            ("hf://org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ],
    )
    def test_a_repository(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, repo: str, revision: str | None
    ) -> None:
        snapshot = make_adapter(tmp_path / "snapshot")
        calls = []

        def download(repo_id: str, **options: object) -> str:
            calls.append((repo_id, options))
            return snapshot

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert digest_at(source) == read(snapshot).digest
        wanted = ["adapter_config.json", "adapter_model.safetensors"]
        assert calls == [(repo, {"revision": revision, "allow_patterns": wanted})]

    def test_what_is_too_large_is_not_fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        snapshot = make_adapter(tmp_path / "snapshot")
        size: int | None = 1000

        def download(repo_id: str, *, dry_run: bool = False, **_: object) -> str | list[SimpleNamespace]:
            if not dry_run:
                return snapshot
            if size is None:
                raise DryRunError("no network")
            return [SimpleNamespace(filename=WEIGHTS_FILE, file_size=size)]

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(AdapterError, match="has 1,000 bytes, and no more than 999"), fetched("org/name", 999):
            pass
        with fetched("org/name", 1000) as folder:
            assert folder == Path(snapshot)
        size = None
        with fetched("org/name", 1) as folder:
            assert folder == Path(snapshot), "it may be in the cache"

    def test_a_folder_goes_before_a_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_adapter(tmp_path / "org/name")
        monkeypatch.chdir(tmp_path)
        with fetched("org/name") as folder:
            assert folder == Path("org/name")

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (GatedRepoError, "gated"),
            (RepositoryNotFoundError, "no such Hub repository"),
            (RevisionNotFoundError, "no such revision"),
            (LocalEntryNotFoundError, "cannot be reached"),
            (HFValidationError, "cannot be a Hub id"),
            (EntryNotFoundError, "lacks a file"),
            (TimeoutError, r"cannot be fetched \(TimeoutError\)"),
        ],
    )
    def test_what_can_go_wrong(self, monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str) -> None:
        def download(*_: object, **__: object) -> str:
            raise error.__new__(error)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(AdapterError, match=message), fetched("org/name"):
            pass

    def test_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(AdapterError, match="not in the local cache"), fetched("org/surely-not-there"):
            pass


class TestPolicy:
    def test_nothing_is_allowed_but_the_folder_of_adapters(self, tmp_path: Path) -> None:
        adapters, outside = tmp_path / "adapters", tmp_path / "adapters-of-others"
        for folder in (adapters / "a", outside):
            folder.mkdir(parents=True)
        (adapters / "out").symlink_to(outside)
        policy = SourcePolicy(adapter_dir=str(adapters))
        assert policy.allows(str(adapters / "a"))
        assert policy.allows(str(adapters / "not there yet"))
        assert policy.allows(f"file://{adapters}/a")
        for source in (
            str(outside),
            str(adapters / "out"),
            f"{adapters}/../adapters-of-others",
            f"file://{adapters}/../adapters-of-others",
            "org/name",
            "s3://bucket/a",
            "/",
        ):
            assert not policy.allows(source), source
        with pytest.raises(AdapterError, match="--allow-adapter-source"):
            policy.check("org/name")

    @pytest.mark.parametrize("source", ["/a\0b", "~nobody-of-that-name/a", "/" + "a" * 5000, "a" * 5000, "", "\ud800"])
    def test_what_is_no_source_at_all_is_not_allowed(self, tmp_path: Path, source: str) -> None:
        assert not SourcePolicy(allowed=("org",), adapter_dir=str(tmp_path)).allows(source)

    @pytest.mark.parametrize(
        ("prefix", "allowed", "refused"),
        [
            ("*", ["/etc", "org/name", "s3://bucket/a", "hf://org/name@x"], ["a/../b", "zip://a::s3://bucket"]),
            ("org", ["org/name", "org/name@x", "hf://org/name"], ["organ/name", "other/org"]),
            ("hf://org/", ["org/name"], ["organ/name"]),
            ("org/name", ["org/name", "org/name@x", "hf://org/name@x"], ["org/name2", "org/other", "org"]),
            ("org/name@v1", ["org/name@v1"], ["org/name", "org/name@v2", "org/name@v10"]),
            (
                "s3://bucket/a",
                ["s3://bucket/a", "s3://bucket/a/b"],
                ["s3://bucket/ab", "s3://bucket", "s3://bucket/a/../b", "s3://bucket/a/%2e%2e/b", "S3://bucket/b"],
            ),
        ],
    )
    def test_prefixes(self, prefix: str, allowed: list[str], refused: list[str]) -> None:
        policy = SourcePolicy(allowed=(prefix,))
        assert [source for source in allowed if not policy.allows(source)] == []
        assert [source for source in refused if policy.allows(source)] == []

    def test_a_folder_that_would_go_before_a_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Allowing an organisation of the Hub does not allow a local folder of that name, nor the other way round."""
        (tmp_path / "org" / "name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert not SourcePolicy(allowed=("hf://org",)).allows("org/name")
        assert SourcePolicy(allowed=("./org",)).allows("org/name")
        assert not SourcePolicy(allowed=("./org",)).allows("hf://org/name")
