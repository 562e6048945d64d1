"""All rows of a table at once on this machine, as one graph of jobs in which what rows share is done once.

    python launch/tables/at_once.py TABLE WORKDIR [KEY=VALUE ...]        num_processes=14 trains 14 networks at a time

For a machine with room for several networks, as a GPU has for those of experiment=glyphs_gpu; `run.sh` takes row after row.
Stopped and started again it goes on; `run.sh` finds its results, and the reports are drawn there. One seed at a time: seed=1.
"""

import sys
from pathlib import Path

from concentration.errors import ConcentrationError
from concentration.pipeline.run import run_together

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
from tables import list_runs


def main(table: str, workdir: str, *overrides: str) -> None:
    run_together(list(list_runs(table, [f"workdir={workdir}", *overrides])), has_report=False)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ConcentrationError as error:
        print(f"at_once.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
