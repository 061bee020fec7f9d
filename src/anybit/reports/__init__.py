"""Show finished runs: pages, terminal tables, explanations of a layer, comparisons of two runs. Imports supernets and below.

The name is plural because `anybit.report` is the function.
"""
