"""Experiments behind every number in the docs, and the tables generated from their results; README.md lists the scripts."""
