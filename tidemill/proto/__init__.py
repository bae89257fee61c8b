"""The public protocol, `inference.proto`, and its generated code."""
