"""One file a verb, each a list of steps. Imports exports and below."""
