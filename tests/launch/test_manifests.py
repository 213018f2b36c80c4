"""launch/kuberay, launch/slurm.sh and launch/Containerfile: well-formed, and of one mind with conf/ and each other."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launch.cluster import QUIET
from launch.compose import compose
from rollout.config import RunConfig

REPOSITORY = Path(__file__).resolve().parents[2]
KUBERAY = REPOSITORY / "launch" / "kuberay"
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
MANIFESTS = ("raycluster", "rayjob")
GIB = 2**30
SHADOW_BYTES = 20e9  # of one GPU's INT4 weights, as conf/engine/ep8_int4.yaml has it


def manifest(name: str) -> dict[str, Any]:
    document = yaml.safe_load((KUBERAY / f"{name}.yaml").read_text())
    assert isinstance(document, dict)
    return document


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec if document["kind"] == "RayCluster" else spec["rayClusterSpec"]


def workers(document: dict[str, Any]) -> dict[str, Any]:
    (group,) = cluster_spec(document)["workerGroupSpecs"]
    return group


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (cluster_spec(document)["headGroupSpec"], workers(document))]


def overrides_of(command: str) -> list[str]:
    """Hydra's overrides in a command line."""
    return re.findall(r"(?<=\s)[a-z_.]+=\S+", command)


def configured(name: str) -> RunConfig:
    """The experiment that a manifest launches, with the overrides it gives."""
    if name == "rayjob":
        return compose(overrides_of(" " + manifest(name)["spec"]["entrypoint"]))
    header = (KUBERAY / f"{name}.yaml").read_text().split("apiVersion")[0].replace("\\\n#", "")
    (command,) = re.findall(r"launch\.serve.*", header)
    return compose(overrides_of(command))


def gib(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_is_kuberays(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    errors = list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest(name)))
    assert errors == []


def _misspell(document: dict[str, Any]) -> None:
    spec = cluster_spec(document)
    spec["headGroup"] = spec.pop("headGroupSpec")


def _number_as_text(document: dict[str, Any]) -> None:
    workers(document)["replicas"] = "8"


def _text_as_number(document: dict[str, Any]) -> None:
    cluster_spec(document)["headGroupSpec"]["rayStartParams"]["num-cpus"] = 8


def _no_upper_bound(document: dict[str, Any]) -> None:
    del workers(document)["maxReplicas"]


def _open_dashboard(document: dict[str, Any]) -> None:
    cluster_spec(document)["authOptions"]["mode"] = "none"


def _plain_and_secret(document: dict[str, Any]) -> None:
    pods(document)[0]["containers"][0]["env"][0]["valueFrom"] = {"secretKeyRef": {"name": "a", "key": "b"}}


BREAKS = (_misspell, _number_as_text, _text_as_number, _no_upper_bound, _open_dashboard, _plain_and_secret)


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("spoil", BREAKS)
def test_schema_refuses(name: str, spoil: Callable[[dict[str, Any]], None]) -> None:
    spoiled = copy.deepcopy(manifest(name))
    spoil(spoiled)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(spoiled)


@pytest.mark.parametrize("name", MANIFESTS)
def test_nodes_and_gpus_are_the_experiments(name: str) -> None:
    config, group = configured(name), workers(manifest(name))
    per_node = config.cluster.num_gpus_per_node
    trainer_nodes = config.trainer.num_ranks * config.trainer.num_gpus_per_rank / per_node if name == "rayjob" else 0
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == config.cluster.num_nodes + trainer_nodes
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == per_node
    on_one_node = per_node // config.engine.tensor_parallel_size
    for share in (config.cluster.num_cpus_per_shard, config.cluster.num_cpus_per_trainer):
        assert int(limits["cpu"]) > on_one_node * share
    assert gib(limits["memory"]) * GIB > on_one_node * SHADOW_BYTES + 200e9  # Ray's object store, capped at 200 GB


@pytest.mark.parametrize("name", MANIFESTS)
def test_head_has_no_gpu_and_shows_its_ports(name: str) -> None:
    head = cluster_spec(manifest(name))["headGroupSpec"]
    container = head["template"]["spec"]["containers"][0]
    assert head["rayStartParams"]["num-gpus"] == "0" and "nvidia.com/gpu" not in container["resources"]["limits"]
    assert head["rayStartParams"]["num-cpus"] == container["resources"]["limits"]["cpu"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {"gcs-server": 6379, "dashboard": 8265}.items() <= ports.items()
    if name == "raycluster":
        gateway = configured(name).gateway
        assert (gateway.host, gateway.port) == ("0.0.0.0", ports["gateway"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_run_as_longrolls_own_ray_does(name: str) -> None:
    document = manifest(name)
    (ray,) = [d for d in PROJECT["dependencies"] if d.startswith("ray[")]
    assert ray.endswith(f"=={cluster_spec(document)['rayVersion']}")
    assert cluster_spec(document)["authOptions"]["mode"] == "token"
    for pod in pods(document):
        (container,) = pod["containers"]
        plain = {v["name"]: v["value"] for v in container["env"] if "value" in v}
        assert plain.items() >= QUIET.items()
        assert not re.search("KEY|PASSWORD|TOKEN$|USER", " ".join(plain)), "secrets come from secrets"
        assert container["image"] == f"longroll:{PROJECT['version']}-gpu"
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        shm = next(v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm")
        assert shm["medium"] == "Memory"
        memory = gib(container["resources"]["limits"]["memory"])
        # Ray's object store takes 30 %, at most 200 GB, and must not take all.
        assert min(0.3 * memory, 200e9 / GIB) < gib(shm["sizeLimit"]) < memory


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_must_outlive_a_pod_lies_elsewhere(name: str) -> None:
    config = configured(name)
    mounts = pods(manifest(name))[0]["containers"][0]["volumeMounts"]
    shared = next(m["mountPath"] for m in mounts if m["name"] == "shared")
    assert config.run_dir.startswith(f"{shared}/")
    assert config.journal.dsn is not None and config.journal.dsn.startswith("postgresql://")
    assert "@" not in config.journal.dsn, "no password in a command line"


def test_entry_point_needs_no_quoting() -> None:
    """KubeRay pastes it into a line for a shell."""
    assert re.fullmatch(r"[\w .=/:-]+", manifest("rayjob")["spec"]["entrypoint"])


def sbatch_options() -> dict[str, str]:
    text = (REPOSITORY / "launch" / "slurm.sh").read_text()
    return {key: value for key, value in re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", text, re.MULTILINE)}


def test_slurm_asks_for_the_experiments_nodes() -> None:
    header = (REPOSITORY / "launch" / "slurm.sh").read_text().replace("\\\n#", "")
    (command,) = re.findall(r"sbatch launch/slurm\.sh .*", header)
    config, options = compose(overrides_of(command)), sbatch_options()
    per_node = config.cluster.num_gpus_per_node
    assert int(options["gpus-per-node"]) == per_node
    assert int(options["nodes"]) == config.cluster.num_nodes + config.trainer.num_ranks / per_node
    assert int(options["cpus-per-task"]) > per_node * config.cluster.num_cpus_per_shard
    assert int(options["ntasks-per-node"]) == 1
    (serving,) = re.findall(r"sbatch --nodes=(\d+) .*launch\.serve .*experiment=(\S+)", header)
    assert int(serving[0]) == compose([f"experiment={serving[1]}"]).cluster.num_nodes


def test_container_copies_what_exists_and_runs_as_the_pods_do() -> None:
    text = (REPOSITORY / "launch" / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    copied = [path for line in lines if line[0] == "COPY" for path in line[1:-1] if not path.startswith("--")]
    assert copied and [path for path in copied if not (REPOSITORY / path).exists()] == []
    packages = {"rollout", "actors", "kernels", "launch"}
    assert packages | {"conf", "models", "pyproject.toml", "constraints.txt", "launch/setup.sh"} <= set(copied)
    assert PROJECT["requires-python"] == ">=3.11,<3.12" and "FROM python:3.11-" in text
    assert [line for line in lines if line[0] == "USER"][-1] == ["USER", "longroll"]
    (uid,) = re.findall(r"--uid (\d+)", text)
    for name in MANIFESTS:
        assert all(pod["securityContext"]["runAsUser"] == int(uid) for pod in pods(manifest(name)))
    assert {key for key in QUIET if key != "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"} <= set(re.findall(r"(\w+)=", text))
