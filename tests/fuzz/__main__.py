"""``python -m tests.fuzz``: see :mod:`tests.fuzz`."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.fuzz.running import run
from tests.fuzz.targets import ALL, TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz walproto.")
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(ALL)}; all but the last"
    )
    parser.add_argument("--seconds", type=float, default=60, help="for each target (60)")
    parser.add_argument("--seed", type=int, help="of the random generators")
    parser.add_argument("--corpus", type=Path, help="where to keep the inputs worth keeping")
    options = parser.parse_args()
    unknown = set(options.targets) - set(ALL)
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    seed = options.seed or random.randrange(1, 1 << 31)
    print(f"seed {seed}, {options.seconds:g} seconds for each target", flush=True)
    inputs, failed = 0, []
    with tempfile.TemporaryDirectory(prefix="walproto-fuzz-") as name:
        work = Path(name)
        corpus = options.corpus.absolute() if options.corpus else work / "corpus"
        targets = [ALL[target] for target in options.targets or TARGETS]
        for found in run(targets, corpus, work, seconds=options.seconds, seed=seed):
            print(found, flush=True)
            inputs += found.inputs
            failed += [] if found.is_good else [found.name]
    print(f"{inputs} inputs in all; " + (f"failed: {', '.join(failed)}" if failed else "all good"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
