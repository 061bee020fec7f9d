"""Scripts that run experiments and write what they measure as JSON to benchmarks/results."""
