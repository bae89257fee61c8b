"""The code that touches accelerators: engines, KV hand-over, speculation, and the worker around them."""
