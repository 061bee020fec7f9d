"""Tables and figures of the docs, made from the JSON in benchmarks/results alone: `python -m benchmarks.tables [--check]`."""
