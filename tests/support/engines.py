"""Small engines, and ways to run them."""

import atexit
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import torch

from tests.support.vllm_engines import VllmEngines
from tidemill.core.messages import Draft
from tidemill.core.model import Request
from tidemill.core.settings import EngineSettings
from tidemill.core.tree import ROOT, TokenTree
from tidemill.types import SamplingParams
from workers.engine.emulated import EmulatedEngine
from workers.engine.native.config import ModelConfig
from workers.engine.native.engine import NativeEngine
from workers.engine.native.model import NativeModel
from workers.engine.native.runner_cpu import CpuRunner
from workers.engine.native.runner_torch import TorchRunner
from workers.engine.native.weights import LayerWeights, ModelWeights

VOCABULARY = 97
SMALL = EngineSettings(kv_blocks=256, max_batch_tokens=64)
TINY = ModelConfig(
    family="llama",
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    context_length=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling={},
    tied_embeddings=False,
    eos_token_ids=frozenset({1}),
)


def random_weights(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> ModelWeights:
    """Large enough that logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    ones = torch.ones(hidden, dtype=dtype)
    layers = tuple(
        LayerWeights(
            input_norm=ones,
            qkv=make(queries + 2 * keys, hidden),
            qkv_bias=make(queries + 2 * keys),
            q_norm=None,
            k_norm=None,
            output=make(hidden, queries),
            output_bias=None,
            post_norm=ones,
            gate_up=make(2 * inner, hidden),
            down=make(hidden, inner),
        )
        for _ in range(config.num_layers)
    )
    return ModelWeights(make(config.vocab_size, hidden) * 8, layers, ones, make(config.vocab_size, hidden))


def tiny_model(dtype: torch.dtype = torch.float32, kernels: str = "cpu") -> NativeModel:
    """A random Llama that runs in a fraction of a millisecond."""
    weights = random_weights(TINY, dtype)
    device = torch.device("cpu")
    runner = CpuRunner(TINY, weights, dtype) if kernels == "cpu" else TorchRunner(TINY, weights, device)
    return NativeModel(TINY, runner, dtype, device)


def pool_of(kind: str, tokens: int, **changes: object) -> EngineSettings:
    """SMALL, with KV blocks for so many tokens."""
    block_size = 32 if kind == "vllm" else SMALL.block_size  # the least vLLM's CPU kernels take
    sizes = {"block_size": block_size, "kv_blocks": tokens // block_size}
    return SMALL.model_copy(update=sizes | changes | ({"dtype": "float32"} if kind == "vllm" else {}))


def make_engine(kind: str, settings: EngineSettings | None = None) -> NativeEngine:
    """ "emulated", "vllm", or "native-<kernels>-<dtype>"."""
    settings = settings or pool_of(kind, 4096)
    if kind == "emulated":
        return EmulatedEngine(settings, VOCABULARY, 512)
    if kind == "vllm":
        return vllm_engines().make(vllm_folder(), settings)  # type: ignore[return-value]
    _, kernels, dtype = kind.split("-")
    return NativeEngine(tiny_model(getattr(torch, dtype), kernels), settings)


@cache
def vllm_engines() -> VllmEngines:
    return VllmEngines()


@cache
def vllm_folder() -> Path:
    """The random Llama of the other engines, as a folder."""
    from tests.support.miniatures import folder_tensors, write_folder

    folder = Path(tempfile.mkdtemp(prefix="tidemill-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tensors = {name: each for name, each in folder_tensors().items() if not name.endswith("bias")}
    document = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": TINY.vocab_size,
        "hidden_size": TINY.hidden_size,
        "intermediate_size": TINY.intermediate_size,
        "num_hidden_layers": TINY.num_layers,
        "num_attention_heads": TINY.num_heads,
        "num_key_value_heads": TINY.num_kv_heads,
        "head_dim": TINY.head_dim,
        "max_position_embeddings": TINY.context_length,
        "rms_norm_eps": TINY.rms_norm_eps,
        "rope_theta": TINY.rope_theta,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    return write_folder(folder, tensors, document)


def bundled_engine(models: Path, settings: EngineSettings) -> NativeEngine:
    return NativeEngine.from_folder(models / "target", settings)


def prompt_of(count: int, seed: int = 0) -> tuple[int, ...]:
    """A prompt."""
    rng = random.Random(seed)
    return tuple(rng.randrange(2, VOCABULARY) for _ in range(count))


def random_requests(seed: int, count: int = 8, longest: int = 60) -> list[Request]:
    """Mixed lengths and parameters; some share a prefix."""
    rng = random.Random(seed)
    shared = [rng.randrange(2, VOCABULARY) for _ in range(40)]
    requests = []
    for index in range(count):
        own = [rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(1, longest))]
        prompt = shared[: rng.randrange(40)] + own if rng.random() < 0.5 else own
        sampling = SamplingParams(
            max_tokens=rng.randrange(1, 40),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            frequency_penalty=rng.choice([0.0, 0.3]),
            seed=index,
            ignore_eos=rng.random() < 0.5,
        )
        requests.append(Request(f"r{index}", tuple(prompt), sampling))
    return requests


def drain(engine: NativeEngine, check: bool = True) -> dict[str, tuple[int, ...]]:
    """Step until nothing is left; tokens by request."""
    out: dict[str, tuple[int, ...]] = {}
    while engine.has_work():
        for each in engine.step().outputs:
            out[each.request_id] = out.get(each.request_id, ()) + each.tokens
        if check:
            engine.check()
    return out


def one_by_one(engine: NativeEngine, requests: Iterable[Request]) -> dict[str, tuple[int, ...]]:
    """Plain decoding, a request at a time: what everything else is compared with."""
    out: dict[str, tuple[int, ...]] = {}
    for request in requests:
        engine.submit(request)
        out |= drain(engine, check=False)
    return out


def random_tree(rng: random.Random, right: Sequence[int], size: int, vocabulary: int = VOCABULARY) -> TokenTree:
    """A tree of up to `size` nodes, some path of which begins as `right` does; siblings may repeat a token."""
    tokens: list[int] = []
    parents: list[int] = []
    on_path = {ROOT: 0}  # node -> how many of `right` lead to it
    for _ in range(rng.randrange(size + 1)):
        parent = rng.choice([ROOT, *range(len(tokens)), len(tokens) - 1])
        depth = on_path.get(parent)
        if depth is not None and depth < len(right) and rng.random() < 0.8:
            on_path[len(tokens)] = depth + 1
            tokens.append(right[depth])
        else:
            tokens.append(rng.randrange(vocabulary))
        parents.append(parent)
    return TokenTree(tuple(tokens), tuple(parents))


Drafter = Callable[[Request, tuple[int, ...]], TokenTree]


def with_drafts(engine: NativeEngine, requests: Sequence[Request], drafter: Drafter) -> dict[str, tuple[int, ...]]:
    """All at once, with a draft offered for each before every step."""
    out: dict[str, tuple[int, ...]] = {request.id: () for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work():
        for request in requests:
            base = len(request.prompt) + len(out[request.id])
            engine.propose(Draft(request.id, base, drafter(request, out[request.id])))
        for each in engine.step().outputs:
            out[each.request_id] += each.tokens
        engine.check()
    return out
