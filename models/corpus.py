"""The text the bundled models learn from: this Python's own standard library, split by file.

A file is held out when the SHA-256 of its path relative to the library says so; the split therefore depends on nothing
but names and stays the same on every machine. The tokenizer is trained on the training files alone.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
HELD_OUT_PERCENT = 6
END_OF_TEXT, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")

# Not prose of programmers: third-party code, tests, tables of characters, generated documentation, build settings.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload", "_bundled"}
    | {"encodings", "pydoc_data", "turtledemo"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "build-details")

# The split of Llama 3 (tiktoken's cl100k family) without English contractions.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SourceFile:
    """One library file: its path relative to the library, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True)
class Corpus:
    """Token streams. `train` and `held_out` are files, `chat` is function heads answered by their bodies."""

    train: Tokens
    chat: Tokens
    held_out: Tokens


def read_library(root: Path | None = None) -> list[SourceFile]:
    """The library's files in the order of their paths; files that are not UTF-8 or nearly empty are left out."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= 200:
            files.append(SourceFile(relative.as_posix(), text))
    return files


def train_tokenizer(files: list[SourceFile]) -> Tokenizer:
    """Byte-level BPE of `VOCAB_SIZE` tokens; encoding puts the end-of-text token first, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files if not file.held_out), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return tokenizer


def tokenizer_config(max_length: int) -> dict[str, object]:
    """What tokenizer_config.json holds beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "extra_special_tokens": {"system": SYSTEM, "user": USER, "assistant": ASSISTANT},
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
    }


def build_corpus(files: list[SourceFile], tokenizer: Tokenizer) -> Corpus:
    """Encode every file, each with the end-of-text token before it."""
    train = [file for file in files if not file.held_out]
    return Corpus(
        train=_encode([file.text for file in train], tokenizer),
        chat=_encode([text for file in train for text in chat_examples(file)], tokenizer),
        held_out=_encode([file.text for file in files if file.held_out], tokenizer),
    )


def _encode(texts: list[str], tokenizer: Tokenizer) -> Tokens:
    return np.concatenate([np.asarray(encoding.ids, np.int64) for encoding in tokenizer.encode_batch(texts)])


def functions(file: SourceFile) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Each documented function of a file and the number of its first line after the docstring (counted from 1)."""
    for node in ast.walk(ast.parse(file.text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            docstring_end = node.body[0].end_lineno
            assert docstring_end is not None
            yield node, docstring_end + 1


def chat_examples(file: SourceFile) -> Iterator[str]:
    """A function's head as the user's message, its body as the answer, in the form of `CHAT_TEMPLATE`."""
    lines = file.text.splitlines(keepends=True)
    for node, body_line in functions(file):
        head = "".join(lines[node.lineno - 1 : body_line - 1])
        body = "".join(lines[body_line - 1 : node.end_lineno])
        if len(head) + len(body) < 3000:
            yield f"{USER}\n{head.rstrip()}\n{ASSISTANT}\n{body.rstrip()}\n"


def held_out_prompts(files: list[SourceFile], tokenizer: Tokenizer, count: int) -> list[dict[str, str]]:
    """Beginnings of functions in held-out files, 40 to 400 tokens, as even over the files as they allow.

    A prompt is some of the lines before the function, its signature and docstring and up to three lines of its body;
    how many of each follows from a hash of the place, so the choice is the same everywhere.
    """
    by_file: list[list[dict[str, str]]] = []
    for file in files:
        if file.held_out:
            found = [prompt for prompt in _prompts_of(file) if 40 <= len(tokenizer.encode(prompt["prompt"]).ids) <= 400]
            by_file.append(sorted(found, key=lambda prompt: _hash(prompt["source"])))
    chosen: list[dict[str, str]] = []
    while len(chosen) < count and any(by_file):
        for found in by_file:
            if found and len(chosen) < count:
                chosen.append(found.pop())
    chosen.sort(key=lambda prompt: prompt["source"])
    return [{"id": f"stdlib-{number:02d}", **prompt} for number, prompt in enumerate(chosen)]


def _prompts_of(file: SourceFile) -> Iterator[dict[str, str]]:
    lines = file.text.splitlines(keepends=True)
    for node, body_line in functions(file):
        source = f"{file.path}:{node.lineno}"
        seed = _hash(source)
        before = (0, 4, 10, 18, 28)[seed % 5]
        inside = (0, 1, 2, 3)[seed // 5 % 4]
        first = max(0, min([node.lineno, *(item.lineno for item in node.decorator_list)]) - 1 - before)
        last = min(body_line - 1 + inside, (node.end_lineno or node.lineno) - 1)
        yield {"source": source, "prompt": "".join(lines[first:last])}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def write_prompts(path: Path, prompts: list[dict[str, str]]) -> None:
    """One JSON object a line: id, source (file:line) and prompt."""
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
