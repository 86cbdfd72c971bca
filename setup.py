"""Builds the package; all of its metadata is in pyproject.toml."""

from setuptools import setup

setup()
