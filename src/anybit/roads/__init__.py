"""One file a verb, each a list of steps. Imports onnx and below."""
