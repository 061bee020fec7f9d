"""Public networks of torchvision, timm and transformers with random weights, each from `inspect` to a verified file."""
