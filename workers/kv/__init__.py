"""KV blocks that change hands: leases and the links that carry them."""
