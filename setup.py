"""For tools that look for a setup.py. Everything about the package stands in pyproject.toml."""

from setuptools import setup

if __name__ == "__main__":
    setup()
