"""Quantization on tensors: affine arithmetic, ranges, quantizers, packed codes. Imports errors."""
