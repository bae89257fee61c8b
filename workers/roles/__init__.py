"""What a step means for a prefill, a draft and a verify worker."""
