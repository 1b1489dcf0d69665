"""How alike the layers of two networks are: SVCCA (Gotmare et al. 2019, section 2.2).

    python -m studies.svcca                                 # in a few minutes, on two CPU cores
    python -m studies.svcca A.pt B.pt --out logs/alike      # any two that --save has written
    python -m studies.svcca --show --out logs/alike         # the table and the pictures again

Singular vector canonical correlation analysis (Raghu et al. 2017, arXiv:1706.05806) takes what the
layers of two networks answer to the same test images; of each layer those principal directions that
have 99% of the variance; and then the pairs of directions, one in each, that correlate most. The
mean of the correlations is 1 if each layer is a linear image of the other. A convolution's maps are
first transformed by Fourier, and compared frequency by frequency, of which the mean is taken. Where
two layers' maps have different sizes, the lowest frequencies are compared that both have: with a
layer of the head, which has no places, the mean of the map.

Two networks are trained from different initial weights, for several pairs of seeds. Compared are
both after training, and one with itself before it. --scale paper is VGG-16 of full width on all
images, 100 epochs each: 28 PFLOP a seed, or 4 A100-minutes at airbench94's rate of 0.36 PFLOP in
3.29 seconds. --scale small trains narrow networks on a twentieth of the images.
"""

import itertools
import sys

import numpy as np
import torch
from torch import nn

from studies.common import (
    Study,
    UserError,
    in_cell,
    load_network,
    mean_and_interval,
    new_figure,
    run_study,
    save_both,
)
from studies.modes import (
    MOMENTUM,
    WEIGHT_DECAY,
    load_parameters,
    loaders_of,
    make_network,
    parameters_of,
    step_decay,
    train,
)

SCALES = {
    'paper': {
        'images': None,  # of the training set: all
        'compared': 2000,  # test images
        'share': 1.0,  # of the network's widths
        'epochs': 100,
        'batch_size': 100,
        'lr': 0.05,
        'runs': 3,
    },
    'small': {
        'images': 2500,
        'compared': 1000,
        'share': 0.125,
        'epochs': 20,
        'batch_size': 50,
        'lr': 0.02,
        'runs': 3,
    },
    'smoke': {
        'images': 100,
        'compared': 100,
        'share': 0.0625,
        'epochs': 1,
        'batch_size': 20,
        'lr': 0.02,
        'runs': 2,
    },
}
GIVEN = ('A', 'B')

#### Estimates #####################################################################################


def principal(x, variance):
    """An orthonormal basis (n, k) of the directions of x, (n, features), that have so much of it.

    x may be complex. Its columns are centred first.
    """
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    explained = (s**2).cumsum(0) / (s**2).sum()
    return u[:, : int((explained < variance).sum()) + 1]


def correlations(x, y, variance=0.99):
    """The canonical correlations of x and y, (n, features) each, of so much of their variance.

    As the bases are orthonormal, they are the singular values of the bases' product.
    """
    return torch.linalg.svdvals(principal(x, variance).mH @ principal(y, variance)).clamp(max=1)


def lowest_frequencies(maps, size):
    """(frequencies, n, channels), complex: the lowest size * size ones of maps (n, channels, H, W).

    Those of maps of different sizes are in the same order. Real maps have a frequency and its
    negative conjugated, of which one is kept.
    """
    spectrum = torch.fft.fft2(maps)
    kept = []
    for a, b in itertools.product(range(size), repeat=2):
        negative = (-a % size, -b % size)
        if (a, b) <= negative:
            signed = [k if k <= size // 2 else k - size for k in (a, b)]
            kept.append(spectrum[:, :, *signed])
    return torch.stack(kept)


def similarity(x, y, variance=0.99):
    """Mean canonical correlation of two layers' outputs to the same n images.

    x, y: (n, features), or (n, channels, H, W) of a convolution; square maps.
    """
    if x.ndim == 2 and y.ndim == 2:
        return correlations(x.double(), y.double(), variance).mean().item()
    maps = [layer[..., None, None] if layer.ndim == 2 else layer for layer in (x, y)]
    size = min(layer.shape[-1] for layer in maps)
    pairs = zip(*(lowest_frequencies(layer.double(), size) for layer in maps))
    return float(np.mean([correlations(a, b, variance).mean().item() for a, b in pairs]))


def layers_of(net):
    """{name: module} of its convolutions and linear layers, in order."""
    kinds = (nn.Conv2d, nn.Linear)
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


@torch.no_grad()
def outputs_of(net, images):
    """{layer: its outputs, on the CPU}, in evaluation mode. images: a batch."""
    outputs = {}

    def keep(name):
        def hook(module, inputs, output):
            outputs[name] = output.float().cpu()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in layers_of(net).items()]
    net.eval()
    net(images)
    for hook in hooks:
        hook.remove()
    return outputs


def similarities(first, second):
    """A matrix: of each layer of the one with each of the other; {name: outputs} both."""
    return [[similarity(x, y) for y in second.values()] for x in first.values()]
