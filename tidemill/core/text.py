"""Tokens to text as they come, and where a stop string cuts it.

Engine and router use the same class on the same tokens, so they find a stop string at the same token.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TokenizerError(ValueError):
    """The folder's tokenizer.json is missing or broken."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read `tokenizer.json` of a model folder. Raises TokenizerError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{path}: no such file; a model folder needs config.json, *.safetensors and tokenizer.json"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path}: not a tokenizer: {error}") from error


class TextStream:
    """Incremental detokenizer of one request's output.

    Text that may turn out to be the beginning of a stop string is held back until that is decided; a character whose
    bytes are spread over several tokens comes with its last one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, tokens: Iterable[int]) -> str:
        """Text that became certain with these tokens. After a stop string `stopped` is set and nothing more comes."""
        if self.stopped:
            return ""
        for token in tokens:
            self._held += self._decoder.step(self._tokenizer, token) or ""
            if self._cut_at_stop():
                break
        keep = 0 if self.stopped else self._possible_stop()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def finish(self) -> str:
        """The output is over: what was still held back."""
        rest, self._held = self._held, ""
        return rest

    def _cut_at_stop(self) -> bool:
        """Cut the text at the earliest stop string in it, if any."""
        starts = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if starts:
            self._held = self._held[: min(starts)]
            self.stopped = True
        return self.stopped

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
