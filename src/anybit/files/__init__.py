"""Files as data: written whole, read strictly, and results cached by key. Imports errors, progress, environment, settings and numerics."""
