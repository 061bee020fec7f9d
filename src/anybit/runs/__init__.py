"""The run folder: its files, written atomically and read strictly. Imports methods and below."""
