"""The directory of one stage: what it was started with, whether it is finished, and that only one process works in it."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from concentration.distributed import from_rank_zero, rank
from concentration.errors import Busy, ConcentrationError, ConfigError, DataError
from concentration.files import write_atomically
from concentration.progress import STATUS_FILE
from concentration.schema import Config, flatten, hash_values, parse_json
from concentration.stages.directory_lock import is_locked, locking
from concentration.stages.nfs_folders import discard
from concentration.stages.replaced import forget_replaced, list_content, set_aside, settle_replaced
from concentration.temporaries import clear_temporaries
from concentration.training.configs import CHECKPOINTS

#: The keys that every such file of a run must hold, and their types.
_KEYS: Mapping[str, Mapping[str, type]] = {
    "config.json": {"identity": dict, "config": dict},
    "DONE.json": {"config": str},
}

SPEED_FILE = "speed.json"
#: The network, where the stage makes one.
NETWORK_FILE = "model.safetensors"

#: The fingerprints of prepared images among a stage's upstream results; and what else may be done where these have changed.
_OF_DATA = {f"upstream.{name}" for name in ("data", "val", "test")}
HOW_TO_GROW = (
    "where `prepare append=true` has brought classes, extend a student by them: `concentrate add vertical=NAME`"
)

#: How long one part of a stage waits while other parts begin or end.
_ENTER_SECONDS = 60.0
#: How long a stage waits for a process that holds the lock only to see whether it is held.
_LOOK_SECONDS = 0.5


class StageConfig(Config):
    """What every verb takes: the working directory, and permission to replace what is there.

    workdir: the working directory, below which all verbs read and write.
    overwrite: `true` makes a finished stage anew, even with the same config, as its images may have changed. `changed` replaces
        only what another config or other upstream results have made; a whole run passes this on to its stages. Neither throws
        away what the same config has begun, so a stopped command may be repeated as it was. What is replaced comes back if the
        stage ends before it has written anything, for instance because of a mistake in the command.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"workdir", "overwrite"})

    workdir: Path
    overwrite: bool | Literal["changed"] = False

    @property
    def places(self) -> dict[str, str]:
        """The places that the stage reads, by key. They are no part of its identity, and a finished stage does not read again."""
        return {}


class RunDirectory:
    """A stage has begun when there is `config.json`, and is finished when there is `DONE.json`; in between it can be continued.

    The identity of a run is its config without runtime fields, together with the identities of what it reads (`upstream`): a
    teacher of other shards is another teacher.
    """

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def begin(
        self, config: StageConfig, upstream: Mapping[str, str], part: str | None = None, is_growing: bool = False
    ) -> Iterator[bool]:
        """Yields whether there is work to do, and holds the directory against other processes in the meantime.

        Where several processes share the stage, each gives its `part` and holds only that. A stage that `is_growing` has
        work even when it is finished.

        Raises:
            Busy: another process works here.
            ConfigError: the stage was begun with another config or other upstream results, and `overwrite` is false; or it is
                finished, but has read other places than those that are given now.
        """
        # The lock is rank 0's; the other ranks hear from it whether there is work.
        with contextlib.ExitStack() as stack:
            is_due = from_rank_zero(lambda: self._enter_locked(stack, config, upstream, part) or is_growing)
            if not is_due and rank() == 0:
                print(f"{self.path}: {describe_lost(self.path) or 'finished already, nothing is to do'}")
            try:
                yield is_due
            except BaseException as error:
                if rank() == 0:
                    self._leave(error, part)
                raise
            if rank() == 0:
                forget_replaced(self.path)

    def _enter_locked(
        self, stack: contextlib.ExitStack, config: StageConfig, upstream: Mapping[str, str], part: str | None
    ) -> bool:
        if part is None:
            stack.enter_context(self.lock(".lock", _LOOK_SECONDS))
            if self._has_parts():
                raise Busy(f"{self.path}: other processes make parts of this; wait for them or end them")
            return self._enter(config, upstream, part)
        stack.enter_context(self.lock(f".lock-{part}", _LOOK_SECONDS))
        with self.lock(".lock", wait_seconds=_ENTER_SECONDS):
            return self._enter(config, upstream, part)

    def _enter(self, config: StageConfig, upstream: Mapping[str, str], part: str | None) -> bool:
        if not self._has_other_parts(part):  # of a run that was killed
            self._clear_temporaries()  # first: half a config.json beside what was set aside is no new result
            settle_replaced(self.path)
        identity = {**config.identity(), "upstream": dict(upstream)}
        earlier = self._load("config.json")
        known = {} if earlier is None else _leave_out_runtime_fields(earlier["identity"], config)
        is_other = earlier is not None and known != identity
        if is_other and not config.overwrite:
            self._refuse(known, identity)
        is_other = is_other or (earlier is not None and self.is_finished and self._read_elsewhere(config))
        if is_other or (config.overwrite is True and self.is_finished):
            set_aside(self.path)
            earlier = None
        if earlier is None:
            values = {"identity": identity, "config": config.model_dump(mode="json")}
            write_atomically(self.path / "config.json", values)
        if self.is_finished:
            self._clear_checkpoints()  # the run that finished it may have been killed before it did
        return not self.is_finished

    @property
    def is_held(self) -> bool:
        """Whether another process works here. A process that holds a lock here itself must not ask: it would lose that lock."""
        return is_locked(self.path, ".lock") or self._has_parts()

    @property
    def is_finished(self) -> bool:
        return self._load("DONE.json") is not None

    def finished_at(self) -> int:
        """When the finished stage was so, in nanoseconds since 1970; a copy of it does not change this.

        Of stages of an earlier version, which did not record it, and of copied records: when DONE.json was written.
        """
        recorded = None
        with contextlib.suppress(DataError):  # which the stage itself tells
            recorded = self._load_begun().get("finished_at")
        return recorded if isinstance(recorded, int) else (self.path / "DONE.json").stat().st_mtime_ns

    def is_finished_with(self, config: StageConfig) -> bool:
        """Whether the stage is finished with this config, whatever has since become of what it read.

        Raises:
            ConfigError: it was begun with another config, and `overwrite` is false; or it is finished, but has read other places
                than those that are given now.
        """
        begun = self._load("config.json")
        if begun is None:
            return False
        known = _leave_out_runtime_fields(begun["identity"], config)
        earlier = {key: value for key, value in known.items() if key != "upstream"}
        if earlier != config.identity():
            if not config.overwrite:
                self._refuse(earlier, config.identity())
            return False
        return self.is_finished and not self._read_elsewhere(config)

    def note_places(self, config: StageConfig) -> None:
        """Records the config once more: the places that a stage continues or grows with may not be those that it began with."""
        begun = self._load_begun()
        if begun["config"] != (config_now := config.model_dump(mode="json")):
            write_atomically(self.path / "config.json", {**begun, "config": config_now})

    def reopen(self) -> None:
        """Marks the stage as unfinished again, so that the next run continues it."""
        (self.path / "DONE.json").unlink(missing_ok=True)

    def save_speed(self, images_per_second: float | None) -> None:
        """Keeps the measured speed, apart from DONE.json, which must be the same however often the stage was stopped.

        None, where nothing was left to do, keeps what was measured before.
        """
        if images_per_second is not None:
            write_atomically(self.path / SPEED_FILE, {"images_per_second": images_per_second})

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Marks the stage as finished, now."""
        begun, file = self._load_begun(), self.path / "config.json"
        file.touch()  # by the clock of the file system, which all machines share
        write_atomically(file, {**begun, "finished_at": file.stat().st_mtime_ns})
        write_atomically(self.path / "DONE.json", {"config": hash_values(begun["identity"]), **facts})
        self._clear_checkpoints()

    def copy_record(self, source: "RunDirectory", upstream: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Marks this directory as finished like `source`, but with these upstream results and facts in place of its own."""
        begun = source._load_begun()
        known = begun["identity"]["upstream"]
        replaced = {name: value for name, value in upstream.items() if name in known}
        identity = {**begun["identity"], "upstream": {**known, **replaced}}
        write_atomically(self.path / "config.json", {"identity": identity, "config": begun["config"]})
        done = source._load("DONE.json")
        write_atomically(self.path / "DONE.json", {**done, **facts, "config": hash_values(identity)})

    def load_done(self, command: str, **facts: type) -> dict[str, Any]:
        """The record of a finished stage, which has at least these facts, of these types.

        Raises:
            ConfigError: the stage is not finished; the message says to run `command`.
            DataError: its record is damaged.
        """
        done = self._load("DONE.json", **facts)
        if done is None:
            raise ConfigError(f"{self.path}: not there or not finished; run `{command}` first")
        return done

    def load_config(self) -> dict[str, Any]:
        """The config that the stage was begun with."""
        return self._load_begun()["config"]

    def find_moved(self, places: Mapping[str, str]) -> dict[str, str]:
        """By key, the places that the stage was begun with, where they are not those of `places`."""
        read = flatten(self.load_config())
        return {
            key: earlier
            for key, place in places.items()
            if isinstance(earlier := read.get(key), str) and os.path.realpath(earlier) != os.path.realpath(place)
        }

    def load_upstream(self) -> dict[str, str]:
        """The upstream results that the stage was begun with."""
        return self._load_begun()["identity"]["upstream"]

    def lock(self, name: str, wait_seconds: float = 0) -> contextlib.AbstractContextManager[None]:
        """Holds the directory, or a part of its work, against other processes. Raises: as `locking`."""
        return locking(self.path, name, wait_seconds)

    def _refuse(self, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        before, after = flatten(earlier), flatten(now)
        told = {
            key: [repr(each[key]) if key in each else "not there" for each in (before, after)] for key in before | after
        }
        changed = {key: (was, now) for key, (was, now) in sorted(told.items()) if was != now}
        shown = "; ".join(f"{key} was {was}, is {now}" for key, (was, now) in list(changed.items())[:5])
        if not all(key.startswith("upstream.") for key in changed):
            raise ConfigError(
                f"{self.path}: begun with another configuration: {shown}; "
                "give it another name or workdir, restore the values, or replace it with overwrite=true"
            )
        is_of_other_data = not changed.keys().isdisjoint(_OF_DATA)
        raise ConfigError(
            f"{self.path}: what it was made from has changed since: {shown}; make it anew with overwrite=changed"
            + (f", or, {HOW_TO_GROW}" if is_of_other_data else "")
        )

    def _read_elsewhere(self, config: StageConfig) -> bool:
        """Whether the finished stage is to be made anew because it has read other places than those that are given now.

        A place that no longer exists counts as moved to where it is given now.

        Raises:
            ConfigError: it has read other places, and `overwrite` is false: what lies there now would not be looked at.
        """
        for key, earlier in self.find_moved(config.places).items():
            if config.overwrite:
                return True
            if "://" in earlier or os.path.exists(earlier):
                raise ConfigError(
                    f"{self.path}: finished with {key}={earlier}, and {config.places[key]} was not looked at; give "
                    f"{key}={earlier}, add what is new by `concentrate prepare append=true`, or replace it with overwrite=true"
                )
        return False

    def _leave(self, error: BaseException, part: str | None) -> None:
        """Cleans up after an error. Of several parts the last one does so: the others may still make what replaces the old."""
        with contextlib.nullcontext() if part is None else self.lock(".lock", _ENTER_SECONDS):
            if not self._has_other_parts(part):
                settle_replaced(self.path)
                if isinstance(error, ConcentrationError):
                    self._forget_unless_begun()

    def _has_other_parts(self, part: str | None) -> bool:
        return part is not None and self._has_parts(but=f".lock-{part}")

    def _has_parts(self, but: str = "") -> bool:
        return any(is_locked(self.path, path.name) for path in self.path.glob(".lock-*") if path.name != but)

    def _clear_checkpoints(self) -> None:
        if (self.path / CHECKPOINTS).is_dir():
            discard(self.path / CHECKPOINTS)

    def _clear_temporaries(self) -> None:
        """Of a status there may be one, which is written without the lock: whoever shows progress clears those."""
        for beside in ("json", "safetensors"):
            clear_temporaries(self.path.parent, f"{self.path.name}.{beside}", least_age_seconds=0)
        for path in self.path.rglob(".*.tmp"):
            if not path.name.startswith(f".{STATUS_FILE}."):
                path.unlink()

    def _forget_unless_begun(self) -> None:
        """Forgets the config if nothing else was written, so that a mistake in it can be corrected without `overwrite`."""
        if [path.name for path in list_content(self.path)] == ["config.json"]:
            (self.path / "config.json").unlink()

    def _load_begun(self) -> dict[str, Any]:
        begun = self._load("config.json")
        if begun is None:
            raise DataError(
                f"{self.path}/config.json: no such file; bring it back, or delete {self.path} and run the stage again"
            )
        return begun

    def _load(self, name: str, **facts: type) -> dict[str, Any] | None:
        path = self.path / name
        again = f"bring it back, or delete {self.path} and run the stage again"
        try:
            values = parse_json(path.read_bytes(), str(path))
        except FileNotFoundError:
            return None
        except DataError as error:
            raise DataError(f"{error}, or delete {self.path} and run the stage again") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}: a {type(values).__name__}, expected an object; {again}")
        for key, kind in {**_KEYS[name], **facts}.items():
            if not isinstance(values.get(key), kind):
                raise DataError(f"{path}: '{key}' is {values.get(key)!r:.80}, expected a {kind.__name__}; {again}")
        return values


def describe_lost(path: Path) -> str:
    """What a finished stage has lost of its network, and what to do about it; empty where nothing is missing.

    Raises:
        DataError: its record is damaged.
    """
    done = RunDirectory(path)._load("DONE.json")
    if done is None:
        return ""
    files = done.get("files", [NETWORK_FILE] if "step" in done else [])
    lost = [name for name in files if not (path / name).exists()]
    return (
        f"finished, but {', '.join(lost)} is gone: bring it back, or make it anew with overwrite=true" if lost else ""
    )


def _leave_out_runtime_fields(identity: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """An identity without what an earlier version counted as part of it, but this one does not."""
    left = {}
    for key, value in identity.items():
        inner = getattr(config, key, None)
        if key not in config.runtime_fields:
            is_part = isinstance(inner, Config) and isinstance(value, Mapping)
            left[key] = _leave_out_runtime_fields(value, inner) if is_part else value
    return left
