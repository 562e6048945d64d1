"""`concentrate VERB [overrides]`: the command line. Hydra composes, the config is checked, one stage runs."""

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from concentration import preemption
from concentration.completion import OPTION, complete, get_script
from concentration.config import VERBS, check_config, describe_composition_error, find_config_directory
from concentration.errors import ConcentrationError, ConfigError, Preempted, naming_refusals
from concentration.processes import check_surroundings, end, raise_file_limit
from concentration.schema import quote, suggest
from concentration.stages.verbs import split_words
from concentration.streams import open_streams

#: Nothing of Hydra's own is written: a run's directory is its workdir, and its config is kept there by the stage.
HYDRA_OVERRIDES = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
)

BUG_EXIT_CODE = 1

# Our launchers keep the plugins' names and are checked by their schemas, as Hydra 1.3 still does. Processes that a launcher
# starts compose the config again: they import this module, where the jobs come from.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 0 when finished, 2 for the user's mistake, 75 when preempted, 1 for a bug."""
    preemption.note_signals()  # before torch is imported, which takes seconds in which a job may be asked to stop
    open_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Read when torch is imported: with two threads on a small shared machine a step was seen to take 20 to 100 times longer.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    verb, *rest = arguments or ["help"]
    try:
        if verb in ("-h", "--help", "help"):
            print(_usage(), flush=True)
            sys.exit(0 if arguments else ConfigError.exit_code)
        if verb in ("completion", OPTION) and len(rest) == 1:
            print(get_script(*rest) if verb == "completion" else "\n".join(complete(*rest)))
            sys.exit(0)
        if verb not in VERBS:
            raise ConfigError(f"no verb '{verb}'{suggest(verb, VERBS)}")
        check_surroundings()
        raise_file_limit()
        exit_code = _run_hydra(verb, rest)
        sys.stdout.flush()
    except ConcentrationError as error:
        exit_code = _say(error)
    except KeyboardInterrupt:
        print("concentrate: stopped from the keyboard", file=sys.stderr)
        exit_code = 128 + signal.SIGINT
    end(exit_code)


def run_verb(verb: str, composed: Any, words: Sequence[str] = ()) -> int:
    """Checks the config, runs the verb, and returns its exit code; an error is printed, not raised."""
    try:
        config = check_config(verb, composed, words)
        with naming_refusals():
            VERBS[verb].load()[0](config)
    except Preempted as error:
        preemption.leave_marker(error)
        return _say(error)
    except ConcentrationError as error:
        return _say(error)
    except Exception:
        # The process may be one of many jobs of a multirun: its traceback is printed here, and its code goes up.
        traceback.print_exc()
        return BUG_EXIT_CODE
    return 0


def _run_hydra(verb: str, rest: list[str]) -> int:
    """Runs one job, or a multirun's, and returns the worst exit code."""
    from hydra import version
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    # NOTE: hydra.main throws the jobs' return values away, so its two calls are made here; tests hold this to Hydra 1.3.
    version.setbase("1.3")
    options = _parse_options(rest)
    search_path: ConfigSearchPathImpl = create_config_search_path(str(find_config_directory()))
    if options.config_dir:
        directory = Path(options.config_dir).resolve()
        if not directory.is_dir():
            raise ConfigError(f"--config-dir={options.config_dir}: no such directory")
        search_path.prepend(provider="command line", path=f"file://{directory}")
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2(task_name="concentrate", config_search_path=search_path)
    given, words = split_words(options.overrides) if VERBS[verb].positional else (options.overrides, [])
    overrides = [*HYDRA_OVERRIDES, *given]
    try:
        composed = _compose(hydra, verb, overrides, given)
        if options.help:
            print(_verb_help(verb, composed))
            return 0
        if options.cfg:
            hydra.show_cfg(verb, overrides, options.cfg, options.package, options.resolve)
            return 0
        job = _Job(verb, words)
        if any(override.startswith("hydra/launcher=") for override in overrides):
            preemption.stop_at_once()  # this process only waits for the jobs
        if options.multirun or composed.hydra.mode == RunMode.MULTIRUN:
            with _sweep_directory(composed.hydra.runtime.choices["hydra/launcher"]) as directory:
                places = [f"hydra.sweep.dir={directory}", "hydra.sweep.subdir=."]
                batches = hydra.multirun(verb, job, [*overrides, *places], False)
            return _worst([returned.return_value for batch in batches for returned in batch])
        return hydra.run(verb, job, overrides, with_log_configuration=False).return_value
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(describe_composition_error(error, verb, given)) from None


@contextlib.contextmanager
def _sweep_directory(launcher: str) -> Iterator[str]:
    """Where Hydra writes of a multirun: submitit, by whose scripts and logs other machines find their jobs, into the workdir."""
    if launcher.startswith("submitit"):
        yield "${workdir}"
        return
    with tempfile.TemporaryDirectory(prefix="concentrate-") as directory:  # multirun.yaml, which nobody reads
        yield quote(directory)


def _parse_options(words: list[str]) -> argparse.Namespace:
    """Hydra's options, without those that `hydra.main` has and that would do nothing here.

    Raises: ConfigError for another option.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    options = parser.parse_intermixed_args(words)  # options may stand between overrides
    if options.cfg is None and (options.resolve or options.package):
        raise ConfigError(f"{'--resolve' if options.resolve else '--package'} has no effect without --cfg job")
    return options


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            f"{message}; the options are --help, --multirun, --cfg job, --resolve, --package KEY, and --config-dir DIR, with "
            "which DIR/trainer/mine.yaml, a file of your own, is taken by trainer=mine"
        )


def _compose(hydra: Any, verb: str, overrides: list[str], given: list[str]) -> Any:
    """The config of all jobs: it says whether one is asked for or several, and what `--help` shows.

    Raises: ConfigError for what Hydra has no error of its own for, as well.
    """
    from hydra.types import RunMode

    try:
        # NOTE: not `Hydra.get_mode`, which does the same and keeps its errors to itself.
        return hydra.compose_config(
            verb, overrides, RunMode.MULTIRUN, with_log_configuration=False, validate_sweep_overrides=False
        )
    except ValueError as error:
        raise ConfigError(describe_composition_error(error, verb, given)) from None


class _Job:
    """The task that Hydra's launchers call, in this process or in another."""

    def __init__(self, verb: str, words: Sequence[str] = ()):
        self._verb = verb
        self._words = words
        self._stopped = False

    def __call__(self, composed: Any) -> int:
        preemption.note_signals()  # in a process of joblib's, or of submitit's with its own handlers
        open_streams()
        # joblib's way of starting is unknown to the processes that a run starts.
        if multiprocessing.get_start_method(allow_none=True) == "loky":
            multiprocessing.set_start_method("forkserver", force=True)
        if self._stopped:  # the jobs that come after it in this process are not begun
            return Preempted.exit_code
        exit_code = run_verb(self._verb, composed, self._words)
        self._stopped = exit_code == Preempted.exit_code
        if self._stopped and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            preemption.requeue_slurm_job()  # does not return, so that submitit does not take the job for finished
        return exit_code


def _worst(exit_codes: Sequence[int]) -> int:
    """A bug is worse than a mistake, and a mistake worse than a preemption, which another try would finish."""
    severity = {0: 0, 75: 1, 2: 2}
    return max(exit_codes, key=lambda code: severity.get(code, 3), default=0)


def _say(error: ConcentrationError) -> int:
    print(f"concentrate: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def _usage() -> str:
    verbs = "\n".join(f"  {name:<10} {verb.summary}" for name, verb in VERBS.items())
    return f"""concentrate: one teacher per vertical, concentrated into one student

Usage: concentrate VERB [KEY=VALUE ...]
       concentrate VERB --help          the keys of a verb and their values
       concentrate VERB -m KEY=A,B,C    several runs, one for each combination
       concentrate VERB --cfg job       the config as YAML, without a run
       concentrate VERB --config-dir DIR trainer=mine    with a file of your own, DIR/trainer/mine.yaml
       concentrate completion bash      completes verbs, keys and values: eval "$(concentrate completion bash)"

{verbs}

Start with:  concentrate run"""


def _verb_help(verb: str, composed: Any) -> str:
    from omegaconf import OmegaConf, open_dict

    from concentration.verb_help import describe_verb

    choices = {
        group: chosen for group, chosen in composed.hydra.runtime.choices.items() if not group.startswith("hydra/")
    }
    with open_dict(composed):
        del composed["hydra"]
    return describe_verb(verb, choices, OmegaConf.to_yaml(composed))


if __name__ == "__main__":
    main()
