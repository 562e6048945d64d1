"""`python -m concentration.pipeline JOB.json` runs a frozen job."""

import sys
from pathlib import Path

from concentration import preemption
from concentration.processes import end
from concentration.streams import open_streams

if __name__ == "__main__":
    preemption.note_signals()  # before torch is imported, which takes seconds in which a job may be asked to stop
    open_streams()
    from concentration.pipeline.jobs import run_frozen

    end(run_frozen(Path(sys.argv[1])))
