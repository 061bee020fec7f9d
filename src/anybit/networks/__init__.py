"""One observed network: its layers, wiring, folding, candidates and costs. Imports data and below."""
