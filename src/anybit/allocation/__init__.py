"""The bits of each layer: sensitivity, the integer program, the choice. Imports loops and below."""
