"""Up, status and down of one cluster, from its settings."""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from cluster import head
from cluster.controller import start_controller
from cluster.policy.scaling import Plan, ScalingReason
from cluster.pools import CONTROLLER, ROUTER, Pools, find, router_names, worker_names
from tidemill.core.model import Decision, Role
from tidemill.core.settings import Settings

SWITCH_TIMEOUT_S = 120.0
NODES_PERIOD_S = 2.0
ANSWER_S = 5.0  # of all that are asked at once
PLAN_S = 10.0
ROUTER_KEYS = ("address", "metrics_address", "page_address", "active", "queued", "pid")
STOP_TIMEOUT_S = 30.0  # a drain, and what comes after it
Say = Callable[[str], None]


class LaunchError(RuntimeError):
    """The cluster did not come up, or is not there; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What `up` leaves for the other commands, in the user's state folder, readable by the user alone."""

    name: str
    ray_address: str
    ray_token: str
    head_pid: int | None  # None: the Ray cluster was there before, and stays
    folder: str  # Ray's sessions and logs
    router_address: str = ""  # as the client takes it: of several routers, with commas
    workers: tuple[str, ...] = ()


def state_path(name: str) -> Path:
    root = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(root) / "tidemill" / f"{name}.json"


def read_state(name: str) -> ClusterState | None:
    """None if no such cluster was brought up, or its head is gone."""
    try:
        document = json.loads(state_path(name).read_text(encoding="utf-8"))
        state = ClusterState(**(document | {"workers": tuple(document["workers"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if state.head_pid is not None and not head.is_running(state.head_pid):
        _forget(state)
        return None
    return state


def _write_state(state: ClusterState) -> None:
    path = state_path(state.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
    fresh.replace(path)


def _forget(state: ClusterState) -> None:
    state_path(state.name).unlink(missing_ok=True)
    if state.head_pid is not None:
        shutil.rmtree(state.folder, ignore_errors=True)


def connect(state: ClusterState) -> None:
    """Join the Ray cluster as a driver. Raises LaunchError."""
    if state.ray_token:
        head.use_token(state.ray_token)
    try:
        with _own_sigterm():
            ray.init(
                address=state.ray_address,
                namespace=state.name,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
                ignore_reinit_error=True,
            )
    except (RayError, ConnectionError, RuntimeError) as error:
        raise LaunchError(f"the Ray cluster at {state.ray_address} cannot be reached: {error}") from error


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself, in C++ too, and then ends without taking anything down: take it back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def up(settings: Settings, say: Say) -> ClusterState:
    """Bring everything up and wait until it serves. What was started is ended again if that fails.

    Raises LaunchError, and whatever the settings' models make the workers raise.
    """
    running = read_state(settings.name)
    if running is not None and not _is_up(running):
        _forget(running)
    elif running is not None:
        raise LaunchError(
            f"cluster {settings.name!r} is up already, at {running.router_address}; "
            "use it, end it with `tidemill down`, or give this one another `name`"
        )
    _check_folders(settings)
    state = _ray(settings, say)
    _write_state(state)
    try:
        connect(state)
        _wait_for_nodes(settings, say)
        say("starting the router and the workers")
        pools = Pools(settings)
        workers = pools.first_workers()
        routers = pools.start_routers()
        handles = {name: pools.start_worker(name, role) for name, role in workers}
        ready_s = settings.ray.ready_s
        addresses: list[str] = [_wait_for(router.start.remote(), name, ready_s) for name, router in routers.items()]
        for name, handle in handles.items():
            _wait_for(handle.describe.remote(), name, ready_s)
            say(f"{name} is ready")
        start_controller(settings)
        for router in routers.values():
            _wait_until_serving(router, len(workers), ready_s)
        state = ClusterState(**(asdict(state) | {"router_address": ",".join(addresses), "workers": tuple(handles)}))
        _write_state(state)
        return state
    except BaseException:
        down(state, say)
        raise


def _is_up(state: ClusterState) -> bool:
    """False if the Ray cluster it lived in ended without `down`."""
    if state.head_pid is not None:
        return True
    try:
        connect(state)
        return bool(router_names())
    except (LaunchError, ValueError):
        return False


def _wait_for_nodes(settings: Settings, say: Say) -> None:
    """Raises LaunchError if too few come, or if there are several and workers could not be reached on them."""
    wanted, deadline = settings.ray.min_nodes, time.monotonic() + settings.ray.ready_s
    while (nodes := sum(node["Alive"] for node in ray.nodes())) < wanted:
        if time.monotonic() > deadline:
            raise LaunchError(
                f"the Ray cluster has {nodes} of {wanted} nodes (ray.min_nodes) after {settings.ray.ready_s:.0f} s "
                "(ray.ready_s); see `ray status`"
            )
        say(f"{nodes} of {wanted} nodes are there")
        time.sleep(NODES_PERIOD_S)
    if nodes > 1 and settings.network.tls is None:
        raise LaunchError(
            f"the Ray cluster has {nodes} nodes, and without network.tls workers listen on loopback only; "
            "set network.tls, see docs/operations.md"
        )


def _check_folders(settings: Settings) -> None:
    """What can be seen to be wrong before Ray is started; the workers check the rest when they load the models."""
    for model in filter(None, (settings.target, settings.draft)):
        missing = [name for name in ("config.json", "tokenizer.json") if not (model.path / name).is_file()]
        if missing:
            raise LaunchError(
                f"{model.path}: no {' and no '.join(missing)}; expected a Hugging Face folder with config.json, "
                "tokenizer.json and *.safetensors"
            )


def _ray(settings: Settings, say: Say) -> ClusterState:
    if settings.ray.address is not None:
        return ClusterState(settings.name, settings.ray.address, "", None, "")
    say("starting Ray on this machine")
    folder = Path(tempfile.mkdtemp(prefix="tidemill-"))  # short: Ray puts sockets there, whose paths are limited
    token = head.new_token()
    head.use_token(token)
    try:
        address, pid = head.start_head(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return ClusterState(settings.name, address, token, pid, str(folder))


def _wait_for(reference: Any, what: str, timeout_s: float) -> Any:
    """Raises LaunchError with the cause, in one line, if an actor cannot be made."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise LaunchError(f"{what} was not ready within {timeout_s:.0f} s (ray.ready_s); see Ray's logs") from error
    except RayError as error:
        raise LaunchError(f"{what} did not start: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The last line of what the actor raised."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _wait_until_serving(router: Any, workers: int, timeout_s: float) -> None:
    """Every worker's stream to the router is open."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        seen = ray.get(router.describe.remote())["workers"]
        if sum(worker["state"] == "serving" for worker in seen) >= workers:
            return
        time.sleep(0.1)
    raise LaunchError("the workers are there, but the router does not reach them; see Ray's logs")


def status(state: ClusterState) -> dict[str, Any]:
    """The router's view and everybody's own words; whoever does not answer is named. Raises LaunchError."""
    connect(state)
    try:
        answers, silent = _ask([*router_names(), *worker_names(), CONTROLLER], "describe")
    except RayError as error:
        raise LaunchError(f"cluster {state.name!r} does not answer: {_cause(error)}") from error
    finally:
        ray.shutdown()  # or Ray goes on to say on standard output what happens in the cluster
    routers = _of_routers(answers, silent)
    described: dict[str, Any] = next(iter(routers.values()))
    for worker in described["workers"]:
        report = answers.get(worker["worker"].partition("@")[0])
        worker["pid"] = report.pid if report else None
        worker["metrics_address"] = report.metrics_address if report else ""
    heads = [{"router": name} | {key: each[key] for key in ROUTER_KEYS} for name, each in routers.items()]
    return described | {
        "routers": heads,
        "controller": answers.get(CONTROLLER),
        "silent": silent,
        "logs": f"{state.folder}/session_latest/logs" if state.folder else "",
    }


def _ask(names: Iterable[str], method: str, *arguments: object) -> tuple[dict[str, Any], dict[str, str]]:
    """(the answers that come in time, why the others do not), by name. Everybody is asked at once."""
    asked: dict[str, Any] = {}
    silent: dict[str, str] = {}
    for name in names:
        try:
            asked[name] = getattr(find(name), method).remote(*arguments)
        except ValueError:
            silent[name] = "it is not there"
    references = list(asked.values())
    done, _ = ray.wait(references, num_returns=len(references), timeout=ANSWER_S) if references else ([], [])
    answers = {}
    for name, reference in asked.items():
        if reference not in done:
            silent[name] = f"it said nothing for {ANSWER_S:.0f} s"
            continue
        try:
            answers[name] = ray.get(reference)
        except RayError as error:
            silent[name] = _cause(error)
    return answers, silent


def _of_routers(answers: Mapping[str, Any], silent: Mapping[str, str]) -> dict[str, Any]:
    """Raises LaunchError if there is none."""
    routers = {name: answer for name, answer in answers.items() if name.startswith(ROUTER)}
    if not routers:
        causes = [cause for name, cause in silent.items() if name.startswith(ROUTER)]
        raise LaunchError(f"no router answers: {causes[-1] if causes else 'there is none'}")
    return routers


@contextlib.contextmanager
def asking_routers(state: ClusterState) -> Iterator[Callable[..., dict[str, Any]]]:
    """A function that calls a method of every router by its name: their answers. Raises LaunchError, now or then."""
    connect(state)

    def ask(method: str, *arguments: object) -> dict[str, Any]:
        try:
            return _of_routers(*_ask(router_names(), method, *arguments))
        except RayError as error:
            raise LaunchError(f"the routers of {state.name!r} do not answer: {_cause(error)}") from error

    try:
        yield ask
    finally:
        ray.shutdown()


def change_role(state: ClusterState, worker: str, role: Role) -> str:
    """Have a worker take another role; returns its new name@epoch. Raises LaunchError."""
    connect(state)
    try:
        report = ray.get(find(worker).set_role.remote(str(role)), timeout=SWITCH_TIMEOUT_S)
    except ValueError as error:
        raise LaunchError(f"there is no worker {worker!r}; there are {', '.join(worker_names())}") from error
    except RayError as error:
        raise LaunchError(f"{worker} keeps its role: {_cause(error)}") from error
    return str(report.peer.id)


def scale(state: ClusterState, wanted: Mapping[Role, int], say: Say) -> None:
    """Have as many workers of these roles; returns when new ones serve and superfluous ones have drained and gone.

    Raises LaunchError.
    """
    connect(state)
    try:
        controller = find(CONTROLLER)
        decision: Decision[Plan] = ray.get(
            controller.scale.remote({str(role): count for role, count in wanted.items()}), timeout=PLAN_S
        )
    except (RayError, ValueError) as error:
        raise LaunchError(
            f"the controller of {state.name!r} does not answer: {_cause(error)}. Part of what it was asked for may be "
            "done, or be done later: run the command again when `tidemill status` shows it"
        ) from error
    if decision.reason is ScalingReason.NO_VERIFY_LEFT:
        raise LaunchError("no verify worker would be left, and nothing served; ask for verify=1 or more")
    started, leaving = dict(decision.choice.start), set(decision.choice.leave)
    if not started and not leaving:
        say("there are as many already")
    for name, role in started.items():
        _wait_for(find(name).describe.remote(), name, SWITCH_TIMEOUT_S)
        say(f"{name} serves as a {role} worker")
    deadline = time.monotonic() + SWITCH_TIMEOUT_S
    while leaving and time.monotonic() < deadline:
        gone = leaving - set(worker_names())
        for name in sorted(gone):
            say(f"{name} has drained and is gone")
        leaving -= gone
        time.sleep(0.1)
    if leaving:
        raise LaunchError(
            f"{', '.join(sorted(leaving))} did not go within {SWITCH_TIMEOUT_S:.0f} s; the controller ends who has "
            "drained: see `tidemill status` and Ray's logs"
        )


def down(state: ClusterState, say: Say) -> None:
    """End the actors, and the Ray head if `up` started it; leaves nothing of ours running."""
    try:
        if state.head_pid is None or head.is_running(state.head_pid):
            connect(state)
            _stop_actors(state)
    except (LaunchError, RayError):
        say("Ray does not answer; ending its processes")
    finally:
        ray.shutdown()
        if state.head_pid is not None:
            head.stop_head(state.head_pid)
        _forget(state)
    say("everything is down")


def _stop_actors(state: ClusterState) -> None:
    """The controller first, so that it does not report the rest as lost; clients' requests end with the router."""
    names = [CONTROLLER, *router_names(), *worker_names()]
    for name in names:
        try:
            actor = find(name)
        except ValueError:
            continue
        if name == CONTROLLER or name.startswith(ROUTER):
            _wait_quietly(actor.stop.remote())
        ray.kill(actor, no_restart=True)


def _wait_quietly(reference: Any) -> None:
    with contextlib.suppress(RayError):
        ray.get(reference, timeout=STOP_TIMEOUT_S)
