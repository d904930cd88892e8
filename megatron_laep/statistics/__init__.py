"""Counters, windows, and what is logged and recorded of them. torch; no Megatron."""
