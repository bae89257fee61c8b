"""vLLM as an engine of the prefill and verify pools: everything it loads, behind workers/engine/base.py.

    engine.py     the Engine: what comes in, a step, what goes out
    sequence.py   one request: what vLLM is asked, and what its words mean here
    start.py      settings -> a vLLM engine inside this process
    scheduler.py  vLLM's scheduler, which also takes drafts and admits loads between steps
    connector.py  vLLM's KV connector: whose blocks wait for KV, whose are kept, what goes out layer by layer
    blocks.py     blocks of vLLM's KV tensors as the links carry them
    drafts.py     why vLLM drafts nothing itself
    cpu_fix.py    the one place where vLLM is mended

What vLLM offers for this, and what it cannot promise: docs/engines.md.
"""
