"""Networks and data from their references. Imports networks and below."""
