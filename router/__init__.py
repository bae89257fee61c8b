"""The front door: takes requests over gRPC and leads each through the pools. Runs without Ray."""
