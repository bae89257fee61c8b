"""Drafts for vLLM, which verifies chains: they come from the draft pool, never from vLLM itself."""

from typing import Any

from tidemill.core.tree import ROOT, TokenTree


def best_chain(tree: TokenTree, longest: int) -> list[int]:
    """Tokens along the tree's likeliest path, at most `longest`: from each node on to the child with the best chance.

    Where chances are not known the first child counts, which is the one the draft worker thought likeliest.
    """
    best: dict[int, int] = {}
    for node, parent in enumerate(tree.parents):
        rival = best.get(parent)
        if rival is None or (tree.chances and tree.chances[node] > tree.chances[rival]):
            best[parent] = node
    chain: list[int] = []
    node = ROOT
    while node in best and len(chain) < longest:
        node = best[node]
        chain.append(tree.tokens[node])
    return chain


class NoProposer:
    """What vLLM's model runner asks for drafts after each step (speculative method `custom_class`)."""

    def __init__(self, vllm_config: Any) -> None:
        """vLLM decides the argument."""

    def load_model(self, target_model: Any) -> None:
        """Nothing to load."""

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """None for any of them."""
        return [[] for _ in sampled_token_ids]
