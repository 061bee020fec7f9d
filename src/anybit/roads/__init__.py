"""One file per verb, each a list of stages in order, which is why their functions are long. Imports exports and below."""
