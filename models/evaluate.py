"""What the bundled pair can do: held-out loss, and how often the target takes what the draft proposes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import Tokens
from llama import Llama
from sampling import generate, perturbed

WINDOW = 512
CONTINUATION = 96
CHAIN = 4

Figures = dict[str, dict[str, float]]
MARKS = ("<!-- figures: written by `models/train.py evaluate` -->", "<!-- end of figures -->")


@torch.inference_mode()
def held_out_loss(model: Llama, held_out: Tokens) -> float:
    """Mean cross-entropy in nats per token, over consecutive windows that each start with the end-of-text token."""
    starts = range(0, held_out.size - WINDOW, WINDOW)
    rows = np.stack([np.concatenate([np.zeros(1, np.int64), held_out[at : at + WINDOW]]) for at in starts])
    total = 0.0
    for batch in torch.split(torch.from_numpy(rows), 8):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
        total += F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()).item() * len(batch)
    return total / len(rows)


@torch.inference_mode()
def acceptance(target: Llama, draft: Llama, prompts: Sequence[list[int]], temperature: float) -> dict[str, float]:
    """Over the target's own continuations of the prompts, with noise shared between the two models:

    first_choice: share of positions where the draft's choice is the target's token;
    among_three: share where the target's token is among the draft's first three;
    tokens_per_round: tokens a verify step yields with a chain of `CHAIN` drafts (1 without any).
    """
    first = among = positions = rounds = tokens = 0
    for seed, prompt in enumerate(prompts):
        ids = generate(target, prompt, CONTINUATION, temperature, seed)
        scores = perturbed(draft(torch.tensor([ids[:-1]]))[0], 1, temperature, seed)[len(prompt) - 1 :]
        best = scores.topk(3, -1).indices
        hits = best == torch.tensor(ids[len(prompt) :])[:, None]
        first += int(hits[:, 0].sum())
        among += int(hits.any(-1).sum())
        positions += len(hits)
        done = 0
        while done < len(hits):  # a chain's later tokens are drafted after accepted ones, so these hits are theirs too
            run = 0
            while run < CHAIN and done + run < len(hits) and hits[done + run, 0]:
                run += 1
            done += run + 1
            tokens += run + 1
            rounds += 1
    return {
        "first_choice": round(first / positions, 4),
        "among_three": round(among / positions, 4),
        "tokens_per_round": round(tokens / rounds, 3),
    }


def evaluate_pair(target: Llama, draft: Llama, held_out: Tokens, prompts: Sequence[list[int]]) -> Figures:
    """All figures of the model card."""
    return {
        "held_out_loss": {
            "target": round(held_out_loss(target, held_out), 4),
            "draft": round(held_out_loss(draft, held_out), 4),
        },
        "parameters": {"target": target.parameter_count(), "draft": draft.parameter_count()},
        "acceptance_greedy": acceptance(target, draft, prompts, 0.0),
        "acceptance_temperature_1": acceptance(target, draft, prompts, 1.0),
    }


def figures_table(figures: Figures) -> str:
    """The figures as the model card shows them."""
    greedy, sampled = figures["acceptance_greedy"], figures["acceptance_temperature_1"]
    lines = ["| | Target | Draft |", "|---|---|---|"]
    lines.append("| Parameters | {target:,} | {draft:,} |".format(**figures["parameters"]))
    lines.append("| Held-out loss, nats per token | {target:.3f} | {draft:.3f} |".format(**figures["held_out_loss"]))
    lines += ["", "| Acceptance of the draft | Greedy | Temperature 1 |", "|---|---|---|"]
    rows = {
        "first_choice": "First choice is the target's token",
        "among_three": "Target's token is among its first three",
    }
    for key, label in rows.items():
        lines.append(f"| {label} | {greedy[key]:.1%} | {sampled[key]:.1%} |")
    key = "tokens_per_round"
    lines.append(f"| Tokens a round with a chain of {CHAIN} | {greedy[key]:.2f} | {sampled[key]:.2f} |")
    return "\n".join(lines)


def write_card(card: Path, figures: Figures) -> None:
    """Put the table between the two marks of the model card."""
    before, rest = card.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    card.write_text(f"{before}{MARKS[0]}\n{figures_table(figures)}\n{MARKS[1]}{after}", encoding="utf-8")
