"""Files as data: written atomically, read strictly, and results cached by key. Imports errors, progress, environment, settings,
numerics."""
