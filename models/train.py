"""Train the bundled pair on this Python's standard library: a target, then a draft distilled from it.

    python models/train.py prepare                       # tokenizer, prompts.jsonl, two untrained folders
    python models/train.py target --minutes 50
    python models/train.py draft --minutes 62            # needs the target
    python models/train.py evaluate                      # evaluation.json and the figures of the model card

`--minutes` trains until the time is up and says how many steps that took; `--steps` trains that many and is
deterministic: same machine type, same torch, same seed, same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import corpus
import numpy as np
import torch
import torch.nn.functional as F
from corpus import Corpus, Tokens
from evaluate import evaluate_pair, held_out_loss, write_card
from llama import Llama, LlamaConfig, load_folder, save_folder
from sampling import sample_continuations
from tokenizers import Tokenizer
from torch import Tensor

HERE = Path(__file__).resolve().parent
TARGET = LlamaConfig(
    hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2
)
DRAFT = LlamaConfig(
    hidden_size=192, intermediate_size=512, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1
)
PROMPTS = 50
LOG_EVERY_S, SAVE_EVERY_S = 20.0, 240.0

# Share of the training done -> tokens in a window: short ones first, long ones last so that late positions are seen.
WINDOW_PLAN = ((0.55, 256), (0.85, 512), (0.95, 1024), (1.0, 2048))


@dataclass(frozen=True)
class Recipe:
    """How one model is trained. Exactly one of `minutes` and `steps` is set."""

    minutes: float | None
    steps: int | None
    seed: int
    learning_rate: float
    tokens_per_step: int
    warm_up_steps: int = 100
    weight_decay: float = 0.1

    def progress(self, step: int, elapsed_s: float) -> float:
        """Share of the training that is done, 0 to 1."""
        done = step / self.steps if self.steps else elapsed_s / (60 * (self.minutes or 1.0))
        return min(done, 1.0)

    def rate(self, step: int, progress: float) -> float:
        """Warm-up, then linear decay to 2 % of the peak."""
        return self.learning_rate * min((step + 1) / self.warm_up_steps, 1.0) * (1.0 - 0.98 * progress)


def window_length(progress: float) -> int:
    """Tokens in a window at this point of the training."""
    return next(length for until, length in WINDOW_PLAN if progress <= until)


def batches(data: Corpus, recipe: Recipe) -> Callable[[int], Tensor]:
    """A function from a window length to rows of token ids, each starting with the end-of-text token.

    Starting every window with that token makes position 0 look as it does at inference, where the tokenizer puts it.
    One row in sixteen, on average, is chat examples.
    """
    random = np.random.default_rng(recipe.seed)
    chat_starts = np.flatnonzero(data.chat == 0)

    def window(stream: Tokens, start: int, length: int) -> Tokens:
        return np.concatenate([np.zeros(1, np.int64), stream[start : start + length]])

    def batch(length: int) -> Tensor:
        rows = []
        for _ in range(max(recipe.tokens_per_step // length, 1)):
            if random.random() < 1 / 16:
                start = int(random.choice(chat_starts[chat_starts < data.chat.size - length - 1])) + 1
                rows.append(window(data.chat, start, length))
            else:
                rows.append(window(data.train, int(random.integers(data.train.size - length)), length))
        return torch.from_numpy(np.stack(rows))

    return batch


class Optimizer:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms, one learning rate for both.

    Muon: Jordan et al., https://kellerjordan.github.io/posts/muon, with the update scaled to AdamW's as in Liu et al.,
    "Muon is Scalable for LLM Training" (arXiv 2502.16982).
    """

    def __init__(self, model: Llama, recipe: Recipe) -> None:
        named = list(model.named_parameters())
        matrices = [weight for name, weight in named if weight.dim() == 2 and ".layers." in name]
        others = [weight for name, weight in named if not (weight.dim() == 2 and ".layers." in name)]
        self.recipe = recipe
        self.parameters = [weight for _, weight in named]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

    def step(self, loss: Tensor, rate: float) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)


def train(
    model: Llama,
    recipe: Recipe,
    loss_of: Callable[[int], Tensor],
    save: Callable[[], None],
    held_out: Callable[[], float],
) -> int:
    """Train in place; `loss_of(window length)` draws a batch. Saves every few minutes and returns the steps taken."""
    optimizer = Optimizer(model, recipe)
    started = logged = saved = time.monotonic()
    step = tokens = 0
    recent: list[float] = []
    while (progress := recipe.progress(step, time.monotonic() - started)) < 1.0:
        loss = loss_of(window_length(progress))
        optimizer.step(loss, recipe.rate(step, progress))
        recent.append(loss.item())
        step, tokens = step + 1, tokens + recipe.tokens_per_step
        now = time.monotonic()
        if now - logged >= LOG_EVERY_S:
            left = (now - started) * (1 / max(recipe.progress(step, now - started), 1e-6) - 1)
            mean = sum(recent) / len(recent)
            print(
                f"step {step}  loss {mean:.3f}  {tokens / (now - logged):.0f} tokens/s  {left / 60:.1f} min left",
                flush=True,
            )
            logged, tokens, recent = now, 0, []
        if now - saved >= SAVE_EVERY_S:
            save()
            print(f"step {step}  saved  held-out loss {held_out():.3f}", flush=True)
            saved = time.monotonic()
    save()
    print(
        f"done: {step} steps in {(time.monotonic() - started) / 60:.1f} min, held-out loss {held_out():.3f}", flush=True
    )
    return step


def next_token_loss(model: Llama, rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of rows [rows, tokens + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


class Distillation:
    """A draft's loss: mean KL(target || draft) in nats, at temperature 1 (Hinton et al., arXiv 1503.02531).

    Every second batch is text of the target's own making, since that is what a draft must foresee (Zhou et al.,
    "DistillSpec", arXiv 2310.08461): beginnings of real windows that the target continues greedily or sampled. They are
    drawn from a pool that is refilled now and then, because sampling costs more than learning.
    """

    PROMPT, WINDOW = 64, 256
    TEMPERATURES = (0.0, 0.8, 1.0)
    REFILL_EVERY, REFILL_ROWS, POOL_ROWS = 48, 64, 512

    def __init__(self, draft: Llama, target: Llama, data: Corpus, recipe: Recipe) -> None:
        self.draft, self.target, self.recipe = draft, target, recipe
        self.draw = batches(data, recipe)
        self.random = torch.Generator().manual_seed(recipe.seed)
        self.pool = torch.empty(0, self.WINDOW, dtype=torch.long)
        self.step = 0

    def __call__(self, length: int) -> Tensor:
        self.step += 1
        if self.step % 2:
            return self.divergence(self.draw(length)[:, :-1])
        if self.step % self.REFILL_EVERY == 2:
            self.refill()
        rows = torch.randint(len(self.pool), (self.recipe.tokens_per_step // self.WINDOW,), generator=self.random)
        return self.divergence(self.pool[rows])

    def refill(self) -> None:
        """Add the target's continuations of real text at one temperature; the oldest rows leave."""
        count = self.REFILL_ROWS * self.WINDOW // self.recipe.tokens_per_step
        prompts = torch.cat([self.draw(self.WINDOW)[:, : self.PROMPT] for _ in range(max(count, 1))])
        temperature = self.TEMPERATURES[self.step // self.REFILL_EVERY % len(self.TEMPERATURES)]
        with torch.autocast("cpu", torch.bfloat16):
            fresh = sample_continuations(self.target, prompts, self.WINDOW - self.PROMPT, temperature, self.random)
        self.pool = torch.cat([self.pool, fresh])[-self.POOL_ROWS :]

    def divergence(self, rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            wanted, got = self.target(rows), self.draft(rows)
        wanted, got = (logits.flatten(0, 1).float().log_softmax(-1) for logits in (wanted, got))
        return F.kl_div(got, wanted, log_target=True, reduction="batchmean")


def prepare(files: list[corpus.SourceFile]) -> None:
    """Tokenizer, prompts and two untrained folders."""
    tokenizer = corpus.train_tokenizer(files)
    corpus.write_prompts(HERE / "prompts.jsonl", corpus.held_out_prompts(files, tokenizer, PROMPTS))
    for name, config in (("target", TARGET), ("draft", DRAFT)):
        save(Llama(config), name, tokenizer.to_str(pretty=True))


def save(model: Llama, name: str, tokenizer_json: str) -> None:
    config = corpus.tokenizer_config(model.config.max_position_embeddings)
    save_folder(model, HERE / name, tokenizer_json, config)


def run(args: argparse.Namespace) -> None:
    """Train one of the two models."""
    torch.manual_seed(args.seed)
    tokenizer_json = (HERE / "target" / "tokenizer.json").read_text(encoding="utf-8")
    data = corpus.build_corpus(corpus.read_library(), Tokenizer.from_str(tokenizer_json))
    print(f"{data.train.size} training tokens, {data.held_out.size} held out, {data.chat.size} of chat", flush=True)
    is_target = args.command == "target"
    model = Llama(TARGET if is_target else DRAFT)
    minutes = args.minutes if args.steps is None else None
    recipe = Recipe(minutes, args.steps, args.seed, args.learning_rate, args.tokens_per_step)
    print(f"{args.command}: {model.parameter_count() / 1e6:.2f}M parameters", flush=True)
    if is_target:
        draw = batches(data, recipe)
        loss: Callable[[int], Tensor] = lambda length: next_token_loss(model, draw(length))  # noqa: E731
    else:
        loss = Distillation(model, load_folder(HERE / "target"), data, recipe)
    steps = train(
        model,
        recipe,
        loss,
        lambda: save(model, args.command, tokenizer_json),
        lambda: held_out_loss(model, data.held_out[:60_000]),
    )
    print(f"{args.command}: trained with --steps {steps}")


def evaluate(args: argparse.Namespace) -> None:
    """Measure the pair in the folders; the numbers go to `--out` and into the model card."""
    tokenizer = Tokenizer.from_file(str(HERE / "target" / "tokenizer.json"))
    data = corpus.build_corpus(corpus.read_library(), tokenizer)
    lines = (HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [tokenizer.encode(json.loads(line)["prompt"]).ids for line in lines]
    figures = evaluate_pair(load_folder(HERE / "target"), load_folder(HERE / "draft"), data.held_out, prompts)
    text = json.dumps(figures, indent=2)
    print(text)
    args.out.write_text(text + "\n", encoding="utf-8")
    write_card(HERE / "README.md", figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads (default 1)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="tokenizer, prompts and untrained folders")
    for name, minutes, rate, tokens in (("target", 50.0, 2e-3, 4096), ("draft", 22.0, 4e-3, 2048)):
        command = commands.add_parser(name, help=f"train the {name}")
        command.add_argument("--minutes", type=float, default=minutes, help=f"train this long (default {minutes:.0f})")
        command.add_argument("--steps", type=int, help="train this many steps instead")
        command.add_argument("--learning-rate", type=float, default=rate, help=f"peak (default {rate})")
        command.add_argument("--tokens-per-step", type=int, default=tokens, help=f"default {tokens}")
        command.add_argument("--seed", type=int, default=0)
    measure = commands.add_parser("evaluate", help="held-out loss and acceptance")
    measure.add_argument("--out", type=Path, default=HERE / "evaluation.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "prepare":
        prepare(corpus.read_library())
    elif args.command == "evaluate":
        evaluate(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
