"""The directory of one stage: what it was started with, whether it is finished, and that only one process works in it."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from concentration.distributed import from_rank_zero, rank
from concentration.errors import Busy, ConcentrationError, ConfigError, DataError
from concentration.progress import STATUS_FILE
from concentration.schema import Config, flatten, hash_values, parse_json
from concentration.stages.directory_lock import is_locked, locking
from concentration.targets import write_atomically
from concentration.temporaries import clear_temporaries
from concentration.training.configs import CHECKPOINTS

#: What every file of a run holds at least, and of which type.
_KEYS: Mapping[str, Mapping[str, type]] = {
    "config.json": {"identity": dict, "config": dict},
    "DONE.json": {"config": str},
}

SPEED_FILE = "speed.json"
#: Of a stage that makes a network.
NETWORK_FILE = "model.safetensors"

#: What `overwrite` replaces waits here until it is known that the new can be made.
REPLACED_FOLDER = ".replaced"

#: The fingerprints of prepared images among a stage's upstream results; and what is beside making everything anew of them.
_OF_DATA = {f"upstream.{name}" for name in ("data", "val", "test")}
HOW_TO_GROW = (
    "where `prepare append=true` has brought classes, extend a student by them: `concentrate add vertical=NAME`"
)

#: How long a part of a stage waits for the others to look at the directory.
_ENTER_SECONDS = 60.0
#: How long a stage waits for one that only looks whether it is held.
_LOOK_SECONDS = 0.5


class StageConfig(Config):
    """What every verb takes: the working directory, and leave to replace what is there.

    overwrite: true makes a finished stage anew, also with the same config: its images may have changed. "changed" replaces
        only what another config or other upstream results made; a whole run passes this on to its stages. Neither throws
        away what the same config has begun: a stopped command may be given again as it was. What is replaced comes back
        where the stage ends before it has written anything, at a mistake in the command say.
    """

    runtime_fields: ClassVar[frozenset[str]] = frozenset({"workdir", "overwrite"})

    workdir: Path
    overwrite: bool | Literal["changed"] = False

    @property
    def places(self) -> dict[str, str]:
        """By key: where what the stage reads lies, which is no part of what it is, but is not looked at once it is finished."""
        return {}


class RunDirectory:
    """`config.json` when a stage has begun, `DONE.json` when it is finished; in between it can be continued.

    The identity of a run is its config without runtime fields, and the identities of what it reads (`upstream`): a teacher
    of other shards is another teacher.
    """

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def begin(
        self, config: StageConfig, upstream: Mapping[str, str], part: str | None = None, is_growing: bool = False
    ) -> Iterator[bool]:
        """Gives whether there is work to do; holds the directory against other processes meanwhile.

        Where several processes share the stage, each gives its `part` and holds that alone. A stage that `is_growing` has
        work also when it is finished.

        Raises:
            Busy: another process works here.
            ConfigError: the stage was begun with another config or other upstream results, and `overwrite` is false; or it is
                finished, and other places are given than those that it read.
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
                self.forget_replaced()

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
            self._settle_replaced()
            self._clear_temporaries()
        identity = {**config.identity(), "upstream": dict(upstream)}
        earlier = self._load("config.json")
        known = {} if earlier is None else _leave_out_runtime_fields(earlier["identity"], config)
        is_other = earlier is not None and known != identity
        if is_other and not config.overwrite:
            self._refuse(known, identity)
        is_other = is_other or (earlier is not None and self.is_finished and self._read_elsewhere(config))
        if is_other or (config.overwrite is True and self.is_finished):
            self._set_aside()
            earlier = None
        if earlier is None:
            values = {"identity": identity, "config": config.model_dump(mode="json")}
            write_atomically(self.path / "config.json", values)
        if self.is_finished:
            self._clear_checkpoints()  # the run that finished it may have been killed before it did
        return not self.is_finished

    @property
    def is_held(self) -> bool:
        """Whether another process works here. To be asked by one that holds nothing here itself: it would lose that."""
        return is_locked(self.path, ".lock") or self._has_parts()

    @property
    def is_finished(self) -> bool:
        return self._load("DONE.json") is not None

    def is_finished_with(self, config: StageConfig) -> bool:
        """Whether the stage is finished with this config, whatever has become of what it read.

        Raises:
            ConfigError: it was begun with another config, and `overwrite` is false; or it is finished, and other places are
                given than those that it read.
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
        """What a stage goes on or grows with may lie elsewhere than what it was begun with."""
        begun = self._load_begun()
        if begun["config"] != (config_now := config.model_dump(mode="json")):
            write_atomically(self.path / "config.json", {**begun, "config": config_now})

    def reopen(self) -> None:
        """Takes the mark back: the stage is begun, and continued by the next run."""
        (self.path / "DONE.json").unlink(missing_ok=True)

    def save_speed(self, images_per_second: float | None) -> None:
        """Keeps what was measured apart from DONE.json, which is the same however often the stage was stopped.

        None, where nothing was left to do, keeps what an earlier part of the stage measured.
        """
        if images_per_second is not None:
            write_atomically(self.path / SPEED_FILE, {"images_per_second": images_per_second})

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Marks the stage as finished."""
        identity = self._load_begun()["identity"]
        write_atomically(self.path / "DONE.json", {"config": hash_values(identity), **facts})
        self._clear_checkpoints()

    def copy_record(self, source: "RunDirectory", upstream: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Marks this directory as the finished stage that `source` is, with these of its upstream results and facts replaced."""
        begun = source._load_begun()
        known = begun["identity"]["upstream"]
        replaced = {name: value for name, value in upstream.items() if name in known}
        identity = {**begun["identity"], "upstream": {**known, **replaced}}
        write_atomically(self.path / "config.json", {"identity": identity, "config": begun["config"]})
        done = source._load("DONE.json")
        write_atomically(self.path / "DONE.json", {**done, **facts, "config": hash_values(identity)})

    def load_done(self, command: str, **facts: type) -> dict[str, Any]:
        """What a finished stage said of itself, at least these facts, of these types.

        Raises:
            ConfigError: it is not finished; `command` is named as what to run.
            DataError: its record is damaged.
        """
        done = self._load("DONE.json", **facts)
        if done is None:
            raise ConfigError(f"{self.path}: not there or not finished; run `{command}` first")
        return done

    def load_config(self) -> dict[str, Any]:
        """The config that the stage was begun with."""
        return self._load_begun()["config"]

    def load_upstream(self) -> dict[str, str]:
        """What the stage was begun with beside its config."""
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
        """Whether the finished stage read other places than are given now; where what it read is gone, it has moved.

        Raises: ConfigError where it did, and `overwrite` is false: what lies there would not be seen.
        """
        read = flatten(self.load_config())
        for key, place in config.places.items():
            earlier = read.get(key)
            if isinstance(earlier, str) and os.path.realpath(earlier) != os.path.realpath(place):
                if config.overwrite:
                    return True
                if "://" in earlier or os.path.exists(earlier):
                    raise ConfigError(
                        f"{self.path}: finished with {key}={earlier}, and {place} was not looked at; give {key}={earlier}, add "
                        "what is new by `concentrate prepare append=true`, or replace it with overwrite=true"
                    )
        return False

    def forget_replaced(self) -> None:
        """Deletes what `overwrite` has set aside: at the stage's end, or by a stage that is about to write much."""
        replaced = self.path / REPLACED_FOLDER
        if replaced.is_dir():
            for path in _config_last(_list(replaced)):
                _discard(path)
            _discard(replaced)

    def _leave(self, error: BaseException, part: str | None) -> None:
        """After an error; of several parts, the last does it, for the others may still make what replaces the old."""
        with contextlib.nullcontext() if part is None else self.lock(".lock", _ENTER_SECONDS):
            if not self._has_other_parts(part):
                self._settle_replaced()
                if isinstance(error, ConcentrationError):
                    self._forget_unless_begun()

    def _has_other_parts(self, part: str | None) -> bool:
        return part is not None and self._has_parts(but=f".lock-{part}")

    def _has_parts(self, but: str = "") -> bool:
        return any(is_locked(self.path, path.name) for path in self.path.glob(".lock-*") if path.name != but)

    def _clear_checkpoints(self) -> None:
        if (self.path / CHECKPOINTS).is_dir():
            _discard(self.path / CHECKPOINTS)

    def _clear_temporaries(self) -> None:
        """Of a status there may be one, which is written without the lock: whoever shows progress clears those."""
        clear_temporaries(self.path.parent, f"{self.path.name}.json", least_age_seconds=0)
        for path in self.path.rglob(".*.tmp"):
            if not path.name.startswith(f".{STATUS_FILE}."):
                path.unlink()

    def _forget_unless_begun(self) -> None:
        """A mistake that was found before anything was written may be corrected without `overwrite`."""
        if [path.name for path in self._list_content()] == ["config.json"]:
            (self.path / "config.json").unlink()

    def _set_aside(self) -> None:
        # NOTE: DONE.json first and config.json last, so that a kill in between leaves a run that is begun, not finished; then,
        # REPLACED_FOLDER without config.json says that what is in it belongs here.
        (self.path / REPLACED_FOLDER).mkdir(exist_ok=True)
        for path in _config_last(self._list_content()):
            path.rename(self.path / REPLACED_FOLDER / path.name)

    def _settle_replaced(self) -> None:
        """Brings back what was set aside where nothing has been written in its place, and else deletes it."""
        replaced = self.path / REPLACED_FOLDER
        if not replaced.is_dir():
            return
        if not _list(replaced):
            _discard(replaced)
            return
        if (replaced / "config.json").exists():
            if any(path.name != "config.json" for path in self._list_content()):
                self.forget_replaced()
                return
            (replaced / "config.json").replace(self.path / "config.json")
        for path in reversed(_config_last(_list(replaced))):
            path.rename(self.path / path.name)
        _discard(replaced)

    def _list_content(self) -> list[Path]:
        """All that the stage has here: neither locks nor what was set aside."""
        return [p for p in _list(self.path) if not p.name.startswith(".lock") and p.name != REPLACED_FOLDER]

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
    """What a finished stage has lost of its network, and what to do; empty where all is there."""
    if not (path / "DONE.json").exists():
        return ""
    done = parse_json((path / "DONE.json").read_bytes(), str(path / "DONE.json"))
    files = done.get("files", [NETWORK_FILE] if "step" in done else []) if isinstance(done, dict) else []
    lost = [name for name in files if not (path / name).exists()]
    return (
        f"finished, but {', '.join(lost)} is gone: bring it back, or make it anew with overwrite=true" if lost else ""
    )


#: NFS gives names that begin so to files that are deleted and that somebody has open; it deletes them when they are closed.
_KEPT_BY_NFS = ".nfs"


def _list(folder: Path) -> list[Path]:
    """What is in a folder; nothing where all of it, however deep, is kept by NFS."""
    if all(path.is_dir() or path.name.startswith(_KEPT_BY_NFS) for path in folder.rglob("*")):
        return []
    return [path for path in folder.iterdir() if not path.name.startswith(_KEPT_BY_NFS)]


def _discard(path: Path) -> None:
    """Deletes a file, or a folder with all in it but what is kept by NFS."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists() and (left := _list(path)):
        shutil.rmtree(left[0]) if left[0].is_dir() else left[0].unlink()  # which raises why


def _config_last(paths: Iterable[Path]) -> list[Path]:
    """In the order in which a kill in between leaves no finished stage: DONE.json first, config.json last."""
    return sorted(paths, key=lambda path: (path.name == "config.json", path.name != "DONE.json"))


def _leave_out_runtime_fields(identity: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Without what was part of an identity in an earlier version, and is not any more."""
    left = {}
    for key, value in identity.items():
        inner = getattr(config, key, None)
        if key not in config.runtime_fields:
            is_part = isinstance(inner, Config) and isinstance(value, Mapping)
            left[key] = _leave_out_runtime_fields(value, inner) if is_part else value
    return left


def hash_file(path: Path) -> str:
    """A hash of a file's content; 16 hex digits of SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
