"""Our server under the programs of others: is it what they take it for?

    python bench/conform.py setup [NAME...]   the environments, once
    python bench/conform.py fuzz              schemathesis: ten thousand requests, no 5xx
    python bench/conform.py lm-eval           the numbers of lm-eval's own Transformers backend
    python bench/conform.py clients           one round trip with each client library
    python bench/conform.py guidellm          a load generator's report against our /metrics
    python bench/conform.py aiperf            the same, of another

In: the server of this checkout. Out: a JSON line each in `bench/results/conformance.jsonl`, and status 1 if something is not as
it should be. `bench/conformance/README.md` says what each part looks at.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from conformance import clients, environments, fuzz, likelihoods, load
from harness import ROOT, end_cleanly

ADAPTER = ROOT / "demo" / "adapters" / "sql"


def main(arguments: Sequence[str] | None = None) -> None:
    """One part."""
    end_cleanly()
    parser = argparse.ArgumentParser(description="Our server under the programs of others.")
    commands = parser.add_subparsers(dest="command", required=True)
    setup = commands.add_parser("setup", help="make the environments that are not there")
    setup.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(environments.ENVIRONMENTS)}")
    fuzzing = commands.add_parser("fuzz", help="schemathesis")
    fuzzing.add_argument("--cases", type=int, default=10_000, help="stop after so many (default: 10000)")
    fuzzing.add_argument("--examples", type=int, default=100, help="random cases of each operation, at most, in a run")
    fuzzing.add_argument("--seed", type=int, default=0)
    fuzzing.add_argument("--workers", type=int, default=2)
    scoring = commands.add_parser("lm-eval", help="lm-eval's local-completions against its hf backend")
    scoring.add_argument("--limit", type=int, default=50, help="questions of each task, at most (default: 50)")
    commands.add_parser("clients", help="litellm, langchain-openai, llm, npm's openai")
    for tool in load.TOOLS:
        loading = commands.add_parser(tool, help="its report against our /metrics")
        loading.add_argument("--requests", type=int, default=128, help="default: 128")
        loading.add_argument("--streams", type=int, default=4, help="so many at a time (default: 4)")
    options = parser.parse_args(arguments)
    if options.command == "setup":
        for environment in environments.find(options.names):
            environment.require()
            print(environment.name, environment.versions(), flush=True)
    elif options.command == "fuzz":
        fuzz.run(cases=options.cases, seed=options.seed, examples=options.examples, workers=options.workers)
    elif options.command == "lm-eval":
        likelihoods.run(adapter=ADAPTER, limit=options.limit)
    elif options.command in load.TOOLS:
        load.run(tool=options.command, adapter=ADAPTER, requests=options.requests, streams=options.streams)
    else:
        clients.run(adapter=ADAPTER)


if __name__ == "__main__":
    main()
