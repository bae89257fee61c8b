"""What is in deploy/: valid by the schemas of who reads it, whole, and in agreement with the settings."""

import copy
import gzip
import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.serve_app import Keeper
from tidemill.core.model import Role
from tidemill.core.settings import Settings
from tidemill.core.settings_file import load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERAY, SCHEMAS = DEPLOY / "kuberay", DEPLOY.parents[1] / "shared" / "data" / "kuberay"
COMMON, WAYS = KUBERAY / "common", ("raycluster", "rayservice")
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


def test_the_example_of_a_source_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    for name in ("install.sh", "source.env"):
        shutil.copy(DEPLOY / name, tmp_path)
    command = ["bash", str(tmp_path / "install.sh")]
    done = subprocess.run(
        command, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "is an example. Set REPOSITORY to where your nodes can clone Tidemill from" in done.stderr
    assert not (tmp_path / "tidemill").exists()


@pytest.mark.parametrize("script", sorted(DEPLOY.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_shell(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "path", [DEPLOY / "production.yaml", COMMON / "settings.yaml"], ids=lambda path: str(path.name)
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


def _validator(kind: str) -> jsonschema.Draft202012Validator:
    """Takes KubeRay's schema for one: jsonschema.validate would see to that each time, for seconds."""
    path = SCHEMAS / f"ray.io_{kind}s.yaml.gz"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not at {path}")
    definition = yaml.load(gzip.decompress(path.read_bytes()), yaml.CSafeLoader)
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {}
    return jsonschema.Draft202012Validator(_strict(schema))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """The folder, and the name of its manifest."""
    return str(request.param)


@pytest.fixture
def manifest(way: str) -> dict[str, Any]:
    document: dict[str, Any] = read(KUBERAY / way / f"{way}.yaml")
    return document


@pytest.fixture
def ray_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    """The spec of the cluster, which a RayService has inside."""
    spec: dict[str, Any] = manifest["spec"]
    return spec.get("rayClusterConfig", spec)


def test_kuberays_schema_accepts_it(way: str, manifest: dict[str, Any]) -> None:
    validator = _validator(way)
    assert not list(validator.iter_errors(manifest))
    for path, wrong in ((("headGroupSpec", "rayStartParam"), {}), (("workerGroupSpecs", 0, "minReplicas"), "three")):
        broken = copy.deepcopy(manifest)
        inner = broken["spec"].get("rayClusterConfig", broken["spec"])
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = wrong
        assert not validator.is_valid(broken)


@pytest.fixture
def kube_settings() -> Settings:
    return load_settings(COMMON / "settings.yaml")


def _pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"] for name, group in (groups | {"head": cluster["headGroupSpec"]}).items()}


def test_pods_outlive_the_drain_and_are_probed(ray_cluster: dict[str, Any], kube_settings: Settings) -> None:
    for name, pod in _pods(ray_cluster).items():
        grace_s = pod["spec"]["terminationGracePeriodSeconds"]
        assert grace_s >= kube_settings.deadlines.drain_s + AFTER_DRAIN_S, name
        for container in pod["spec"]["containers"]:
            assert {"readinessProbe", "livenessProbe", "resources"} <= set(container), container["name"]


def test_the_drain_is_awaited_where_ray_runs(ray_cluster: dict[str, Any], kube_settings: Settings) -> None:
    """All containers of a pod are told to end at the same time, each when its own hook has ended."""
    head = _pods(ray_cluster)["head"]["spec"]["containers"]
    hook = head[0]["lifecycle"]["preStop"]["exec"]["command"]
    assert hook == ["tidemill", "down", "--name", kube_settings.name]
    homes = {_env(container).get("XDG_STATE_HOME") for container in head}
    assert len(homes) == 1, "`down` reads what `up` has left in another container"


def _env(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container.get("env", [])}


def test_worker_pods_offer_what_workers_ask_for(ray_cluster: dict[str, Any], kube_settings: Settings) -> None:
    offered: dict[str, int] = {}
    for group in ray_cluster["workerGroupSpecs"]:
        slots = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        for slot, count in slots.items():
            offered[slot] = offered.get(slot, 0) + count * group["minReplicas"]
    for role in Role:
        ((slot, count),) = kube_settings.ray.resources[role].items()
        offered[slot] -= round(count * getattr(kube_settings.pools, role))
    assert min(offered.values()) >= 0
    assert ray_cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"


def test_ports_and_labels_meet(ray_cluster: dict[str, Any], kube_settings: Settings) -> None:
    """The pod monitor, the service and the budgets name ports and labels that pods have."""
    pods = _pods(ray_cluster)
    ports = {port["name"]: port["containerPort"] for pod in pods.values()
             for container in pod["spec"]["containers"] for port in container["ports"]}  # fmt: skip
    assert ports["grpc"] == kube_settings.router.port
    assert ports["router-metrics"] == kube_settings.metrics.router_port
    assert ports["worker-metrics"] == kube_settings.metrics.worker_port
    monitor = read(COMMON / "podmonitor.yaml")["spec"]
    assert {each["port"] for each in monitor["podMetricsEndpoints"]} <= set(ports)
    service = read(KUBERAY / "raycluster" / "service.yaml")["spec"]
    assert service["ports"][0]["targetPort"] in ports
    budgets = list(yaml.safe_load_all((COMMON / "disruption.yaml").read_text()))
    selectors = [each["spec"]["selector"]["matchLabels"] for each in budgets]
    for selector in (*selectors, monitor["selector"]["matchLabels"], service["selector"]):
        assert any(selector.items() <= pod["metadata"]["labels"].items() for pod in pods.values())


def test_a_budget_leaves_one_worker_to_go(ray_cluster: dict[str, Any]) -> None:
    """As a number that stays: for pods without a scale subresource Kubernetes knows no other kind."""
    workers, head = (each["spec"] for each in yaml.safe_load_all((COMMON / "disruption.yaml").read_text()))
    assert workers["minAvailable"] == sum(group["minReplicas"] for group in ray_cluster["workerGroupSpecs"]) - 1
    assert head["minAvailable"] == 1
    assert not {"maxUnavailable"} & {*workers, *head}


def test_both_ways_have_the_same_workers_and_head() -> None:
    cluster = read(KUBERAY / "raycluster" / "raycluster.yaml")["spec"]
    inside = read(KUBERAY / "rayservice" / "rayservice.yaml")["spec"]["rayClusterConfig"]
    assert inside["workerGroupSpecs"] == cluster["workerGroupSpecs"]
    heads = [each["headGroupSpec"].pop("template")["spec"] for each in (inside, cluster)]
    assert inside["headGroupSpec"] == cluster["headGroupSpec"]
    for key in ("resources", "readinessProbe", "livenessProbe", "lifecycle"):
        assert heads[0]["containers"][0][key] == heads[1]["containers"][0][key]
    assert heads[0]["volumes"] == heads[1]["volumes"]


def test_the_application_finds_its_settings_and_may_drain(kube_settings: Settings) -> None:
    spec = read(KUBERAY / "rayservice" / "rayservice.yaml")["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    module, _, function = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    (deployment,) = application["deployments"]
    assert deployment["name"] == Keeper.__name__
    assert deployment["graceful_shutdown_timeout_s"] >= kube_settings.deadlines.drain_s + AFTER_DRAIN_S
    (container,) = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert application["args"]["config"] == f"{mounted['settings']}/settings.yaml"
    assert "serve" in {port["name"] for port in container["ports"]}, "KubeRay wants a port of this name"


def test_the_service_of_a_ray_service_finds_its_pods(ray_cluster: dict[str, Any]) -> None:
    """KubeRay selects by app.kubernetes.io/name, and only for a RayCluster by what the pods say instead."""
    for pod in _pods(ray_cluster).values():
        assert "app.kubernetes.io/name" not in pod["metadata"]["labels"]


@pytest.mark.parametrize("folder", ["common", *WAYS])
def test_kustomizations_name_every_manifest(folder: str) -> None:
    document = read(KUBERAY / folder / "kustomization.yaml")
    made = [name for each in document.get("configMapGenerator", []) for name in each["files"]]
    listed = {*document["resources"], *made, *document.get("configurations", []), "kustomization.yaml"}
    assert listed == {path.name for path in (KUBERAY / folder).glob("*.yaml")}
    assert document.get("components", ["../common"]) == ["../common"]


def test_settings_get_a_new_name_when_they_change_and_pods_know_it(way: str, manifest: dict[str, Any]) -> None:
    """kustomize puts its name for them where names.yaml says."""
    names = read(COMMON / "names.yaml")["nameReference"][0]["fieldSpecs"]
    (path,) = [each["path"] for each in names if each["kind"] == manifest["kind"]]
    found: list[Any] = [manifest]
    for key in path.split("/"):
        found = [inner for each in found for inner in (each if isinstance(each, list) else [each])]
        found = [each[key] for each in found if key in each]
    assert found == [read(COMMON / "kustomization.yaml")["configMapGenerator"][0]["name"]]
