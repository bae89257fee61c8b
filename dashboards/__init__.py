"""Grafana dashboards and Prometheus rules, generated from the declarations in tidemill/core/metrics.py."""
