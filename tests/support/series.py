"""Metrics as they look in a cluster that has been busy for a long time."""

import itertools

from tidemill.core.metrics import Kind, Metrics, Series

VALUES = {"role": 1, "direction": 1, "slo_class": 4, "outcome": 8, "policy": 3}  # others: 4


def counted(declared: tuple[Series, ...]) -> Metrics:
    """Every series with every combination of its labels, some observations each."""
    metrics = Metrics(declared)
    for series in declared:
        for values in itertools.product(*(range(VALUES.get(label, 4)) for label in series.labels)):
            labels = {label: f"some-{label}-{value}" for label, value in zip(series.labels, values, strict=True)}
            for observation in (0.0031, 0.27, 12.0):
                if series.kind is Kind.HISTOGRAM:
                    metrics.observe(series, observation, **labels)
                else:
                    metrics.add(series, observation, **labels)
    return metrics
