"""Up, status and down of one cluster, from its settings."""

import contextlib
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayError

from cluster import head
from cluster.controller import start_controller
from cluster.policy.scaling import Plan, ScalingReason
from cluster.pools import CONTROLLER, ROUTER, Pools, find, router_names, worker_names
from cluster.state import ClusterState, forget, read_state, turn, write_state
from tidemill.core.model import Decision, Role
from tidemill.core.settings import Settings

SEVERAL_NODES = ray_constants.ENABLE_RAY_CLUSTER  # Ray reads STAY_ON_LOOPBACK once: here it depends on the cluster
SWITCH_TIMEOUT_S = 120.0
NODES_PERIOD_S = 2.0
ANSWER_S = 5.0  # of all that are asked at once
PLAN_S = 10.0
ROUTER_KEYS = ("address", "metrics_address", "page_address", "active", "queued", "pid")
STOP_TIMEOUT_S = 10.0  # besides a drain
Say = Callable[[str], None]


class LaunchError(RuntimeError):
    """The cluster did not come up, or is not there; the message says what to do."""


def connect(state: ClusterState) -> None:
    """Join the Ray cluster as a driver. Raises LaunchError, at once if `up` started it and its head has died."""
    if state.head_pid is not None and not head.answers(state.ray_address):
        raise LaunchError(f"the Ray of cluster {state.name!r} has died; `tidemill down` ends what is left of it")
    if state.ray_token:
        head.use_token(state.ray_token)
    ray_constants.ENABLE_RAY_CLUSTER = SEVERAL_NODES and state.head_pid is None
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


def up(settings: Settings, say: Say, *, if_down: bool = False) -> ClusterState:
    """Bring everything up and wait until it serves. What was started is ended again if that fails.

    With `if_down` a cluster that is up already is left as it is, and returned. Raises LaunchError, HeadError, and
    whatever the settings' models make the workers raise.
    """
    _check_folders(settings)
    with turn(settings.name, say):
        found = _find(settings)
        if found is not None and found.router_address:
            write_state(found)  # another machine or container may have brought it up
            if if_down:
                return found
            raise LaunchError(
                f"cluster {settings.name!r} is up already, at {found.router_address}; "
                "use it, end it with `tidemill down`, or give this one another `name`"
            )
        if found is not None:
            say("ending what is left of an `up` that did not finish")
            _end(found, say)
        state = _on_ray(settings, say)
        try:
            return _start(settings, state, say)
        except BaseException:
            _end(state, say)
            raise


def _start(settings: Settings, state: ClusterState, say: Say) -> ClusterState:
    """See `up`; Ray answers."""
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
    state = replace(state, router_address=",".join(addresses), workers=tuple(handles))
    write_state(state)
    return state


def _state(settings: Settings, ray_address: str, **of_own_ray: Any) -> ClusterState:
    return ClusterState(settings.name, ray_address, drain_s=settings.deadlines.drain_s, **of_own_ray)


def _find(settings: Settings) -> ClusterState | None:
    """What there is of this cluster already; its `router_address` is empty if it is not whole. Raises LaunchError."""
    state = read_state(settings.name)
    if state is None:
        if settings.ray.address is None:
            return None
        state = _state(settings, settings.ray.address)  # whoever brought it up, Ray knows
    not_whole = replace(state, router_address="")
    try:
        connect(state)
    except LaunchError:
        if state.head_pid is None:
            raise
        return not_whole
    if not router_names() and not worker_names():
        return None if state.head_pid is None else not_whole
    try:
        find(CONTROLLER)
        routers = _of_routers(*_ask(router_names(), "describe"))
    except (LaunchError, RayError, ValueError):
        return not_whole
    if list(routers) != router_names():
        return not_whole
    addresses = ",".join(each["address"] for each in routers.values())
    return replace(state, router_address=addresses, workers=tuple(worker_names()))


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


def _on_ray(settings: Settings, say: Say) -> ClusterState:
    """The Ray cluster to use, which answers: the one of the settings, or a new one. Raises HeadError."""
    if settings.ray.address is not None:
        state = _state(settings, settings.ray.address)
        write_state(state)
        return state
    say("starting Ray on this machine")
    folder = Path(tempfile.mkdtemp(prefix="tidemill-"))  # short: Ray puts sockets there, whose paths are limited
    token = head.choose_token()
    head.use_token(token)
    started = head.start_head(folder)
    state = _state(settings, started.address, ray_token=token, head_pid=started.process.pid, folder=str(folder))
    try:
        write_state(state)  # before it answers: if this process is killed, the next `up` or `down` finds what there is
        head.wait_until_answers(started)
    except BaseException:
        head.stop_head(started.process.pid)
        forget(state)
        raise
    return state


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
    with turn(state.name, say):
        _end(read_state(state.name) or state, say)


def _end(state: ClusterState, say: Say) -> None:
    """See `down`."""
    try:
        connect(state)
        _stop_actors(state.drain_s)
    except (LaunchError, RayError) as error:
        rest = "ending its processes" if state.head_pid is not None else f"its actors are left alone ({error})"
        say(f"Ray does not answer; {rest}")
    finally:
        ray.shutdown()
        if state.head_pid is not None:
            head.stop_head(state.head_pid)
        forget(state)
    say("everything is down")


def _stop_actors(drain_s: float) -> None:
    """The controller first, so that it does not report the rest as lost; clients' requests end with the routers."""
    _stop([CONTROLLER], STOP_TIMEOUT_S)
    _stop(router_names(), drain_s + STOP_TIMEOUT_S)
    _kill(worker_names())


def _stop(names: list[str], timeout_s: float) -> None:
    """All at once, so that routers drain at the same time."""
    asked = []
    for name in names:
        with contextlib.suppress(ValueError):
            asked.append(find(name).stop.remote())
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
    _kill(names)


def _kill(names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(ValueError):
            ray.kill(find(name), no_restart=True)
