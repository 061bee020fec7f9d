"""Show runs: pages, terminal tables, a layer explained, two runs compared. May import what reads finished runs, and no road.

Named in the plural because `anybit.report` is the function.
"""
