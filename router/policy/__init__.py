"""Admission, split and placement: pure functions from a snapshot to a decision with its reason."""
