"""Scripts that try to break runs: kills, mutated files, other thread counts, little memory."""
