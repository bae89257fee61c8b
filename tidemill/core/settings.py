"""All settings: one frozen tree, every field documented where it is declared; settings_file.py reads it from YAML.

Nothing is read from the environment; secrets are in files named here.
"""

import itertools
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tidemill.core.model import Role

Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
Cost = Annotated[float, Field(ge=0)]  # seconds


class SettingsError(ValueError):
    """The settings cannot be used; the message lists every fault with its place."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSettings(Section):
    """A Hugging Face folder: config.json, *.safetensors, tokenizer.json."""

    path: Path
    """Folder; a relative path counts from the settings file."""
    name: str = ""
    """Name clients ask for; empty: the folder's name."""
    threads: Count | None = None
    """OpenMP threads of an engine process that runs it; none: `engine.threads`. A draft model wants one."""

    @property
    def served_name(self) -> str:
        return self.name or self.path.name


class EngineSettings(Section):
    """How a worker's engine runs a model."""

    kind: Literal["native", "vllm", "emulated"] = "native"
    """`native` runs dense models; `vllm` whatever vLLM does, in prefill and verify workers (the draft model stays with
    `native`); `emulated` answers in the real protocol without one; see `emulated`."""
    device: str = "cpu"
    """Torch device of the worker: `cpu` or `cuda`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of weights and KV."""
    kernels: Literal["auto", "cpu", "torch"] = "auto"
    """`cpu`: kernels compiled at first use; `torch`: stock operators; `auto`: the first where a compiler is found."""
    threads: Count = 1
    """OpenMP threads of one engine process. More than one only pays with idle cores."""
    kv_blocks: Count = 2048
    """KV blocks of a worker's pool."""
    block_size: Literal[8, 16, 32, 64, 128] = 16
    """Tokens of one KV block."""
    max_batch_tokens: Count = 512
    """Rows of one step: decodes first, then prompt chunks up to this."""
    max_running: Count = 128
    """Sequences in one step."""
    max_waiting: Count = 512
    """Sequences waiting for blocks; more are refused."""
    prefix_cache: bool = True
    """Keep the KV of full blocks after a request ends and reuse it for equal prefixes."""


class LatencySettings(Section):
    """How long a step takes. Coefficients in seconds; with all of them 0 a step takes no time of its own."""

    model: Literal["linear", "fitted", "opt-13b"] = "linear"
    """`linear`: the coefficients given here; `fitted`: those that fit the steps in `measured` best; `opt-13b`: what
    DistServe measured for OPT-13B on one A100 with 80 GB."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Every step takes so many times as long; more than 1 lets a small machine keep up with many workers."""
    step_s: Cost = 0.0
    """`linear`: of every step."""
    prefill_token_s: Cost = 0.0
    """`linear`: of each prompt token."""
    prefill_square_s: Cost = 0.0
    """`linear`: of each token squared, summed over prompts: attention among a prompt's own tokens."""
    decode_row_s: Cost = 0.0
    """`linear`: of each sequence that decodes."""
    context_token_s: Cost = 0.0
    """`linear`: of each token these sequences attend to."""
    drafted_row_s: Cost = 0.0
    """`linear`: of each drafted token that is verified."""
    measured: Path | None = None
    """`fitted`: CSV file of measured steps, as `python -m benchmarks.step_times` writes it."""

    @model_validator(mode="after")
    def _consistent(self) -> "LatencySettings":
        if (self.model == "fitted") is not (self.measured is not None):
            raise ValueError("`model: fitted` and `measured`, a file of measured steps, need each other")
        return self


class EmulatedSettings(Section):
    """What the emulated engine pretends to run. Of the models' folders only config.json and the tokenizer are read."""

    target: LatencySettings = LatencySettings()
    """Of prefill and verify workers."""
    draft: LatencySettings = LatencySettings()
    """Of draft workers."""
    agreement: Annotated[float, Field(ge=0.1, le=1)] = 1.0
    """Share of positions at which the draft's first choice is the target's token, at temperature 0. The second choice
    is right in the same share of the others, and so on."""
    vocab_size: Annotated[int | None, Field(ge=64)] = None
    """Tokens there are; none: as in config.json. With fewer than the tokenizer's, texts may be refused."""
    context_length: Annotated[int | None, Field(gt=0)] = None
    """Most tokens of a request; none: as in config.json."""


class PoolSettings(Section):
    """How many workers start in each role. Draft workers are optional."""

    prefill: Annotated[int, Field(ge=0)] = 1
    """Workers that compute prompts; with none, verify workers do."""
    draft: Annotated[int, Field(ge=0)] = 1
    """Workers that run the draft model; with none, nothing is drafted."""
    verify: Count = 2
    """Workers that decode, and verify drafts."""


class TlsSettings(Section):
    """PEM files."""

    certificate: Path
    """The router's certificate, with its chain."""
    key: Path
    """Its private key."""
    client_ca: Path | None = None
    """If set, clients must show a certificate of this authority."""


class NodeTlsSettings(Section):
    """PEM files, the same on every node. The certificate is made for the name `tidemill-node`."""

    certificate: Path
    """What a node shows to the others, whoever called."""
    key: Path
    """Its private key."""
    ca: Path
    """The authority that signed it, and nothing but nodes' certificates."""


class NetworkSettings(Section):
    """Between the router and the workers."""

    tls: NodeTlsSettings | None = None
    """With it workers listen on their node's address, and take only callers that show a node's certificate. Without it
    they listen on loopback, and the cluster is one machine."""


class RouterSettings(Section):
    """The front door."""

    host: str = "127.0.0.1"
    """Address to listen on. Other than loopback needs `tls` and `token_file`."""
    port: Port = 7071
    """0: any free port. Further replicas listen on the ports that follow, as their metrics and status pages do."""
    replicas: Count = 1
    """Routers over the same pools. Clients that know all of them go on at another when one fails."""
    tls: TlsSettings | None = None
    token_file: Path | None = None
    """File with the bearer token clients must send; none: no token asked for."""
    max_active: Count = 256
    """Requests being served at once; more wait."""
    max_queued: Annotated[int, Field(ge=0)] = 256
    """Requests waiting; more get `overloaded`."""
    max_message_bytes: Count = 4 * 1024 * 1024
    """Largest request or answer."""
    default_deadline_s: Seconds = 600.0
    """For requests without a deadline of their own."""
    max_retries: Annotated[int, Field(ge=0)] = 1
    """How often a request goes on elsewhere after its worker failed."""
    move_headroom_tokens: Count = 256
    """Room for tokens that a request gets while its KV is copied to another verify worker."""


class SplitSettings(Section):
    """Prefill on a prefill worker, or on the verify worker itself."""

    min_prefill_tokens: Annotated[int, Field(ge=0)] = 32
    """Prompts with fewer tokens to compute are prefilled where they are decoded."""


DraftSource = Literal["draft", "early_layers", "lookup", "recycling", "trigram"]


class SpeculationSettings(Section):
    """Drafts, and how much of them is verified."""

    enabled: bool = True
    """Off: nothing is drafted, whatever pools.draft is."""
    strategy: Literal["chain", "beam", "heap", "static"] = "heap"
    """How a draft worker's trees grow: one token after another; level by level; the likeliest nodes first; or the shape
    that is best for the measured acceptance."""
    max_depth: Annotated[int, Field(ge=1, le=16)] = 8
    """Levels of a tree that a step verifies."""
    width: Annotated[int, Field(ge=1, le=16)] = 3
    """Children of a node."""
    max_nodes: Annotated[int, Field(ge=1, le=64)] = 16
    """Nodes of a tree that a step verifies."""
    ahead: Annotated[int, Field(ge=0, le=4)] = 1
    """How many rounds a draft worker drafts on while a tree is being verified. 0: it waits for the verdict."""
    wait_s: Annotated[float, Field(ge=0)] = 0.1
    """Longest a step waits for drafts that were asked for; after it the step goes without. It is a bound for draft
    workers in trouble: whether a step waits at all follows from what the drafts are worth."""
    sources: Annotated[tuple[DraftSource, ...], Field(min_length=1)] = ("draft",)
    """Where drafts come from; of several, a request takes the one from which most tokens are expected. `draft`: the
    draft workers. Inside the verify worker: `early_layers` of the target; `lookup` in the request's text and its
    tenant's outputs; `recycling` of what the target found likely before; `trigram` counts."""
    early_layers: Count = 2
    """How many of the target's layers draft for the source of that name."""
    adaptive: bool = True
    """Depth, width and how many nodes are verified follow from measured step times and acceptance, down to no drafts at
    all. Off: always `max_depth`, `width` and `max_nodes`."""
    tolerance: Annotated[float, Field(ge=0)] = 0.5
    """How much longer than without drafts a step may take so that requests meet their time per output token."""
    rule: Literal["sample_match"] = "sample_match"
    """How drafts are accepted. Drafts are chosen with the noise that the target chooses with; only this rule keeps
    every token what it would be without drafts."""


class DeadlineSettings(Section):
    """How long each stage may take before the request is taken elsewhere."""

    reserve_s: Seconds = 10.0
    """Verify worker's answer to a reservation."""
    prefill_s: Seconds = 60.0
    """From the prefill command to its end."""
    transfer_s: Seconds = 30.0
    """From the end of prefill to the first token."""
    token_s: Seconds = 30.0
    """Between tokens of a running request."""
    stall_s: Seconds = 3.0
    """Silence after which a worker counts as stopped: its requests go on elsewhere. A live one is never silent for more
    than a second, however long its step takes. A KV message that takes so long breaks its link."""
    link_s: Seconds = 10.0
    """Opening a KV link."""
    lease_s: Seconds = 90.0
    """Life of a KV lease; longer than prefill and transfer together."""
    move_s: Seconds = 10.0
    """Copying a decoding request's KV to another verify worker; it decodes on meanwhile."""
    resume_s: Seconds = 2.0
    """From its pause to its next token there; after it, it goes on where it was."""
    drain_s: Seconds = 5.0
    """How long running requests may stay when a worker changes role or stops."""


class SloSettings(Section):
    """A named latency goal."""

    ttft_s: Seconds
    """Time to first token."""
    tpot_s: Seconds
    """Mean time per output token after it."""


class RaySettings(Section):
    """The Ray cluster the actors live in."""

    address: str | None = None
    """`host:port` of a running cluster, or `auto` for the one this machine belongs to; none: `tidemill up` starts a
    head on this machine and `down` stops it."""
    min_nodes: Count = 1
    """Nodes, with the head, that `up` waits for before it places workers; they spread over those that are there."""
    ready_s: Seconds = 120.0
    """How long `up` waits for nodes, for the router and for each worker; nodes that are yet to start need minutes."""
    resources: dict[Role, dict[str, Annotated[float, Field(gt=0)]]] = {}
    """Further Ray resources that workers ask for, by the role they start in: they decide where a pool lives."""
    cpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """Ray CPUs reserved for each worker actor; 0 lets many share a small machine."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """Ray GPUs reserved for each worker actor."""
    max_restarts: int = -1
    """How often Ray restarts a dead worker; -1: always."""


class RoleBounds(Section):
    """How few and how many workers may have a role."""

    least: Annotated[int, Field(ge=0)] = 0
    """Below this no worker leaves the role."""
    most: Count | None = None
    """Above this none joins it; none: no limit."""


class ControllerSettings(Section):
    """Watches the workers, and moves them between roles as the traffic changes."""

    rebalance: bool = True
    """Off: roles change by `tidemill role` only, or when no verify worker is left: then another worker becomes one."""
    level: bool = True
    """Decoding requests move from verify workers that are short of KV blocks to others that are not."""
    period_s: Seconds = 0.5
    """Between two looks at the workers and routers."""
    windows_s: tuple[Seconds, ...] = (1.0, 3.0, 10.0, 30.0, 90.0)
    """How far back traffic is summed up, the shortest window first: short ones show a change, long ones a mean."""
    prefill: RoleBounds = RoleBounds()
    """With no prefill worker, prompts are computed where they are decoded."""
    draft: RoleBounds = RoleBounds()
    verify: RoleBounds = RoleBounds(least=1)
    headroom: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of what a role could do within the goals above which roles are reconsidered."""
    margin: Annotated[float, Field(ge=0)] = 0.1
    """By how much another split must relieve the most loaded role."""
    sustain_s: Annotated[float, Field(ge=0)] = 1.0
    """How long a change must be called for before it is made."""
    cooldown_s: Annotated[float, Field(ge=0)] = 3.0
    """Between two changes of roles."""
    dwell_s: Annotated[float, Field(ge=0)] = 10.0
    """How long a worker keeps a role at least."""
    switch_timeout_s: Seconds = 60.0
    """A role switch that takes longer is given up, and counted as failed."""

    @model_validator(mode="after")
    def _ordered(self) -> "ControllerSettings":
        if not self.windows_s or any(a >= b for a, b in itertools.pairwise(self.windows_s)):
            raise ValueError("controller.windows_s must have one window or more, the shortest first")
        if self.verify.least < 1:
            raise ValueError("controller.verify.least must be at least 1: without a verify worker nothing is served")
        return self


class MetricsSettings(Section):
    """Prometheus endpoints of router and workers."""

    host: str = "127.0.0.1"
    """Address the router's endpoint listens on. Other than loopback needs `network.tls`."""
    router_port: Port = 0
    """0: any free port; `tidemill status` shows it."""
    controller_port: Port = 0
    """0: any free port; `tidemill status` shows it."""
    worker_port: Port = 0
    """0: any free port; a fixed one only where each worker has an address of its own, as a Kubernetes pod has."""
    targets_file: Path | None = None
    """Where the controller writes the list of all endpoints for Prometheus' file_sd; none: nowhere."""


class StatusPageSettings(Section):
    """The router's web page. It asks for what clients are asked for: `router.tls`, and the token as a password."""

    enabled: bool = True
    """Off: nothing is served over HTTP but metrics."""
    host: str = "127.0.0.1"
    """Address to listen on. Other than loopback needs `router.tls` and `router.token_file`."""
    port: Port = 0
    """0: any free port; `tidemill status` shows it."""


class TracesSettings(Section):
    """Requests' lives for an OpenTelemetry collector; the router keeps the latest for `tidemill trace` in any case."""

    endpoint: str | None = None
    """`host:port` of a collector that takes OTLP over gRPC; none: nothing is sent. Other than loopback needs `ca`."""
    ca: Path | None = None
    """PEM file of the authority that signed the collector's certificate; none: no TLS."""


class Settings(Section):
    """The whole tree."""

    name: str = "tidemill"
    """Name of the cluster: Ray namespace and state file."""
    target: ModelSettings
    draft: ModelSettings | None = None
    """Needed with `pools.draft > 0`."""
    engine: EngineSettings = EngineSettings()
    emulated: EmulatedSettings = EmulatedSettings()
    """Used with `engine.kind: emulated`."""
    pools: PoolSettings = PoolSettings()
    router: RouterSettings = RouterSettings()
    network: NetworkSettings = NetworkSettings()
    split: SplitSettings = SplitSettings()
    speculation: SpeculationSettings = SpeculationSettings()
    deadlines: DeadlineSettings = DeadlineSettings()
    slo: dict[str, SloSettings] = {"default": SloSettings(ttft_s=1.0, tpot_s=0.1)}
    """Latency goals by class; requests name one."""
    controller: ControllerSettings = ControllerSettings()
    ray: RaySettings = RaySettings()
    metrics: MetricsSettings = MetricsSettings()
    status_page: StatusPageSettings = StatusPageSettings()
    traces: TracesSettings = TracesSettings()

    def threads_of(self, role: Role) -> int:
        """OpenMP threads of a worker's engine."""
        model = self.draft if role is Role.DRAFT else self.target
        return (model and model.threads) or self.engine.threads

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.pools.draft and self.draft is None:
            raise ValueError("pools.draft > 0 needs a `draft` model; set draft.path, or pools.draft to 0")
        if self.engine.kind == "vllm" and self.engine.device == "cpu" and self.engine.block_size % 32:
            raise ValueError(
                f"engine.block_size {self.engine.block_size}: vLLM's CPU kernels need 32, 64 or 128 tokens a block"
            )
        if "default" not in self.slo:
            raise ValueError("slo needs a class named `default`")
        if self.deadlines.lease_s < self.deadlines.prefill_s:
            raise ValueError("deadlines.lease_s must be at least deadlines.prefill_s, or leases expire during prefill")
        for section, host in (("router", self.router.host), ("status_page", self.status_page.host)):
            if not is_loopback(host) and not (self.router.tls and self.router.token_file):
                raise ValueError(
                    f"{section}.host {host!r} is not loopback: set router.tls and router.token_file, "
                    "or listen on 127.0.0.1"
                )
        endpoint = self.traces.endpoint
        if endpoint and self.traces.ca is None and not is_loopback(endpoint.rpartition(":")[0].strip("[]")):
            raise ValueError(f"traces.endpoint {endpoint!r} is not loopback: set traces.ca, or use a local collector")
        if not is_loopback(self.metrics.host) and self.network.tls is None:
            raise ValueError(
                f"metrics.host {self.metrics.host!r} is not loopback: set network.tls, or listen on 127.0.0.1"
            )
        return self


def is_loopback(host: str) -> bool:
    """True if only this machine can reach a server that listens on `host`."""
    return host in {"localhost", "::1"} or host.startswith("127.")
