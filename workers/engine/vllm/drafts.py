"""Drafts come from the draft pool, never from vLLM itself."""

from typing import Any


class NoProposer:
    """What vLLM's model runner asks for drafts after each step (speculative method `custom_class`)."""

    def __init__(self, vllm_config: Any) -> None:
        """vLLM decides the argument."""

    def load_model(self, target_model: Any) -> None:
        """Nothing to load."""

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """None for any of them."""
        return [[] for _ in sampled_token_ids]
