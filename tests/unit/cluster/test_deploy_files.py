"""What is in deploy/: valid by the schemas of who reads it, whole, and in agreement with the settings."""

import copy
import gzip
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
from ray.autoscaler._private.util import prepare_config, validate_config

from tidemill.core.model import Role
from tidemill.core.settings import Settings
from tidemill.core.settings_file import load_settings

DEPLOY = Path(__file__).parents[3] / "deploy"
KUBERAY, SCHEMAS = DEPLOY / "kuberay", DEPLOY.parents[1] / "shared" / "data" / "kuberay"
CLOUDS, ALL = ("aws.yaml", "gcp.yaml"), ("aws.yaml", "gcp.yaml", "ssh.yaml")
AFTER_DRAIN_S = 10.0


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# --- ray up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_rays_own_schema_accepts_it(name: str) -> None:
    validate_config(prepare_config(read(DEPLOY / name)))


@pytest.mark.parametrize("name", ALL)
def test_a_key_that_ray_does_not_know_is_found(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(read(DEPLOY / name) | {"max_worker": 3}))


@pytest.mark.parametrize("name", ALL)
def test_what_is_mounted_is_there_or_made_by_secrets_sh(name: str) -> None:
    sources = set(read(DEPLOY / name)["file_mounts"].values())
    secret = {each for each in sources if each.startswith("secrets/")}
    assert secret == {"secrets/nodes", "secrets/ray_token"}
    assert all((DEPLOY / each).exists() for each in sources - secret)


@pytest.mark.parametrize("name", ALL)
def test_up_follows_ray_and_requests_may_end_before_it_stops(name: str) -> None:
    commands = read(DEPLOY / name)["head_start_ray_commands"]
    order = [next(i for i, line in enumerate(commands) if part in line)
             for part in ("tidemill down", "ray stop", "ray start --head", "tidemill up")]  # fmt: skip
    assert order == sorted(order)
    assert "--num-gpus=0" in commands[order[2]]


@pytest.mark.parametrize("name", CLOUDS)
def test_node_types_offer_what_workers_ask_for(name: str) -> None:
    """Enough nodes of a type from the start for all workers that need it, and a limit to all together."""
    config, settings = read(DEPLOY / name), load_settings(DEPLOY / "production.yaml")
    types: dict[str, Any] = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["GPU"] == 0
    needed: dict[str, int] = {}
    for role in Role:
        (slot,) = settings.ray.resources[role]
        needed[slot] = needed.get(slot, 0) + getattr(settings.pools, role)
    for slot, count in needed.items():
        (offered,) = [each for each in types.values() if slot in each["resources"]]
        assert offered["resources"]["GPU"] == settings.ray.gpus_per_worker
        assert offered["min_workers"] * offered["resources"][slot] >= count
        assert offered["min_workers"] <= offered["max_workers"]
    assert sum(each["min_workers"] for each in types.values()) <= config["max_workers"]
    assert config["max_workers"] == sum(each["max_workers"] for each in types.values())


def test_the_source_is_one_commit() -> None:
    values = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / "source.env").read_text(), re.MULTILINE))
    assert set(values) == {"REPOSITORY", "COMMIT", "ENVIRONMENT"}
    assert re.fullmatch(r"[0-9a-f]{40}", values["COMMIT"])


@pytest.mark.parametrize("script", sorted(DEPLOY.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_shell(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "path", [DEPLOY / "production.yaml", KUBERAY / "settings.yaml"], ids=lambda path: str(path.name)
)
def test_settings_keep_strangers_out(path: Path) -> None:
    settings = load_settings(path)
    assert settings.router.tls
    assert settings.router.token_file
    assert settings.network.tls
    assert settings.ray.address == "auto"


# --- KubeRay ----------------------------------------------------------------------------------------------------


def _strict(schema: Any) -> Any:
    """A structural schema as the API server applies it with --validate=strict: unknown fields are errors."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    open_ended = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    if made.get("type") == "object" and "properties" in made and not open_ended:
        made["additionalProperties"] = False
    return made


@pytest.fixture(scope="module")
def ray_cluster_schema() -> dict[str, Any]:
    path = SCHEMAS / "ray.io_rayclusters.yaml.gz"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not at {path}")
    definition = yaml.safe_load(gzip.decompress(path.read_bytes()))
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {}
    strict: dict[str, Any] = _strict(schema)
    return strict


@pytest.fixture
def ray_cluster() -> dict[str, Any]:
    cluster: dict[str, Any] = read(KUBERAY / "raycluster.yaml")
    return cluster


def test_kuberays_schema_accepts_it(ray_cluster: dict[str, Any], ray_cluster_schema: dict[str, Any]) -> None:
    jsonschema.validate(ray_cluster, ray_cluster_schema)
    for path, wrong in ((("headGroupSpec", "rayStartParam"), {}), (("workerGroupSpecs", 0, "minReplicas"), "three")):
        broken = copy.deepcopy(ray_cluster)
        inner = broken["spec"]
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = wrong
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, ray_cluster_schema)


@pytest.fixture
def kube_settings() -> Settings:
    return load_settings(KUBERAY / "settings.yaml")


def _pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    return {name: group["template"] for name, group in (groups | {"head": cluster["spec"]["headGroupSpec"]}).items()}


def test_pods_outlive_the_drain_and_are_probed(ray_cluster: dict[str, Any], kube_settings: Settings) -> None:
    for name, pod in _pods(ray_cluster).items():
        grace_s = pod["spec"]["terminationGracePeriodSeconds"]
        assert grace_s >= kube_settings.deadlines.drain_s + AFTER_DRAIN_S, name
        for container in pod["spec"]["containers"]:
            assert {"readinessProbe", "livenessProbe", "resources"} <= set(container), container["name"]
    assert any("preStop" in each.get("lifecycle", {}) for each in _pods(ray_cluster)["head"]["spec"]["containers"])


def test_worker_pods_offer_what_workers_ask_for(ray_cluster: dict[str, Any], kube_settings: Settings) -> None:
    offered: dict[str, int] = {}
    for group in ray_cluster["spec"]["workerGroupSpecs"]:
        slots = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        for slot, count in slots.items():
            offered[slot] = offered.get(slot, 0) + count * group["minReplicas"]
    for role in Role:
        ((slot, count),) = kube_settings.ray.resources[role].items()
        offered[slot] -= round(count * getattr(kube_settings.pools, role))
    assert min(offered.values()) >= 0
    assert ray_cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"


def test_ports_and_labels_meet(ray_cluster: dict[str, Any], kube_settings: Settings) -> None:
    """The pod monitor, the service and the budgets name ports and labels that pods have."""
    pods = _pods(ray_cluster)
    ports = {port["name"]: port["containerPort"] for pod in pods.values()
             for container in pod["spec"]["containers"] for port in container["ports"]}  # fmt: skip
    assert ports["grpc"] == kube_settings.router.port
    assert ports["router-metrics"] == kube_settings.metrics.router_port
    assert ports["worker-metrics"] == kube_settings.metrics.worker_port
    monitor = read(KUBERAY / "podmonitor.yaml")["spec"]
    assert {each["port"] for each in monitor["podMetricsEndpoints"]} <= set(ports)
    assert read(KUBERAY / "service.yaml")["spec"]["ports"][0]["targetPort"] in ports
    budgets = list(yaml.safe_load_all((KUBERAY / "disruption.yaml").read_text()))
    selectors = [each["spec"]["selector"]["matchLabels"] for each in budgets] + [monitor["selector"]["matchLabels"]]
    for selector in selectors:
        assert any(selector.items() <= pod["metadata"]["labels"].items() for pod in pods.values())


def test_the_kustomization_names_every_manifest() -> None:
    kustomization = read(KUBERAY / "kustomization.yaml")
    listed = {*kustomization["resources"], *kustomization["configMapGenerator"][0]["files"], "kustomization.yaml"}
    assert listed == {path.name for path in KUBERAY.glob("*.yaml")}
