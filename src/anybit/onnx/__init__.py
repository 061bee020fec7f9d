"""The exported form: an ONNX file as small as its bits that runs on integer kernels, and the check that it computes what was evaluated.

Imports reports and below.
"""

from importlib import import_module

from anybit.errors import MissingPackage

for _package in ("onnx", "onnx_ir", "onnxruntime", "onnxscript"):  # torch.onnx.export needs the last
    try:
        import_module(_package)
    except ImportError as error:
        raise MissingPackage(f"Exported files need {_package}, which cannot be imported: run `pip install 'anybit[onnx]'`.") from error
