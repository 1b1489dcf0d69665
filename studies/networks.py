"""Networks of the papers that the scripts do not have, each a torch.nn.Module."""

import torch
from torch import nn

from swap94 import Mul, Net


def conv_norm(channels_in, channels_out):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(conv_norm(channels, channels), conv_norm(channels, channels))

    def forward(self, x):
        return x + self.layers(x)


def make_resnet9(width=64, num_classes=10, *, seed=0, device, dtype):
    """The ResNet-9 of DAWNBench that SWAP's paper trains: (N, 3, 32, 32) -> logits (N, classes).

    By David Page, https://github.com/davidcpage/cifar10-fast. width: channels of the first layer.
    As in swap94.make_net, BatchNorm is of fp32 at least, and bfloat16 is that of torch.autocast.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = Net(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv_norm(width, 2 * width),
            nn.MaxPool2d(2),
            Residual(2 * width),
            conv_norm(2 * width, 4 * width),
            nn.MaxPool2d(2),
            conv_norm(4 * width, 8 * width),
            nn.MaxPool2d(2),
            Residual(8 * width),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Linear(8 * width, num_classes, bias=False),
            Mul(0.125),
            autocast=dtype == torch.bfloat16,
        )
    if net.autocast:
        dtype = torch.float32
    net.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.to(torch.promote_types(dtype, torch.float32))
    return net
