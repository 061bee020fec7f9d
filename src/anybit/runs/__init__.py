"""The run folder: its files, written and read strictly. Imports methods and below."""
