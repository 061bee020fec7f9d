"""One paper a file; no method imports another. Imports allocation and below."""
