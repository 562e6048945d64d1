"""What `prepare` is to write or to index, so that a run goes on with what an earlier one began only if that was the same."""

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from concentration.data.appending import Before
from concentration.data.sources.source import Item
from concentration.errors import DataError
from concentration.files import write_atomically
from concentration.stages.run_directory import RunDirectory
from concentration.taxonomy import Taxonomy

#: In `shards/`: a hash of what was to be done when the stage was begun.
_LISTING = "listing.sha256"
#: What a run writes by shard: its own files, and what says of them that they are whole.
_PATTERNS = ("*.skipped", "*.hashes", "*.index", "*.tar", "*.pack")
#: What the stage said of itself before something was appended.
_DONE_BEFORE = ".DONE.before.json"


def index_keys(items: Sequence[Item]) -> dict[str, Item]:
    """Raises: DataError where two share a key."""
    item_of_key: dict[str, Item] = {}
    for item in items:
        if (other := item_of_key.setdefault(item.key, item)) is not item:
            raise DataError(
                f"data: two samples have the key '{item.key}': {other.locator}, {item.locator}; list each image once"
            )
    return item_of_key


def check_training_images(items: Sequence[Item], taxonomy: Taxonomy) -> None:
    """Raises: DataError where there are none, or none of a vertical: at once, and not when all shards are written."""
    if not items:
        raise DataError("data: no training image; lower the shares of the other splits, or give more images")
    labels = {label for item in items for label in item.labels}
    seen = {taxonomy.classes[taxonomy.position[label]].vertical for label in labels}
    for vertical in taxonomy.verticals:
        if vertical not in seen:
            raise DataError(
                f"data: vertical '{vertical}' has no training image; add some, lower the shares of the other splits, or "
                "remove it from the taxonomy"
            )


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
    if is_other:
        _remove_new(path, before)
    write_atomically(kept, digest.hexdigest())
    write_atomically(path / "taxonomy.json", taxonomy.to_json())


def reopen(directory: RunDirectory, before: Before) -> None:
    """Notes what was there, and only then takes back that the stage is finished."""
    # What an earlier run could not decode is tried again, and not taken for done.
    for stale in [directory.path / _LISTING, *directory.path.glob("*.skipped")]:
        if stale.name == _LISTING or not before.holds(stale):
            stale.unlink(missing_ok=True)
    before.save(directory.path)
    shutil.copyfile(directory.path / "DONE.json", directory.path / _DONE_BEFORE)
    directory.reopen()


@contextlib.contextmanager
def keeping(directory: RunDirectory, before: Before | None) -> Iterator[None]:
    """Where something new is not as it should be, what was there before is finished again, as it was."""
    try:
        yield
    except DataError:
        done = directory.path / _DONE_BEFORE
        if before is not None and done.exists():
            _remove_new(directory.path, before)
            write_atomically(directory.path / "taxonomy.json", before.taxonomy(directory.path).to_json())
            (directory.path / _LISTING).unlink(missing_ok=True)
            done.replace(directory.path / "DONE.json")
            before.forget(directory.path)
        raise


def forget(directory: RunDirectory, before: Before) -> None:
    """What was appended is finished, too."""
    (directory.path / _DONE_BEFORE).unlink(missing_ok=True)
    before.forget(directory.path)


def settle_skipped(path: Path, shards: Sequence[Path], num_listed: int, max_skipped_share: float) -> None:
    """Notes and says which images of these shards were left out, of all that are listed.

    Raises: DataError where they are too many, or all.
    """
    skipped_of = {shard: shard.with_suffix(".skipped").read_text(encoding="utf-8").splitlines() for shard in shards}
    skipped = [line for lines in skipped_of.values() for line in lines]
    write_atomically(path / "skipped.txt", "".join(f"{line}\n" for line in skipped))
    if not skipped:
        return
    found = f"{len(skipped)} of {num_listed} images cannot be read or decoded"
    first = f"the first: {skipped[0]}"
    if len(skipped) <= max(1, max_skipped_share * num_listed) and len(skipped) < num_listed:
        print(f"prepare: {found}, and {'is' if len(skipped) == 1 else 'are'} left out: {path}/skipped.txt; {first}")
        return
    for shard, lines in skipped_of.items():
        if lines:  # it is written again once the images are repaired
            shard.with_suffix(".skipped").unlink()
    if len(skipped) == num_listed:
        raise DataError(f"{found}: they lie elsewhere than data says, or are no images; {first}")
    share = math.ceil(1000 * len(skipped) / num_listed) / 1000
    raise DataError(
        f"{found}, more than max_skipped_share={max_skipped_share}; they are listed in {path}/skipped.txt: repair or remove "
        f"them, or give max_skipped_share={share:g}; {first}"
    )


def _remove_new(path: Path, before: Before | None) -> None:
    for pattern in _PATTERNS:
        for stale in path.glob(pattern):
            if before is None or not before.holds(stale):
                stale.unlink()
