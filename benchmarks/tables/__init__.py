"""Tables and figures of the docs, generated only from the JSON in benchmarks/results: `python -m benchmarks.tables [--check]`."""
