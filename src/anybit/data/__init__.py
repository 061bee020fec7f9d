"""Samples, batches, tasks and texts. Imports files and below."""
