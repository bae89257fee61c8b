"""Brings the parts to life on Ray and steers them; the only code that knows Ray."""

import os

# Ray reads the mode when it is imported, the token when it connects. A cluster of ours always asks for a token; whoever
# joins one that does not (settings: ray.address) says so with RAY_AUTH_MODE=disabled.
os.environ.setdefault("RAY_AUTH_MODE", "token")
