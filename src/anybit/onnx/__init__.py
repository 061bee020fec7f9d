"""The exported form: an ONNX file as small as its bits that runs on integer kernels, and the proof that it computes what was evaluated.

Imports reports and below.
"""

from importlib import import_module

from anybit.errors import MissingPackage

for _package in ("onnx", "onnx_ir", "onnxruntime", "onnxscript"):  # the last is what torch.onnx.export writes with
    try:
        import_module(_package)
    except ImportError as error:
        raise MissingPackage(f"Exported files need {_package}, which does not import: run `pip install 'anybit[onnx]'`.") from error
