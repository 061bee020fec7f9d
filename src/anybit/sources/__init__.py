"""References to networks and data, followed. Imports networks and below."""
