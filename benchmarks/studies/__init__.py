"""Scripts that run experiments and write their measurements as JSON to benchmarks/results."""
