"""Models to train: small ones for the embedded data, ResNets for ImageNet, and anyone's by name."""
