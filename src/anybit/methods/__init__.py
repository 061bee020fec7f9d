"""One paper per file; no method imports another. Imports allocation and below."""
