"""Finished runs shown: pages, terminal tables, one layer explained, two runs compared. Imports supernets and below.

Named in the plural because `anybit.report` is the function.
"""
