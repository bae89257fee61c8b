"""Drafts without a draft model: from what a request, or its tenant, has said before."""
