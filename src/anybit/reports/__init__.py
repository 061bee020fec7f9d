"""Everything that shows a run: its page, its terminal tables, a layer explained, two runs compared. Reads finished runs and imports no road.

Named in the plural because `anybit.report` is the function.
"""
