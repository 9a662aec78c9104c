"""Models, written once in Linen, with the norm as an argument."""

from jbn.models.mlp import MLP as MLP
from jbn.models.resnet import (
    ResNet as ResNet,
    resnet18 as resnet18,
    resnet50 as resnet50,
    torchvision_name as torchvision_name,
)
