"""Loads in, expert map out: stability, pruning, placement. Pure functions on numpy values; no torch."""
