"""What `prepare` is to write or to index, so that a run goes on with what an earlier one began only if that was the same."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from concentration.data.appending import Before
from concentration.stages.run_directory import RunDirectory
from concentration.targets import write_atomically
from concentration.taxonomy import Taxonomy

#: In `shards/`: a hash of what was to be done when the stage was begun.
_LISTING = "listing.sha256"


def begin_listing(path: Path, taxonomy: Taxonomy, listing: Iterable[str], before: Before | None) -> None:
    """Notes what is to be done, and removes what an earlier, unfinished run wrote if that was to do something else.

    Images may have come or gone since, and would be lost or double; or classes: indices hold positions in the taxonomy.
    What was there before the unfinished run is never touched.
    """
    digest = hashlib.sha256(taxonomy.fingerprint.encode())
    for line in listing:
        digest.update(os.fsencode(f"{line}\n"))
    kept = path / _LISTING
    is_other = kept.exists() and kept.read_bytes() != digest.hexdigest().encode()
    for pattern in ("*.skipped", "*.hashes", "*.index", "*.tar", "*.pack") if is_other else ():
        for stale in path.glob(pattern):
            if before is None or not before.holds(stale):
                stale.unlink()
    for left_by_a_kill in path.glob(".*.tmp"):
        left_by_a_kill.unlink()
    write_atomically(kept, digest.hexdigest())
    write_atomically(path / "taxonomy.json", taxonomy.to_json())


def reopen(directory: RunDirectory, before: Before) -> None:
    """Notes what was there, and only then takes back that the stage is finished."""
    # What an earlier run could not decode is tried again, and not taken for done.
    for stale in [directory.path / _LISTING, *directory.path.glob("*.skipped")]:
        if stale.name == _LISTING or not before.holds(stale):
            stale.unlink(missing_ok=True)
    before.save(directory.path)
    directory.reopen()
