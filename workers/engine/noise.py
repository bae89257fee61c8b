"""Sampling noise keyed by (seed, position, token): any worker can compute it, and none needs another token's.

The token at a position is argmax over v of logits[v] / T + Gumbel(seed, position, v), which is a draw from
softmax(logits / T) (Gumbel 1954; Maddison et al., "A* Sampling", arXiv 1411.0030). Target and draft use the same noise,
so a draft proposes the target's very token as often as their distributions allow (Daliri et al., arXiv 2408.07978).
"""

import math
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

U64 = np.uint64
Bits = npt.NDArray[np.uint64]
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1
# Arrays' own operators would make a copy each; these are made once.
_U_GOLDEN, _U_FIRST, _U_SECOND, _U12, _U27, _U30, _U31 = map(U64, (_GOLDEN, _FIRST, _SECOND, 12, 27, 30, 31))


def mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014) on one 64-bit number."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def mix_all(x: Bits) -> Bits:
    """`mix` of each number, in place."""
    spare = np.empty_like(x)
    np.add(x, _U_GOLDEN, out=x)
    np.right_shift(x, _U30, out=spare)
    np.bitwise_xor(x, spare, out=x)
    np.multiply(x, _U_FIRST, out=x)
    np.right_shift(x, _U27, out=spare)
    np.bitwise_xor(x, spare, out=x)
    np.multiply(x, _U_SECOND, out=x)
    np.right_shift(x, _U31, out=spare)
    return np.bitwise_xor(x, spare, out=x)


def key_of(seed: int, position: int) -> int:
    """What the noise of one absolute position (0: first prompt token) hangs on, beside the token."""
    return mix(mix(seed) ^ position)


def gumbel(keys: int | Bits, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise of each of `tokens`, with one key from `key_of`, or one for each."""
    return gumbel_of_bits(mix_all((tokens.astype(U64) * _U_GOLDEN) ^ np.asarray(keys, U64)))


def gumbel_of_bits(bits: Bits) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise from 64 random bits each."""
    uniform = ((bits >> _U12).astype(np.float64) + 0.5) * 2.0**-52  # in (0, 1): with 53 bits the last would round to 1
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def bits_of(noise: float) -> np.uint64:
    """Bits that give at most `noise`: all tokens with more of it have larger bits."""
    return U64(max(int(math.exp(-math.exp(-noise)) * 2**64) - (1 << 20), 0))  # far more than what rounding can do


class HighNoise:
    """The few tokens of a vocabulary that have much noise, by position. A sequence's positions come up again and again:
    in every node of a tree at the same depth, and from step to step."""

    def __init__(self, vocabulary: int, kept: int = 4096) -> None:
        """Remembers the `kept` keys asked for last, about 250 bytes each."""
        self.least = max(math.log(vocabulary / 20), 1.0)  # about twenty tokens of a whole vocabulary have more
        self._bits = bits_of(self.least - 1e-6)
        self._tokens = np.arange(vocabulary, dtype=U64) * _U_GOLDEN
        self._kept = kept
        self._known: OrderedDict[int, npt.NDArray[np.int64]] = OrderedDict()

    def tokens(self, key: int) -> npt.NDArray[np.int64]:
        """Ascending, all tokens with at least `least` noise, and perhaps some with a little less."""
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = np.flatnonzero(mix_all(self._tokens ^ U64(key)) > self._bits)
            if len(self._known) > self._kept:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return found
