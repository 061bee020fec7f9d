"""From a run folder to a file that runs, and what that takes. Imports onnx, runs and below.

Named in the plural because `anybit.export` is the function.
"""
