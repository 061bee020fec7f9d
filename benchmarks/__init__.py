"""Experiments behind every number in the docs, and the tables made from what they measured; README.md lists the scripts."""
