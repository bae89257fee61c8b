"""Pools of workers on a virtual clock, steered by the very policies that steer the cluster."""
