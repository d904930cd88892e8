"""All that knows Megatron-Core: layers, checkpoints, arguments, rebuild. Besides it only loop and cpu import Megatron."""
