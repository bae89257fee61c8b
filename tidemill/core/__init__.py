"""The words that router, workers and cluster share; nothing here does I/O of its own."""
