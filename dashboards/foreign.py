"""Series that others declare and the dashboards show: Prometheus itself, the process, Ray's agents."""

from tidemill.core.metrics import Kind, Series


def _of(name: str, kind: Kind, help: str, when_it_moves: str, *labels: str) -> Series:
    return Series(name, kind, help, when_it_moves, labels)


UP = _of("up", Kind.GAUGE, "1 for a target that answers.", "0: its process, or the way to it, is gone.")
PROCESS_CPU = _of(
    "process_cpu_seconds_total", Kind.COUNTER, "CPU time of a process.", "Near 1 a second for the router: add routers."
)
PROCESS_MEMORY = _of(
    "process_resident_memory_bytes", Kind.GAUGE, "Memory of a process.", "Growing without end: a leak."
)
PROCESS_FILES = _of("process_open_fds", Kind.GAUGE, "Open files and sockets.", "Growing without end: a leak.")
RAY_CPU = _of("ray_node_cpu_utilization", Kind.GAUGE, "CPU use of a node, percent.", "Near 100: add nodes.", "ip")
RAY_MEMORY = _of("ray_node_mem_used", Kind.GAUGE, "Memory in use on a node.", "Near its size: add nodes.", "ip")
RAY_NETWORK = _of(
    "ray_node_network_send_speed", Kind.GAUGE, "Bytes a node sends a second.", "Near the link's speed: KV waits.", "ip"
)
RAY_GPU = _of(
    "ray_node_gpus_utilization", Kind.GAUGE, "Use of a GPU, percent.", "Low under load: batches are small.",
    "ip", "GpuIndex",
)  # fmt: skip
RAY_GPU_MEMORY = _of(
    "ray_node_gram_used", Kind.GAUGE, "GPU memory in use, MiB.", "Constant: the KV pool is taken at the start.",
    "ip", "GpuIndex",
)  # fmt: skip

FOREIGN_SERIES = (
    UP, PROCESS_CPU, PROCESS_MEMORY, PROCESS_FILES, RAY_CPU, RAY_MEMORY, RAY_NETWORK, RAY_GPU, RAY_GPU_MEMORY,
)  # fmt: skip
