"""The Kubernetes jobs: valid by its schemas, with exit codes, names and numbers that fit each other and the code."""

import itertools
import shlex
import subprocess
from pathlib import Path

import hydra
import kubernetes_validate
import pytest
import yaml

from concentration.config import check_config, find_config_directory
from concentration.errors import ConfigError, Preempted

FOLDER = Path(__file__).parents[2] / "launch/kubernetes"
RESOURCES = [resource for path in sorted(FOLDER.glob("*.yaml")) for resource in yaml.safe_load_all(path.read_text())]
JOBS = {resource["metadata"]["name"]: resource["spec"] for resource in RESOURCES if resource["kind"] == "Job"}
VERSIONS = ["1.33", kubernetes_validate.latest_version()]


def pod_of(job: dict) -> dict:
    return job["template"]["spec"]


def container_of(job: dict) -> dict:
    [container] = pod_of(job)["containers"]
    return container


@pytest.mark.parametrize(("resource", "version"), list(itertools.product(RESOURCES, VERSIONS)))
def test_a_resource_is_valid_by_the_schema(resource, version):
    kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda job: job["spec"].update(completion=2),
        lambda job: job["spec"]["template"]["spec"]["containers"][0].update(args="one string"),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"].pop("operator"),
    ],
)
def test_the_schema_would_find_a_mistake(damage):
    [job] = yaml.safe_load_all((FOLDER / "teachers.yaml").read_text())
    damage(job)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[0], strict=True)


@pytest.mark.parametrize("name", ["student", "teachers"])
def test_a_preempted_pod_is_retried_without_counting_and_a_mistake_is_not_retried(name):
    job = JOBS[name]
    by_code = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule and rule["onExitCodes"]["containerName"] == container_of(job)["name"]
        for code in rule["onExitCodes"]["values"]
    }
    assert by_code == {
        Preempted.exit_code: "Ignore",
        ConfigError.exit_code: "FailJob" if name == "student" else "FailIndex",
    }
    first = job["podFailurePolicy"]["rules"][0]
    assert (first["action"], first["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert pod_of(job)["restartPolicy"] == "Never", "the API refuses a podFailurePolicy with any other"
    assert job["podReplacementPolicy"] == "Failed"
    assert pod_of(job)["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize("name", ["student", "teachers"])
def test_a_pod_is_not_root_and_writes_to_the_volume(name):
    pod, container = pod_of(JOBS[name]), container_of(JOBS[name])
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 1000, "the user of docker/Dockerfile"
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    claims = [resource["metadata"]["name"] for resource in RESOURCES if resource["kind"] == "PersistentVolumeClaim"]
    assert [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v] == claims
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert f"workdir={mounts['data']}/" in " ".join(container["args"])


def test_both_jobs_run_the_same_image_and_its_entrypoint():
    assert len({container_of(job)["image"] for job in JOBS.values()}) == 1
    assert not any("command" in container_of(job) for job in JOBS.values()), "it would replace tini"


def test_the_students_pods_find_each_other_and_agree_on_their_number():
    job, container = JOBS["student"], container_of(JOBS["student"])
    [service] = [resource for resource in RESOURCES if resource["kind"] == "Service"]
    name = service["metadata"]["name"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "student"}
    assert pod_of(job)["subdomain"] == name
    assert environment["HEAD"].partition(":")[0] == f"student-0.{name}"
    num_nodes = int(environment["NODES"])
    assert job["completions"] == job["parallelism"] == num_nodes
    assert f"trainer.num_nodes={num_nodes}" in container["args"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["GPUS"])


def test_every_teacher_has_a_vertical():
    script = container_of(JOBS["teachers"])["args"][-1]
    verticals = script.partition("verticals=(")[2].partition(")")[0].split()
    assert len(verticals) == JOBS["teachers"]["completions"]


@pytest.mark.parametrize("vertical", ["birds", "1.5", "a,b", "café au lait", "women's"])
def test_a_pod_trains_a_vertical_of_any_name(vertical):
    script = container_of(JOBS["teachers"])["args"][-1].replace("(birds", f"({shlex.quote(vertical)}")
    script = script.replace("exec concentrate", 'printf "%s\\n"')
    done = subprocess.run(
        ["bash", "-c", script], env={"JOB_COMPLETION_INDEX": "0"}, text=True, capture_output=True, check=True
    )
    words = done.stdout.splitlines()[1:]
    with hydra.initialize_config_dir(str(find_config_directory()), version_base="1.3"):
        assert check_config("teacher", hydra.compose("teacher", words)).vertical == vertical


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("student", [*container_of(JOBS["student"])["args"][1:], "trainer=gpu", "trainer.devices=8"]),
        ("teacher", ["vertical=birds", *container_of(JOBS["teachers"])["args"][-1].split()[-2:]]),
    ],
)
def test_the_configs_of_the_commands_are_right(verb, words):
    with hydra.initialize_config_dir(str(find_config_directory()), version_base="1.3"):
        config = check_config(verb, hydra.compose(verb, words))
    assert config.trainer.accelerator == "gpu"
    assert str(config.workdir).startswith("/data/")
