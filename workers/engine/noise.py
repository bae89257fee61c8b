"""Sampling noise keyed by (seed, position, token): any worker can compute it, and none needs another token's.

The token at a position is argmax over v of logits[v] / T + Gumbel(seed, position, v), which is a draw from
softmax(logits / T) (Gumbel 1954; Maddison et al., "A* Sampling", arXiv 1411.0030). Target and draft use the same noise,
so a draft proposes the target's very token as often as their distributions allow (Daliri et al., arXiv 2408.07978).
"""

import numpy as np
import numpy.typing as npt

U64 = np.uint64
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014) on one 64-bit number."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_all(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + U64(_GOLDEN)
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def gumbel(seed: int, position: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise of each of `tokens` [n] at an absolute position (0: first prompt token)."""
    key = U64(mix(mix(seed) ^ position))
    with np.errstate(over="ignore"):
        bits = _mix_all(tokens.astype(U64) * U64(_GOLDEN) ^ key)
    uniform = ((bits >> U64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), both ends excluded
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise
