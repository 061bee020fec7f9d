"""From a run folder to a file that a runtime executes. Imports onnx, runs and below.

The name is plural because `anybit.export` is the function.
"""
