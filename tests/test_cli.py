"""The command line: what it answers, with which exit code, and that every config under conf/ is a config of its verb."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from real_runs import IMAGE_SIZE, TINY, Running, concentrate, one_line, prepare_shards, run_command

from concentration import cli, preemption
from concentration.config import VERBS, check_config, find_config_directory
from concentration.errors import ConfigError, DataError, naming_refusals
from concentration.pipeline import records

CONF = find_config_directory()
PRIMARY = sorted(path.stem for path in CONF.glob("*.yaml"))
#: `hydra/` is no part of a config: it says where the jobs of a multirun run.
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
#: What a config leaves for the user to give.
MANDATORY = {"vertical=fruit", "data.path=there", "base.name=resnet18", "external.path=there", "external.classes=there",
             "external.output=softmax_logits", "external.name=resnet18", "external.function=mine:build",
             "external.checkpoint=there", "external.image_size=32", "destination=there",
             "verticals=[fruit,tools]", "into=things"}  # fmt: skip


def options_of(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def options_for(verb: str, group: str) -> list[str]:
    """`method` holds rows of tables, which are taken on top of nothing, and the methods of `group`, one of which is taken."""
    defaults = yaml.safe_load((CONF / f"{verb}.yaml").read_text())["defaults"]
    [taken] = [entry[group] for entry in defaults if isinstance(entry, dict) and group in entry]
    is_row = {
        option: "@package _global_" in (CONF / group / f"{option}.yaml").read_text() for option in options_of(group)
    }
    return [option for option in options_of(group) if is_row[option] == (taken is None)]


def defaults_of(verb: str) -> set[str]:
    """The groups that a primary config takes an option of, or may take one of."""
    defaults = yaml.safe_load((CONF / f"{verb}.yaml").read_text())["defaults"]
    return {group for entry in defaults if isinstance(entry, dict) for group in entry if group in GROUPS}


def verb_of(experiment: str) -> str:
    """The verb in the `concentrate VERB experiment=NAME` of the file's comment, or `run`."""
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    found = re.search(rf"concentrate (\w+)[^\n]*experiment={experiment}\b", text)
    return found[1] if found else "run"


def check(verb: str, *overrides: str):
    """Composes and checks; what is mandatory is given where the config asks for it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = list(overrides)
        for _ in range(6):
            try:
                return check_config(verb, compose(verb, given))
            except ConfigError as error:
                asked = re.search(r"'([\w.]+)' is missing", str(error))
                answer = [option for option in MANDATORY if asked and option.startswith(f"{asked[1]}=")]
                if not answer:
                    raise
                given += answer
        raise AssertionError(f"{verb} {given}: does not end asking")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return prepare_shards(tmp_path_factory.mktemp("cli"))


def mistake(*arguments: str, directory: Path) -> str:
    return one_line(concentrate(*arguments, directory=directory, code=2))


def test_every_verb_has_a_primary_config_and_the_other_way_round():
    assert set(PRIMARY) == set(VERBS)


@pytest.mark.parametrize("verb", PRIMARY)
def test_every_primary_config_is_valid(verb):
    check(verb)


@pytest.mark.parametrize(
    ("verb", "group", "option"),
    [
        (verb, group, option)
        for verb in PRIMARY
        for group in sorted(defaults_of(verb) - {"experiment"})
        for option in options_for(verb, group)
        if (verb, option) not in (("targets", "labels"), ("targets", "online"))  # there is nothing to store
    ],
)
def test_every_option_of_every_group_is_valid(verb, group, option):
    check(verb, f"{group}={option}")


@pytest.mark.parametrize("experiment", options_of("experiment") if (CONF / "experiment").is_dir() else [])
def test_every_experiment_is_valid(experiment):
    check(verb_of(experiment), f"experiment={experiment}")


def test_without_a_verb_the_usage_is_shown(tmp_path):
    finished = concentrate(directory=tmp_path, code=2)
    assert "Usage: concentrate VERB" in finished.out + finished.err
    for word in ("--help", "-h"):
        shown = concentrate(word, directory=tmp_path).out
        assert all(f"  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize("verb", PRIMARY)
def test_help_of_every_verb_shows_its_choices_and_keys(verb, tmp_path):
    shown = concentrate(verb, "--help", directory=tmp_path).out
    assert VERBS[verb].summary in shown
    assert re.search(r"^workdir: ", shown, re.MULTILINE)
    for group in defaults_of(verb):
        assert re.search(rf"^  {group}={re.escape('|'.join(options_for(verb, group)))}$", shown, re.MULTILINE), group


def test_help_says_of_a_key_what_was_written_of_it(tmp_path):
    """The comments of lists under `defaults:` are of no key."""
    shown = concentrate("run", "--help", directory=tmp_path).out
    assert re.search(r"^  - 16$", shown, re.MULTILINE)
    assert re.search(r"^  norm: batch +# batch \| group", shown, re.MULTILINE)


@pytest.mark.parametrize(
    "given", ["generalist.optimizer.lr=0.5", "teacher.base.channels=[4,8]", "generalist.base.norm=none"]
)
def test_a_key_of_what_is_another_s_as_a_whole_is_told_with_the_command_that_has_it(given, tmp_path):
    """`generalist.optimizer: ${optimizer}` has no keys of its own to change."""
    key, _, value = given.partition("=")
    refused = one_line(concentrate("run", given, "dry_run=true", directory=tmp_path, code=2))
    assert f"unknown key '{key}'" in refused
    advised = next(word for word in shlex.split(refused) if "={" in word)
    shown = concentrate("run", advised, "--cfg", "job", directory=tmp_path).out
    whole, _, inner = key.rpartition(".")
    before = OmegaConf.create(concentrate("run", "--cfg", "job", "--resolve", directory=tmp_path).out)
    after = OmegaConf.create(shown)
    expected = {**OmegaConf.select(before, whole), inner: OmegaConf.create(f"x: {value}").x}
    assert OmegaConf.select(after, whole) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["techer"], "no verb 'techer'; did you mean 'teacher'?"),
        (["techer", "vertical=x"], "did you mean 'teacher'?"),
        (["student", "trainr.max_epochs=3"], "did you mean 'trainer.max_epochs'?"),
        (["student", "trainer.max_epoch=3"], "unknown key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        (["student", "+trainer.max_epoch=3"], "unknown key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        (["student", "trainer.warmup_steps=3"], "unknown key 'trainer.warmup_steps'"),
        (["student", "top=fc_cs"], "top=fc_cs: no such choice; did you mean 'fc_sc'?"),
        (["run", "top@teacher.top=fc_cs"], "fc_cs: no such choice; did you mean 'fc_sc'?"),
        (["prepare", "data=glyph"], "data=glyph: no such choice; did you mean 'glyphs'?"),
        (["prepare", "data=image_folder"], "'data.path' is missing: give data.path=VALUE"),
        (
            ["prepare", "data=shards", "data.num_classes=3"],
            "data.num_classes has no effect with the choices that were made",
        ),
        (["teacher", "external=onnx", "external.pat=3"], "unknown key 'external.pat'; did you mean 'external.path'?"),
        (["teacher"], "'vertical' is missing: give vertical=VALUE"),
        (["teacher", "vertical=2020"], "run `concentrate prepare` first"),
        (["evaluate", "name=[2020,1999]"], "run `concentrate prepare` first"),
        (["teacher", "vertical=1.5"], """expected a text; put it in quotes as it is written: "vertical='1.5'\""""),
        (
            ["predict", "verticals=[true]"],
            """expected a text; put it in quotes as it is written: "verticals=['true']\"""",
        ),
        (["teacher", "vertical=null"], """for one named null, "vertical='null'\""""),
        (
            ["teacher", "vertical=a,b"],
            """a text with commas or brackets is put in quotes: "vertical='a,b'\"""",
        ),
        (
            ["teacher", "vertical=café"],
            """cannot be read; a text with special characters is put in quotes: "vertical='café'\"""",
        ),
        (
            ["teacher", "vertical=a(b"],
            """cannot be read; a text with special characters is put in quotes: "vertical='a(b'\"""",
        ),
        (["predict", "verticals=[café,b]"], """in quotes: "verticals=['café',b]\""""),
        (["teacher", "vertical=${x}"], """no key 'x' for ${x}; a text with it: 'vertical="\\${x}"'"""),
        (["student", f"seed={2**70}"], f"seed={2**70}: expected an integer from {1 - 2**63} to {2**63 - 1}"),
        (["prepare", f"data.seed=-{2**70}"], f"data.seed=-{2**70}: expected an integer from"),
        (["run", f"trainer.max_epochs={2**70}"], f"trainer.max_epochs={2**70}: expected an integer from"),
        (["student", f"base.channels=[4,{2**70}]"], f"base.channels={2**70}: expected an integer from"),
        (["student", f"name={2**70}", f"seed={2**62}"], "run `concentrate prepare` first"),
        (["student", "trainer.max_epochs=many"], "trainer.max_epochs='many'"),
        (["student", "trainer.max_epochs=-1"], "trainer.max_epochs=-1"),
        (["student", "trainer.sampling=class_balancd"], "did you mean 'class_balanced'?"),
        (["student", "top=fc_sc", "+top.generic=3"], "top.generic=3 with top=fc_sc"),
        (["student", "pace=none", "pace.lr=0.1"], "pace.lr=0.1 has no effect with pace=none"),
        (["student", "smear=true"], "smear=true with targets=soft"),
        (["student", "optimizer.lr=nan"], "optimizer.lr"),
        (["student", "name=specialists"], "name=specialists"),
        (["run", "name=generalist"], "name=generalist is taken"),
        (["student", "workdir"], "workdir"),
        (["student", "trainer=[1,2"], "'[1,2'"),
        (["student", "trainer=cpu2"], "trainer=cpu2: no such choice; did you mean 'cpu'?"),
        (["run", "experiment=nothing_of_the_kind"], "experiment=nothing_of_the_kind: no such choice"),
        (["student", "data=glyphs"], "data=glyphs"),
        (["student", "experiment=table1"], "experiment=table1"),
        (["status", "workdir=not/there"], "not/there: no such directory"),
        (["student"], "shards: not there or not finished; run `concentrate prepare` first"),
        (["evaluate"], "run `concentrate prepare` first"),
        (["student", "--config-dir=not_there"], "--config-dir=not_there: no such directory"),
        (["student", "--config-name=mine"], "--config-name=mine; the options are --help, --multirun"),
        (["student", "--config-path", "mine"], "--config-path; the options are --help, --multirun"),
        (["student", "--overwrite"], "--overwrite; the options are --help, --multirun"),
        (["student", "--resolve"], "--resolve has no effect without --cfg job"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_with_one_line_and_exit_code_2(arguments, expected, tmp_path):
    assert expected in mistake(*arguments, directory=tmp_path)


def test_an_unknown_vertical_lists_the_verticals(workdir, tmp_path):
    message = mistake("teacher", "vertical=fruits", f"workdir={workdir}", *TINY, directory=tmp_path)
    assert "no vertical 'fruits'; valid: fruit, tools" in message


def test_a_multirun_runs_every_job(workdir, tmp_path):
    options = ("-m", "vertical=fruit,tools", f"workdir={tmp_path}/work", *TINY)
    prepare_as(workdir, tmp_path)
    concentrate("teacher", *options, directory=tmp_path)
    assert {path.parent.name for path in (tmp_path / "work/teachers").glob("*/DONE.json")} == {"fruit", "tools"}
    assert not [path for path in tmp_path.rglob("*") if path.name in ("multirun", "outputs", ".hydra")]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param((), id="basic"),
        pytest.param(("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), id="joblib", marks=pytest.mark.long),
    ],
)
def test_a_multirun_exits_with_its_worst_job(workdir, tmp_path, launcher):
    prepare_as(workdir, tmp_path)
    options = ("-m", "vertical=fruits,tools", f"workdir={tmp_path}/work", *TINY, *launcher)
    # NOTE: joblib's processes outlive their work, and a process that multiprocessing has forked waits for them.
    command = (sys.executable, "-c", "from concentration.entry import main; main()", "teacher", *options)
    finished = run_command(*command, directory=tmp_path, code=2)
    assert "no vertical 'fruits'; valid: fruit, tools" in finished.err + finished.out
    assert not re.search("Traceback|Warning", finished.err)
    assert {path.parent.name for path in (tmp_path / "work/teachers").glob("*/DONE.json")} == {"tools"}


def test_a_multirun_that_is_asked_to_stop_does_not_begin_the_next_job(workdir, tmp_path):
    prepare_as(workdir, tmp_path)
    options = ("-m", "vertical=fruit,tools", f"workdir={tmp_path}/work", *TINY, "trainer.max_epochs=300")
    running = Running(("teacher", *options), tmp_path)
    running.wait_for((tmp_path / "work/teachers/fruit/metrics.jsonl").exists)
    running.send(signal.SIGTERM)
    assert running.wait().code == 75
    assert not (tmp_path / "work/teachers/tools").exists()


def test_a_directory_of_configs_can_be_added(workdir, tmp_path):
    prepare_as(workdir, tmp_path)
    (tmp_path / "mine/top").mkdir(parents=True)
    (tmp_path / "mine/top/thin.yaml").write_text("kind: fc_fc\ntop1: 4\ntop2: 3\nnorm: layer\n")
    for where in (str(tmp_path / "mine"), "mine"):
        options = (f"workdir={tmp_path}/work", f"--config-dir={where}", "top=thin", "trainer.max_steps=1")
        concentrate("teacher", "vertical=tools", *options, directory=tmp_path)
        shown = concentrate("teacher", "vertical=tools", *options, "--help", directory=tmp_path).out
        assert "top1: 4" in shown
    assert '"top1": 4' in (tmp_path / "work/teachers/tools/config.json").read_text()


def test_the_composed_config_can_be_printed(tmp_path):
    shown = concentrate("student", "--cfg", "job", "trainer.batch_size=77", directory=tmp_path).out
    assert "batch_size: 77" in shown


def run_in_shell(line: str, directory: Path, code: int = 0, **environment: str | None):
    """A line for bash, in which `$CONCENTRATE` is the command."""
    command = f"{sys.executable} -m concentration.cli"
    return run_command("bash", "-c", line, directory=directory, code=code, CONCENTRATE=command, **environment)


def test_a_shell_may_have_closed_the_standard_streams(workdir, tmp_path):
    prepare_as(workdir, tmp_path)
    options = " ".join(TINY)
    run_in_shell(f"$CONCENTRATE teacher vertical=tools workdir=work {options} <&- >&- 2>&-", tmp_path)
    assert (tmp_path / "work/teachers/tools/DONE.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("workdir=out", id="one"),
        pytest.param("-m workdir=out hydra/launcher=joblib", id="joblib", marks=pytest.mark.long),
    ],
)
def test_a_stage_outlives_who_reads_of_it(options, workdir, tmp_path):
    """`concentrate prepare ... | head -2`."""
    given = f"data=shards data.path={workdir.parent / 'given'} data.image_size={IMAGE_SIZE} num_processes=1"
    finished = run_in_shell(f"$CONCENTRATE prepare {given} {options} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert "Traceback" not in finished.err
    assert (tmp_path / "out/shards/DONE.json").exists()


@pytest.mark.parametrize(
    "command",
    [
        "status workdir=work",
        f"run workdir=work plan=true data=shards data.path=given data.image_size={IMAGE_SIZE} num_processes=1",
        "run --help",
        "completion zsh",
    ],
)
def test_answers_that_nobody_reads_end_without_a_word(command, workdir):
    assert run_in_shell(f"$CONCENTRATE {command} | true; exit ${{PIPESTATUS[0]}}", workdir.parent).err == ""


def test_a_full_device_ends_no_training_and_takes_no_results_without_a_word(workdir, tmp_path):
    prepare_as(workdir, tmp_path)
    options = " ".join(TINY)
    run_in_shell(f"$CONCENTRATE teacher vertical=tools workdir=work {options} 2>/dev/full", tmp_path)
    assert (tmp_path / "work/teachers/tools/DONE.json").exists()
    for command in ("status workdir=work", "predict --help", "--help"):
        refused = run_in_shell(f"$CONCENTRATE {command} >/dev/full", tmp_path, code=2)
        assert "standard output: No space left on device" in one_line(refused)


def test_a_shell_may_allow_few_open_files(workdir, tmp_path):
    """Of those that read, each batch takes several: with so few training would wait for ever for one that was lost."""
    prepare_as(workdir, tmp_path)
    options = " ".join([*TINY, "trainer.num_workers=4"])
    run_in_shell(f"ulimit -Sn 48; $CONCENTRATE student targets=labels workdir=work {options}", tmp_path)
    assert (tmp_path / "work/students/student/DONE.json").exists()


def test_too_few_open_files_are_refused(workdir, tmp_path):
    """Training would hang."""
    refused = run_in_shell(f"ulimit -n 63; $CONCENTRATE status workdir={workdir}", tmp_path, code=2)
    assert "a process may open 63 files here (ulimit -Hn), expected at least 256" in one_line(refused)


def test_full_memory_is_one_line(workdir, tmp_path):
    """Twenty thousand gigabytes of weights for an image that was never so large."""
    prepare_as(workdir, tmp_path)
    wide = ("top=fc_fc", "data.image_size=200000", "trainer.max_steps=1")
    refused = one_line(concentrate("student", "targets=labels", "workdir=work", *wide, directory=tmp_path, code=2))
    assert "memory is full" in refused
    assert "lower trainer.batch_size" in refused


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), MemoryError()]
)
def test_a_gpu_without_memory_left_is_named_in_the_same_way(error):
    with pytest.raises(ConfigError, match="memory is full"), naming_refusals():
        raise error
    with pytest.raises(RuntimeError, match="another"), naming_refusals():
        raise RuntimeError("another")


def test_a_full_disk_is_named_wherever_it_is_met():
    expected = r"new/model: cannot be written \(No space left on device\); free space, and run"
    with pytest.raises(DataError, match=expected), naming_refusals():
        raise OSError(28, "No space left on device", "old/model", None, "new/model")
    with pytest.raises(FileNotFoundError), naming_refusals():
        Path("nowhere/model").read_bytes()


def test_a_file_that_may_not_be_used_is_named_wherever_it_is_met():
    """Root, as whom tests may run, may use all files."""
    expected = r"calibrations/student.json: cannot be used \(Permission denied\); correct its permissions"
    with pytest.raises(DataError, match=expected), naming_refusals():
        raise PermissionError(13, "Permission denied", "calibrations/student.json")
    with pytest.raises(PermissionError), naming_refusals():
        raise PermissionError(1, "Operation not permitted")  # of a signal, say


def test_a_folder_for_temporary_files_with_too_long_a_name_is_refused(workdir, tmp_path):
    long = tmp_path / ("x" * 80)
    long.mkdir()
    refused = run_in_shell(f"$CONCENTRATE status workdir={workdir}", tmp_path, code=2, TMPDIR=str(long))
    assert "set TMPDIR to a shorter path" in one_line(refused)


def test_a_current_folder_that_was_deleted_is_one_line(workdir, tmp_path):
    refused = run_in_shell(f"mkdir gone; cd gone; rmdir ../gone; $CONCENTRATE status workdir={workdir}", tmp_path, code=2,
                           PYTHONPATH=str(Path(cli.__file__).parent.parent))  # fmt: skip
    assert "the current folder was deleted; change to another one" in refused.err
    assert "Traceback" not in refused.err


def test_an_empty_workdir_is_refused(tmp_path):
    assert "workdir='': empty, perhaps from a variable that is not set" in mistake(
        "status", "workdir=", directory=tmp_path
    )


@pytest.mark.parametrize("name", ["", "..", ".", "a/../..", "../students"])
def test_a_name_that_is_not_one_folders_clears_nothing(name, workdir, tmp_path):
    """`overwrite` would clear all of `students/`, or the working directory."""
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "students" / "earlier").mkdir(parents=True)
    before = sorted(copy.rglob("*"))
    for seed in (0, 1):  # the second would clear what the first had begun
        options = (f"workdir={copy}", "targets=labels", "overwrite=true", f"seed={seed}", *TINY)
        assert f"name='{name}': " in mistake("student", f"name={name}", *options, directory=tmp_path)
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["seed=1", "trainer=null"], "trainer=null: expected one of its choices"),
        (["-m", "data=null", "seed=1,2"], "data=null: expected one of its choices"),
        (["trainer@foo=cpu"], "unknown key 'trainer@foo'; did you mean 'trainer'?"),
        (["experiment=other"], "unknown key 'dta'; did you mean 'data'?"),
        (["experiment=latin"], "a config file is not UTF-8"),
    ],
)
def test_a_choice_that_hydra_cannot_take_is_one_line(options, expected, tmp_path):
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "other.yaml").write_text("# @package _global_\ndefaults:\n  - override /dta: csv\n")
    (own / "latin.yaml").write_bytes(b"# @package _global_ \xe9\nseed: 1\n")
    assert expected in mistake("run", "--config-dir", str(own.parent), "dry_run=true", *options, directory=tmp_path)


def test_an_empty_path_is_not_taken_for_the_current_folder(tmp_path):
    refused = mistake("prepare", "data=image_folder", "data.path=", f"workdir={tmp_path}/work", directory=tmp_path)
    assert "data.path='': empty, perhaps from a variable that is not set" in refused


def test_a_user_without_a_name_has_a_number(monkeypatch, tmp_path):
    def fail() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(records.getpass, "getuser", fail)
    assert records.load_records(tmp_path).user == str(os.getuid())


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_closed_terminal_stops_what_nohup_does_not_protect(is_ignored):
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
        preemption.note_signals()
        assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == is_ignored
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_the_command_line_is_imported_is_one_line(tmp_path):
    """Libraries make another exception of one that comes while they are imported."""
    (tmp_path / "pydantic.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    raise ImportError('datetime')"
    )
    [name] = re.findall(r'^concentrate = "(.+):main"$', (CONF.parent / "pyproject.toml").read_text(), re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", f"from {name} import main; main()", "status"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{CONF.parent}"},
        # A process that was started in the background, as these tests may be, ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "concentrate: stopped from the keyboard\n")


def test_the_installed_command_works_outside_the_checkout(workdir, tmp_path):
    command = Path(sys.executable).with_name("concentrate")
    if not command.exists():
        pytest.skip(f"NOT TESTED: no {command}: the package is not installed in this environment")
    finished = run_command(command, "status", f"workdir={workdir}", directory=tmp_path, PYTHONPATH=None)
    assert "shards" in finished.out
    assert "done" in finished.out
    assert list(tmp_path.iterdir()) == []


def prepare_as(workdir: Path, tmp_path: Path) -> None:
    """The module's shards, prepared in `tmp_path/work`."""
    given = workdir.parent / "given"
    concentrate("prepare", "data=shards", f"data.path={given}", f"data.image_size={IMAGE_SIZE}", "num_processes=1",
                f"workdir={tmp_path}/work", directory=tmp_path)  # fmt: skip
    for path in tmp_path.glob(".*.err"):
        path.unlink()


def test_our_handlers_win_over_those_of_submitit(monkeypatch):
    """Submitit's handler of SIGUSR2 leaves in the middle of a step, and its others ignore SIGTERM."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, lambda number, frame: pytest.fail("the handler of submitit"))
        seen = []
        monkeypatch.setattr(cli, "open_streams", lambda: None)  # this process's stay as they are
        monkeypatch.setattr(cli, "run_verb", lambda *_: seen.extend(map(signal.getsignal, numbers)) or 0)
        cli._Job("teacher")(None)
        assert seen == [preemption._note] * 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
