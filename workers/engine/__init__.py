"""Engines behind one Protocol (base.py)."""
