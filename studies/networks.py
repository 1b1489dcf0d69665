"""The papers' networks that the recipes don't have, each a torch.nn.Module."""

import torch
import torchvision.models.resnet
import torchvision.models.vgg
from torch import nn

import airbench94
from lab.options import override
from swap94 import Mul, Net


def conv_norm(channels_in, channels_out):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """Two conv layers whose result is added to their input."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(conv_norm(channels, channels), conv_norm(channels, channels))

    def forward(self, x):
        return x + self.layers(x)


def make_resnet9(width=64, num_classes=10, *, seed=0, device, dtype):
    """DAWNBench's ResNet-9, as in SWAP's paper: (N, 3, 32, 32) -> logits (N, num_classes).

    By David Page, https://github.com/davidcpage/cifar10-fast. `width` is the first layer's number
    of channels. As in swap94.make_net, BatchNorm is at least fp32, and bfloat16 means
    torch.autocast.
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


#### For training with plain SGD ###################################################################

NETS = ('vgg16-bn', 'vgg16', 'airbench')  # that most studies of heuristics offer with --net


def make_network(settings, loader, seed, variance=2.0):
    """An untrained network for a loader's images.

    Args:
        settings: a study's, with 'net', as for `--net`; 'share', of the network's full widths; and
            'dropout' of VGG, as for make_vgg.
        variance: of the initial weights; see `finish`.
    """
    name, share, classes = settings['net'], settings['share'], loader.num_classes
    options = {'share': share, 'seed': seed, 'device': loader.device, 'dtype': loader.dtype}
    if name == 'airbench':
        net = make_airbench(classes, **options)
        images = loader.normalize(loader.images[:5000])
        airbench94.init_whitening_conv(net[0], images, airbench94.hyp['net']['whiten_eps'])
        return net
    options['variance'] = variance
    if name.startswith('resnet'):
        return make_resnet(int(name.removeprefix('resnet')), classes, **options)
    depth, _, norm = name.removeprefix('vgg').partition('-')
    options |= {'batchnorm': norm == 'bn', 'dropout': settings['dropout']}
    return make_vgg(int(depth), classes, **options)


def describe(settings):
    """What make_network makes, for the tables. The oldest records are without dropout."""
    if settings.get('files'):
        return 'given networks'
    about = f'{settings["net"]} with {settings["share"]:g} of its widths'
    if settings['net'].startswith('vgg'):
        about += f' and dropout {settings.get("dropout", 0):g}'
    return about


def make_airbench(num_classes, *, share, seed, device, dtype):
    """airbench94's network. Its first layer still needs whitening."""
    widths = airbench94.hyp['net']['widths']
    own = [f'net.widths.{name}={max(1, round(share * w))}' for name, w in widths.items()]
    hyp = override(airbench94.hyp, own)
    compute_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    return airbench94.make_net(hyp, num_classes, seed=seed, device=device, dtype=compute_dtype)


VGG_LAYERS = {11: torchvision.models.vgg.cfgs['A'], 16: torchvision.models.vgg.cfgs['D']}
RESNET_BLOCKS = {18: ((64, 128, 256, 512), 2), 32: ((16, 32, 64), 5)}  # (channels, blocks of each)


def finish(layers, variance, device, dtype):
    """A network with these layers, in channels_last, with new weights.

    The weights are normally distributed, with `variance` divided by the number of inputs, and the
    biases are 0 (Gotmare et al. 2019, section 7.1). They are fp32; if `dtype` is smaller, the
    network uses torch.autocast.
    """
    net = Net(*layers, autocast=dtype != torch.float32)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            inputs = module.weight[0].numel()
            nn.init.normal_(module.weight, std=(variance / inputs) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net.to(device=device, memory_format=torch.channels_last)


def make_vgg(
    depth,
    num_classes=10,
    *,
    batchnorm=False,
    dropout=0.0,
    share=1.0,
    variance=2.0,
    seed,
    device,
    dtype,
):
    """VGG-11 or VGG-16 for 32 x 32 images: (N, 3, 32, 32) -> logits (N, num_classes).

    It has torchvision's convolutions, and then three linear layers with at most 512 units.

    Args:
        dropout: the share of inputs that we drop before the first two linear layers: 0.5 in
            VGG-16 of Garipov et al.'s code, whose layers are those in Gotmare et al.'s Figure 14.
        share: of all channels and units.
    """
    widths = [w if w == 'M' else round(share * w) for w in VGG_LAYERS[depth]]
    units = round(share * 512)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = [torchvision.models.vgg.make_layers(widths, batchnorm), nn.Flatten()]
        for _ in range(2):
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            layers += [nn.Linear(units, units), nn.ReLU()]
        layers.append(nn.Linear(units, num_classes))
        return finish(layers, variance, device, dtype)


def make_resnet(depth, num_classes=10, *, share=1.0, variance=2.0, seed, device, dtype):
    """ResNet-18 or ResNet-32 for 32 x 32 images, with torchvision's blocks.

    Where a block halves the maps, a 1 x 1 convolution projects its shortcut. So ResNet-32 has
    466,906 parameters; with He et al.'s option A, which pads with zeros, it would have 464,154.
    """
    channels, blocks = RESNET_BLOCKS[depth]
    widths = [round(share * width) for width in channels]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        before = widths[0]
        layers = [nn.Conv2d(3, before, 3, padding=1, bias=False), nn.BatchNorm2d(before), nn.ReLU()]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(residual_block(before, width, stride))
                before = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)]
        return finish(layers, variance, device, dtype)


def residual_block(before, width, stride):
    shortcut = None
    if stride > 1:
        # A 1 x 1 convolution with stride and few channels, in channels_last, corrupts memory on a
        # CPU (torch 2.14.1). So a 1 x 1 pool leaves the pixels out.
        shortcut = nn.Sequential(
            nn.AvgPool2d(1, stride), nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        )
    return torchvision.models.resnet.BasicBlock(before, width, stride, shortcut)


def make_student(num_classes=10, *, share=1.0, variance=2.0, seed, device, dtype):
    """Section 5's shallow network: twice (convolution, pool, ReLU), then three linear layers."""
    widths = [round(share * width) for width in (32, 64, 256, 128)]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = [
            nn.Conv2d(3, widths[0], 5, padding=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(widths[0], widths[1], 5, padding=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * widths[1], widths[2]),
            nn.ReLU(),
            nn.Linear(widths[2], widths[3]),
            nn.Linear(widths[3], num_classes),
        ]
        return finish(layers, variance, device, dtype)
