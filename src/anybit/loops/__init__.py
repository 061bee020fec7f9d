"""Loops that methods share: the training epochs, their checkpoints, several processes. Imports networks and below."""
