"""Tidemill's client library: `Client` and `AsyncClient`, what they take and what they hand out.

Importing this package needs grpcio and protobuf, nothing else: no torch, no Ray.
"""
