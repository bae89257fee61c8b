"""Drafts: what they look like, who makes them, how they travel to the verify worker."""
