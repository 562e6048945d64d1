"""The graph of a run: jobs and what each waits for."""

from hydra import compose, initialize_config_dir

from concentration.config import check_config, find_config_directory
from concentration.pipeline.graph import build_jobs


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
