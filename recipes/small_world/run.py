"""The small world: the paper's comparison of S, D, R, E and qvLoRA on a base and on data that two CPU cores can train on.

In: `world.yaml`. Out: a line a run in `bench/results/small_world.jsonl`, and from the lines a table and the figure beside it.
Runs are `perft train` and `perft eval`, one after the other; what already has its line is skipped, so the same command goes on
wherever an earlier one was stopped, and a run that is killed is all that is lost. Everything of a run that could change its
result is in its digest: a line of another digest counts for nothing.

Order: the first seed of every method on the first base, then the second seed, and so on, then the next base.

    python recipes/small_world/run.py            # searches learning rates, runs what has no line yet, then draws
    python recipes/small_world/run.py --draw     # only draws
    python recipes/small_world/run.py --list     # says what there is to do
    python recipes/small_world/run.py --methods S R
    python recipes/small_world/run.py --search   # only tries learning rates, on held-out training data
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from small_world_report import draw, table

from perft.cli import main as perft
from perft.demo_base import build_demo_base
from perft.fetch import fetch
from perft.provenance import describe_base, package_versions
from perft.tasks import TASKS, cloze_prompt, load_task, question_and_choices, write_jsonl

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LORA = "qvLoRA"


class WorldError(Exception):
    """What stops the experiment, in words for whoever runs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What the ranks depend on, of a base.

    Args:
        hidden: D.
        top_k: base experts per token.
        attention: inputs plus outputs of q and of v, together.
        activated: parameters of the base that take part in one token.
    """

    hidden: int
    top_k: int
    attention: int
    layers: int
    activated: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run: a method (`None`: the base alone) on a base with a seed."""

    base: str
    method: str | None
    seed: int | None

    @property
    def name(self) -> str:
        """As a folder."""
        return f"{self.base}-{self.method or 'base'}" + ("" if self.seed is None else f"-{self.seed}")


def read_world(path: Path) -> dict[str, Any]:
    """The settings."""
    world: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return world


def cells(world: Mapping[str, Any]) -> Iterator[Cell]:
    """All runs, in their order."""
    for base in world["bases"]:
        yield Cell(base=base, method=None, seed=None)
        for seed in world["seeds"]:
            for method in world["methods"]:
                yield Cell(base=base, method=method, seed=seed)


def rank_of(method: str, settings: Mapping[str, Any], shape: Shape, activated_per_layer: int) -> tuple[int, int, int]:
    """The rank whose activated parameters a layer come closest to what is asked; those, and all of the method's a layer.

    Of a PERFT adapter expert 2 D a rank take part in a token that it is used for, of R's router all M D; of a LoRA all.
    """
    if method == LORA:
        rank = max(1, round(activated_per_layer / shape.attention))
        return rank, rank * shape.attention, rank * shape.attention
    variant = settings["variant"]
    total = {"S": 1, "E": None}.get(variant, settings.get("num_experts"))
    used = {"S": 1, "D": total, "E": shape.top_k}.get(variant, settings.get("top_k"))
    assert used is not None
    router = shape.hidden * (total or 0) if variant == "R" else 0
    rank = max(1, round((activated_per_layer - router) / (2 * shape.hidden * used)))
    each = 2 * shape.hidden * rank
    return rank, router + used * each, -1 if total is None else router + total * each


def with_rates(world: Mapping[str, Any], found: Mapping[str, Mapping[float, float]]) -> dict[str, Any]:
    """The settings with a `learning_rate` for each method that has none but says whose it takes (`rate_of`).

    Args:
        found: held-out loss by method and learning rate. A rate is taken once all rates of the search have been tried; until
            then a method's is `None`.
    """
    methods = {}
    for name, settings in world["methods"].items():
        own = {key: value for key, value in settings.items() if key != "rate_of"}
        if "rate_of" in settings:
            tried = found.get(settings["rate_of"], {})
            rates = world["search"]["methods"][settings["rate_of"]]
            own["learning_rate"] = None if set(rates) - set(tried) else min(rates, key=tried.__getitem__)
        methods[name] = own
    return {**world, "methods": methods}


def digest_of(world: Mapping[str, Any], cell: Cell, data: Mapping[str, str]) -> str:
    """Of all that the result of a run depends on, but for versions and rounding: settings, data, seed."""
    what: dict[str, Any] = {
        "base": world["bases"][cell.base],
        "eval": [world["tasks"], world["eval_questions"]],
        "data": {name: digest for name, digest in data.items() if cell.method is not None or "train" not in name},
    }
    if cell.method is not None:
        what |= {
            "method": [cell.method, world["methods"][cell.method]],
            "seed": cell.seed,
            "train": world["train"],
            "activated_per_layer": world["activated_per_layer"],
        }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What has been found so far. A last line that was cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line, whole, after whatever an earlier kill has left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.is_file() else b""
    with path.open("ab") as file:
        file.write((b"" if not before or before.endswith(b"\n") else b"\n") + (json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


class SmallWorld:
    """The experiment with its folders.

    Args:
        world: the settings.
        work: bases, data, adapters and results of runs; may be deleted afterwards.
        results: the file of lines.
    """

    def __init__(self, world: Mapping[str, Any], work: Path, results: Path) -> None:
        self._given, self.world = world, with_rates(world, {})
        self.work, self.results = work, results
        self.data = Path(world["data"]) if "data" in world else work / "data"
        self._sha256: dict[str, str] = {}
        self.num_tokens: dict[str, int] = {}

    def prepare(self) -> None:
        """Fetches the data, unless the settings name a folder of them (`data`), and writes what is trained on and asked."""
        if "data" not in self.world:
            fetch(self.world["tasks"], self.data, log=print)
        for task in self.world["tasks"]:
            self._sha256[f"{task} validation"] = self._draw_questions(task)
        counts = {"train": self.world["train_examples"], "search-train": self.world["search"]["train_examples"]}
        held_out: list[dict[str, str]] = []
        drawn = {task: self._drawn(task) for task in self.world["tasks"]}
        for records in drawn.values():
            held_out += records[: self.world["held_out_examples"]]
        self._sha256["held-out train"] = write_jsonl(self.work / "held-out.jsonl", held_out)
        for name, count in counts.items():
            mixed = [each for records in drawn.values() for each in records[self.world["held_out_examples"] :][:count]]
            random.Random(0).shuffle(mixed)
            self._sha256[name] = write_jsonl(self.work / f"{name}.jsonl", mixed)
        self._take_rates()

    def _take_rates(self) -> None:
        """Takes the learning rates that the search has found so far."""
        losses = {
            line["digest"]: line["train"]["held_out_loss"]
            for line in read_lines(self.results)
            if line["kind"] == "search"
        }
        found: dict[str, dict[float, float]] = {}
        for method, rate, digest in self._tries():
            if digest in losses:
                found.setdefault(method, {})[rate] = losses[digest]
        self.world = with_rates(self._given, found)

    def _tries(self) -> Iterator[tuple[str, float, str]]:
        """What the search tries: method, learning rate, and the digest of the line it makes."""
        settings = self.world["search"]
        data = {name: self._sha256[name] for name in ("search-train", "held-out train")}
        for method, rates in settings["methods"].items():
            cell = Cell(base=settings["base"], method=method, seed=settings["seed"])
            for rate in rates:
                tried = {**self.world["methods"][method], "learning_rate": rate}
                yield method, rate, digest_of({**self.world, "methods": {method: tried}}, cell, data)

    def _draw_questions(self, task: str) -> str:
        """Writes what is asked of a task; returns the file's sha256."""
        name = f"{task}/validation.jsonl"
        lines = (self.data / name).read_text(encoding="utf-8").splitlines()
        count = min(len(lines), self.world["eval_questions"][task])
        drawn = sorted(random.Random(f"small world {task}").sample(range(len(lines)), count))
        return write_jsonl(self.work / "questions" / name, [json.loads(lines[place]) for place in drawn])

    def _drawn(self, task: str) -> list[dict[str, str]]:
        """The right answers to as many questions of the train set as are needed, as text: the held-out ones first."""
        data = load_task(TASKS[task], self.data, "train")
        count = self.world["held_out_examples"] + self.world["train_examples"]
        if count > len(data.items):
            raise WorldError(f"{task} has {len(data.items)} training examples, not {count}")
        records = []
        for item in random.Random(f"small world {task}").sample(data.items, count):
            question, choices = question_and_choices(data.task, item)
            right = choices[item.words.index(item.answer)]
            records.append({"prompt": cloze_prompt(data.task, question), "completion": f" {right}"})
        return records

    def base_folder(self, base: str) -> str:
        """The base, built if it is not there. `{path: FOLDER}` in the settings names one that is."""
        settings = self.world["bases"][base]
        if "path" in settings:
            return str(settings["path"])
        folder = self.work / "bases" / base
        build_demo_base(folder, **settings)
        return str(folder)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - one world a process
    def shape(self, base: str) -> Shape:
        """See `Shape`."""
        from perft.base import count_activated, load_skeleton
        from perft.moe import find_moe_blocks

        model = load_skeleton(self.base_folder(base))
        blocks = find_moe_blocks(model)
        first = blocks[0]
        assert first.top_k is not None
        attention = model.get_submodule("model.layers.0.self_attn")
        return Shape(
            hidden=first.hidden_size,
            top_k=first.top_k,
            attention=sum(sum(getattr(attention, name).weight.shape) for name in ("q_proj", "v_proj")),
            layers=len(blocks),
            activated=count_activated(model, blocks),
        )

    def sizes(self, cell: Cell) -> dict[str, Any]:
        """Rank and parameters of a method on a base."""
        assert cell.method is not None
        shape = self.shape(cell.base)
        rank, activated, total = rank_of(
            cell.method, self.world["methods"][cell.method], shape, self.world["activated_per_layer"]
        )
        if total < 0:  # E: one for each base expert
            from perft.base import load_skeleton
            from perft.moe import find_moe_blocks

            num_experts = find_moe_blocks(load_skeleton(self.base_folder(cell.base)))[0].num_experts
            total = activated // shape.top_k * num_experts
        return {
            "r": rank,
            "trainable": total * shape.layers,
            "activated": activated * shape.layers,
            "base_activated": shape.activated,
            "efficiency": activated * shape.layers / shape.activated,
        }

    def missing(self) -> list[Cell]:
        """The runs that have no line."""
        there = {line["digest"] for line in read_lines(self.results) if line["kind"] == "run"}
        return [cell for cell in cells(self.world) if self.digest(cell) not in there]

    def digest(self, cell: Cell) -> str:
        """Of one run."""
        return digest_of(self.world, cell, self._sha256)

    def lines(self) -> list[dict[str, Any]]:
        """The lines of these settings, and of no others."""
        wanted = {self.digest(cell) for cell in cells(self.world)}
        return [line for line in read_lines(self.results) if line["kind"] == "run" and line["digest"] in wanted]

    def recipe(self, cell: Cell, output: Path, data: str, learning_rate: float) -> dict[str, Any]:
        """A recipe of `perft train`."""
        assert cell.method is not None
        method = {key: value for key, value in self.world["methods"][cell.method].items() if key != "learning_rate"}
        if cell.method == LORA:
            method = {"method": "lora", "targets": ["q_proj", "v_proj"], **method}
        return {
            "model": self.base_folder(cell.base),
            "data": str(self.work / f"{data}.jsonl"),
            "eval_data": str(self.work / "held-out.jsonl"),
            "output": str(output),
            **method,
            "r": self.sizes(cell)["r"],
            "learning_rate": learning_rate,
            "seed": cell.seed,
            "keep_checkpoints": 1,
            **self.world["train"],
        }

    def train(self, cell: Cell, output: Path, data: str, learning_rate: float) -> dict[str, Any]:
        """Trains; what there is to say of it."""
        output.parent.mkdir(parents=True, exist_ok=True)
        recipe = output.parent / f"{output.name}.yaml"
        recipe.write_text(yaml.safe_dump(self.recipe(cell, output, data, learning_rate)), encoding="utf-8")
        shutil.rmtree(output, ignore_errors=True)
        start = time.perf_counter()
        self._perft("train", "--config", str(recipe))
        seconds = time.perf_counter() - start
        log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        return {
            "learning_rate": learning_rate,
            "tokens": self._count_tokens(cell.base, data),
            "steps": log[-1]["step"],
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "held_out_loss": next(entry["eval_loss"] for entry in reversed(log) if "eval_loss" in entry),
            "seconds": round(seconds, 1),
        }

    def _count_tokens(self, base: str, data: str) -> int:
        from transformers import AutoTokenizer

        from perft.data import tokenize_files

        tokenizer = AutoTokenizer.from_pretrained(self.base_folder(base))
        settings = self.world["train"]
        rows = tokenize_files(
            [self.work / f"{data}.jsonl"],
            tokenizer,
            max_length=settings["max_length"],
            loss_on=settings["loss_on"],
        ).dataset
        return sum(len(ids) for ids in rows["input_ids"])

    def run(self, cell: Cell) -> dict[str, Any]:
        """One run, from training to its line."""
        folder = self.work / "runs" / cell.name
        base = self.base_folder(cell.base)
        line: dict[str, Any] = {
            "kind": "run",
            "base": cell.base,
            "method": cell.method or "base",
            "seed": cell.seed,
            "digest": self.digest(cell),
            "data_sha256": self._sha256,
            "base_digest": describe_base(base)["digest"],
        }
        evaluated, adapters = base, []
        if cell.method is not None:
            line |= self.sizes(cell)
            rate = self.world["methods"][cell.method]["learning_rate"]
            line["train"] = self.train(cell, folder / "adapter", "train", rate)
            adapters = ["--no-base", "--adapter", f"{cell.method}={folder / 'adapter'}"]
            if cell.method == LORA:  # as it is served where a server cannot add it: as a part of the base
                evaluated, adapters = str(folder / "merged"), []
                merge(base, folder / "adapter", Path(evaluated))
        start = time.perf_counter()
        self._perft(
            *(
                "eval",
                "--model",
                evaluated,
                *adapters,
                "--tasks",
                *self.world["tasks"],
                "--data",
                str(self.work / "questions"),
            ),
            *("--split", "validation", "--cloze"),
            *("--dtype", "float32", "--kv-memory", "128M", "--output", str(folder / "eval")),
        )
        line["eval_seconds"] = round(time.perf_counter() - start, 1)
        shutil.rmtree(folder / "merged", ignore_errors=True)
        return line | read_scores(folder / "eval") | {"versions": package_versions(), "at": time.strftime("%Y-%m-%d")}

    def search(self, methods: Sequence[str]) -> None:
        """Tries the learning rates that have no line yet and that `methods` want."""
        wanted = {self._given["methods"][method].get("rate_of", method) for method in methods}
        there = {line["digest"] for line in read_lines(self.results) if line["kind"] == "search"}
        for method, rate, digest in self._tries():
            if method in wanted and digest not in there:
                cell = Cell(base=self.world["search"]["base"], method=method, seed=self.world["search"]["seed"])
                found = self.train(cell, self.work / "search" / f"{cell.name}-{rate:g}", "search-train", rate)
                line = {"kind": "search", "base": cell.base, "method": method, "seed": cell.seed, "digest": digest}
                append_line(self.results, {**line, "train": found, "versions": package_versions()})
                print(f"{method}, learning rate {rate:g}: held-out loss {found['held_out_loss']:.4f}", flush=True)
        self._take_rates()

    @staticmethod
    def _perft(*arguments: str) -> None:
        print("perft", *arguments, flush=True)
        status = perft(arguments)
        gc.collect()
        if status:
            raise WorldError(f"`perft {' '.join(arguments)}` ended with status {status}")


def merge(base: str, adapter: Path, output: Path) -> None:
    """The base with a LoRA added into its weights, in float32, which keeps all of the difference."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(output)
    AutoTokenizer.from_pretrained(base).save_pretrained(output)


def read_scores(folder: Path) -> dict[str, Any]:
    """The part of a line that `perft eval` has found. With it, by task and in the order of the questions: whether the answer
    was right (1), the right answer's log-probability (nats), and its characters."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (entry,) = results["models"].values()
    right: dict[str, str] = {}
    nats: dict[str, list[float]] = {}
    characters: dict[str, list[int]] = {}
    for text in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines():
        example = json.loads(text)
        task, answer = example["task"], example["answer"]
        right[task] = right.get(task, "") + str(int(example["correct"]))
        nats.setdefault(task, []).append(round(example["scores"][answer], 3))
        characters.setdefault(task, []).append(example["choice_lengths"][answer])
    names = ("tasks", "average", "tasks_norm", "average_norm", "answer_bits")
    return {
        "settings": results["settings"],
        **{name: entry[name] for name in names},
        "right": right,
        "answer_nats": nats,
        "answer_characters": characters,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--world", type=Path, default=HERE / "world.yaml", help="the settings")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "small_world", help="bases, data and adapters")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "small_world.jsonl")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="of the settings' methods only these")
    parser.add_argument("--at-most", type=int, metavar="N", help="stop after so many runs")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="say what there is to do, and with what parameters")
    what.add_argument("--search", action="store_true", help="try the learning rates of `search`")
    what.add_argument("--draw", action="store_true", help="only draw what there is")
    args = parser.parse_args(argv)
    world = SmallWorld(read_world(args.world), args.work, args.results)
    try:
        chosen = args.methods or list(world.world["methods"])
        unknown = [method for method in chosen if method not in world.world["methods"]]
        if unknown:
            raise WorldError(f"no method {', '.join(unknown)}; there are {', '.join(world.world['methods'])}")
        world.prepare()
        if not (args.list or args.draw):
            world.search(chosen)
        if args.search:
            return 0
        missing = [cell for cell in world.missing() if cell.method is None or cell.method in chosen]
        if args.list:
            for cell in cells(world.world):
                size = (
                    ""
                    if cell.method is None
                    else " r {r}, activated {activated:,}, all {trainable:,}".format(**world.sizes(cell))
                )
                print(f"{'to do' if cell in missing else 'done '} {cell.name}{size}")
            return 0
        for number, cell in enumerate([] if args.draw else missing[: args.at_most], start=1):
            print(f"{cell.name}: {number} of {len(missing)}", flush=True)
            append_line(args.results, world.run(cell))
        lines = world.lines()
        if lines:
            from_lines = args.results.with_suffix("")
            text = table(lines)
            from_lines.with_suffix(".md").write_text(text, encoding="utf-8")
            draw(lines, from_lines.with_suffix(".png"))
            print(text)
    except WorldError as error:
        print(f"small world: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
