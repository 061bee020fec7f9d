"""Loops that methods share: training epochs, checkpoints, several processes. Imports networks and below."""
