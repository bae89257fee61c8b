"""Sampling with noise keyed by (seed, position): the same seed gives target and draft the same luck.

The token at a position is argmax(logits / T + Gumbel(seed, position, token)), which is a draw from softmax(logits / T)
(Gumbel 1954; Maddison et al., "A* Sampling", arXiv 1411.0030). A draft that uses the same noise proposes the target's
very token far more often than one with luck of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from llama import KeyValues, Llama
from torch import Tensor


def keyed_gumbel(seed: int, position: int, vocabulary: int) -> Tensor:
    """Gumbel noise for every token of a position, from the counter-based generator Philox: [vocabulary] float32."""
    # The position is the counter's second word: the first one counts the draws of a position.
    uniform = np.random.Generator(np.random.Philox(key=seed, counter=position << 64)).random(vocabulary)
    return torch.from_numpy(-np.log(-np.log(np.maximum(uniform, 1e-300)))).float()


def perturbed(logits: Tensor, first_position: int, temperature: float, seed: int) -> Tensor:
    """Scores [tokens, vocabulary] whose argmax is the choice; row i chooses the token at `first_position` + i."""
    if temperature == 0:
        return logits
    noise = [keyed_gumbel(seed, first_position + row, logits.shape[-1]) for row in range(len(logits))]
    return logits / temperature + torch.stack(noise)


@torch.inference_mode()
def generate(model: Llama, prompt: list[int], count: int, temperature: float, seed: int) -> list[int]:
    """`prompt` continued by `count` tokens; temperature 0 is greedy. The end-of-text token does not stop it."""
    past: KeyValues = []
    ids = list(prompt)
    logits = model(torch.tensor([ids]), past)[0, -1:]
    for _ in range(count):
        ids.append(int(perturbed(logits, len(ids), temperature, seed).argmax()))
        logits = model(torch.tensor([ids[-1:]]), past)[0, -1:]
    return ids


@torch.no_grad()
def sample_continuations(
    model: Llama, prompts: Tensor, count: int, temperature: float, random: torch.Generator
) -> Tensor:
    """Many rows [rows, tokens] of equal length at once, each continued by `count` sampled tokens."""
    past: KeyValues = []
    logits = model(prompts, past)[:, -1]
    ids = [prompts]
    for _ in range(count):
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(torch.softmax(logits.float() / temperature, -1), 1, generator=random)
        ids.append(token)
        logits = model(token, past)[:, -1]
    return torch.cat(ids, 1)
