"""Brings the parts to life on Ray and steers them; the only code that knows Ray."""
