"""Which layer gets how many bits: sensitivity, the integer program, the choice. Imports loops and below."""
