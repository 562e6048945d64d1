"""The graph of a run: jobs and what each waits for."""

import pytest
from hydra import compose, initialize_config_dir

from concentration.config import check_config, find_config_directory
from concentration.errors import ConfigError
from concentration.pipeline.graph import build_jobs
from concentration.training.configs import TrainerConfig


def jobs_of(taxonomy, *overrides: str) -> dict:
    with initialize_config_dir(str(find_config_directory()), version_base="1.3"):
        config = check_config("run", compose("run", list(overrides)))
    return {job.name: job for job in build_jobs(config, taxonomy)}


def test_the_student_is_exported_after_its_evaluation_where_that_is_asked_for(taxonomy, tmp_path):
    where = f"workdir={tmp_path}"
    assert not [name for name in jobs_of(taxonomy, where) if name.startswith("export")]
    job = jobs_of(taxonomy, where, "export=true", "name=small")["export small"]
    assert job.after == ("evaluate small",)
    assert job.directory == tmp_path / "exports/small"
    assert job.config.name == "small"


@pytest.mark.parametrize("targets", ["soft", "labels"])
def test_coarse_labels_are_left_out_for_all_but_a_student_of_teachers(targets, taxonomy, tmp_path):
    jobs = jobs_of(taxonomy, f"workdir={tmp_path}", f"targets={targets}", "coarse_labels=skip")
    trained = {name: job.config.coarse_labels for name, job in jobs.items() if hasattr(job.config, "coarse_labels")}
    teachers = {f"teacher {vertical}": "skip" for vertical in taxonomy.verticals}
    student = "use" if targets == "soft" else "skip"
    assert trained == {"student generalist": "skip", "student student": student, **teachers}


def test_teachers_that_start_from_the_generalist_wait_for_it(taxonomy, tmp_path):
    jobs = jobs_of(taxonomy, f"workdir={tmp_path}", "teacher.from_generalist=true")
    teachers = [jobs[f"teacher {vertical}"] for vertical in taxonomy.verticals]
    assert {job.after for job in teachers} == {("student generalist",)}
    assert {job.config.base.checkpoint for job in teachers} == {"generalist"}
    assert jobs["student generalist"].config.base.checkpoint is None


def test_pretrained_weights_are_the_generalists_where_teachers_start_from_it(taxonomy, tmp_path):
    given = ["base=timm", "base.name=resnet18", "base.pretrained=true", "teacher.from_generalist=true"]
    jobs = jobs_of(taxonomy, f"workdir={tmp_path}", *given)
    bases = [jobs[name].config.base for name in ("student generalist", f"teacher {taxonomy.verticals[0]}")]
    assert [(base.pretrained, base.checkpoint) for base in bases] == [(True, None), (False, "generalist")]


def test_teachers_of_another_base_cannot_start_from_the_generalist(taxonomy, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher\.base is not generalist\.base"):
        jobs_of(taxonomy, f"workdir={tmp_path}", "teacher.from_generalist=true", "teacher.base={kind: googlenet}")


def test_the_generalist_trains_as_the_student_does_but_for_what_it_is_given_itself(taxonomy, tmp_path):
    student = ["trainer=gpu", "trainer.max_epochs=7", "trainer.batch_size=96"]
    jobs = jobs_of(taxonomy, f"workdir={tmp_path}", *student, "generalist.trainer.max_epochs=9")
    trainers = [jobs[f"student {name}"].config.trainer for name in ("student", "generalist")]
    assert trainers[0].accelerator == "gpu"
    assert trainers[0].max_epochs == 7
    assert trainers[1] == trainers[0].model_copy(update={"max_epochs": 9})
    assert trainers[1].model_fields_set == set(TrainerConfig.model_fields)  # so each can be given


def test_what_asks_networks_reads_with_as_many_processes_as_what_trains_them(taxonomy, tmp_path):
    jobs = jobs_of(taxonomy, f"workdir={tmp_path}", "trainer.num_workers=5", "teacher.trainer.num_workers=3")
    workers = {name: job.config.num_workers for name, job in jobs.items() if hasattr(job.config, "num_workers")}
    targets = {f"targets {vertical}": 3 for vertical in taxonomy.verticals}
    assert workers == {**targets, "evaluate generalist": 5, "evaluate specialists": 5, "evaluate student": 5}
