"""STAND-IN, see mamba_ssm."""
