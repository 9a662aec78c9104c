"""Models, written once in Linen, with the norm as an argument."""

import jbn.linen  # noqa: F401  # First: it names the extra if Flax is missing.
from jbn.models.dcgan import Discriminator as Discriminator, Generator as Generator
from jbn.models.mlp import MLP as MLP
from jbn.models.resnet import (
    ResNet as ResNet,
    resnet8 as resnet8,
    resnet18 as resnet18,
    resnet20 as resnet20,
    resnet50 as resnet50,
    torchvision_name as torchvision_name,
)
from jbn.models.unet import UNet as UNet
