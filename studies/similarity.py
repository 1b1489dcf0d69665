"""How similar the layers of two networks are: SVCCA (Raghu et al. 2017, arXiv:1706.05806).

Singular vector canonical correlation analysis looks at the outputs of both networks' layers for the
same test images. For each layer it finds the principal directions with 99% of the variance, and
then the pairs of directions, one from each layer, that correlate most. The mean of these
correlations is 1 if the layers are linear images of each other. We Fourier-transform the maps of a
convolution, compare them frequency by frequency, and take the mean. If two layers' maps have
different sizes, we compare the lowest frequencies, which both have. A linear layer has no maps, so
we compare it with the means of the other layer's maps.

Even noise is a little similar to a layer, and more so the fewer images there are: 0.15 with 2000
images and 64 directions, 0.43 with 512 directions. So next to each similarity we give its noise
floor, which is the similarity with Gaussian noise in place of the second layer, with as many
directions. It is the mean of two draws; with 2000 images and at least three directions, that is
within 0.01 of the mean of many. If a layer has more than one direction for two images, we refuse.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lab.errors import UserError
from studies.show import new_figure, save_both

IMAGES_PER_DIRECTION = 2  # at least: with fewer images, even noise is similar to noise
DRAWS = 2  # of noise
ROUNDING = 1e-10  # of a layer's norm: what varies less is not a direction

#### Layers ########################################################################################


def first_columns(x, count):
    """x, (..., n, k), with 0 in all columns but the first `count`, (...)."""
    is_kept = torch.arange(x.shape[-1]) < count[..., None]
    return x * is_kept[..., None, :]


def principal(x, variance=0.99):
    """Orthonormal directions of x, (..., n, features), that hold this share of its variance.

    x may be complex; its columns are centred first. What is left of a constant column is rounding,
    and no direction. Returns (directions (..., n, k), how many of them it takes (...)). The further
    directions are 0.
    """
    u, s, _ = torch.linalg.svd(x - x.mean(-2, keepdim=True), full_matrices=False)
    s = torch.where(s > ROUNDING * torch.linalg.vector_norm(x), s, 0.0)
    before = (s**2).cumsum(-1) - s**2
    needed = (before < variance * (s**2).sum(-1, keepdim=True)).sum(-1)
    return first_columns(u, needed), needed


def correlations(x, y):
    """The canonical correlations of two results of `principal`, (..., k): largest first, then 0.

    Since the directions are orthonormal, these are the singular values of their product.
    """
    (x, _), (y, _) = x, y
    return torch.linalg.svdvals(x.mH @ y).clamp(max=1)


def frequencies(size):
    """The independent (row, column) places in the Fourier transform of real size x size maps.

    The negative of a frequency holds its conjugate, so we leave one of the two out. Small maps'
    places are also places of larger maps.
    """
    found = []
    for a, b in itertools.product(range(size), repeat=2):
        if (a, b) <= (-a % size, -b % size):
            found.append(tuple(k if k <= size // 2 else k - size for k in (a, b)))
    return found


def spectrum_of(outputs):
    """The Fourier transform of a layer's outputs for n images, (frequencies, n, features).

    Args:
        outputs: (n, channels, size, size); or (n, features), which have only the frequency 0.
    """
    maps = outputs.double() if outputs.ndim == 4 else outputs.double()[..., None, None]
    spectrum = torch.fft.fft2(maps)
    places = frequencies(maps.shape[-1])
    return torch.stack([spectrum[:, :, row, column] for row, column in places])


@dataclass
class Layer:
    """The principal directions of a layer's outputs for n images, at each frequency of its maps."""

    size: int  # of the maps
    directions: torch.Tensor  # (frequencies, n, k)
    needed: torch.Tensor  # how many of them it takes, (frequencies,)

    def at(self, places):
        """(directions, how many it takes) of some of the frequencies."""
        of_place = {place: i for i, place in enumerate(frequencies(self.size))}
        chosen = [of_place[place] for place in places]
        return self.directions[chosen], self.needed[chosen]


def layer_of(outputs, name='a layer'):
    """The Layer with these outputs, which are as for spectrum_of.

    Raises UserError if there are too few images to tell similar layers from others.
    """
    n, size = len(outputs), outputs.shape[-1] if outputs.ndim == 4 else 1
    layer = Layer(size, *principal(spectrum_of(outputs)))
    directions = max(1, layer.needed.max().item())
    if n < IMAGES_PER_DIRECTION * directions:
        found = f'{name} has {directions} directions, and there are {n} test images'
        way_out = 'take a larger --scale, or a set with more test images'
        raise UserError(f'{found}, too few for SVCCA: {way_out}')
    return layer


def noise_like(layer, generator):
    """A Layer of Gaussian noise of the same shape, with as many directions at each frequency."""
    _, n, k = layer.directions.shape
    shape = n, k, layer.size, layer.size
    x = spectrum_of(torch.randn(shape, generator=generator, dtype=torch.float64))
    directions, _ = torch.linalg.qr(x - x.mean(-2, keepdim=True))
    return Layer(layer.size, first_columns(directions, layer.needed), layer.needed)


def similarity(first, second):
    """The mean canonical correlation of two Layers, over directions and common frequencies.

    If a layer has the same output for all images at a frequency, that frequency counts as 0.
    """
    places = frequencies(min(first.size, second.size))
    x, y = first.at(places), second.at(places)
    count = torch.minimum(x[1], y[1]).clamp(min=1)
    return (correlations(x, y).sum(-1) / count).mean().item()


def compared_images(place):
    """The first test images, normalized, as a batch."""
    loader = place.test_loader
    images = loader.normalize(loader.images[: place.settings['compared']])
    return images.contiguous(memory_format=torch.channels_last)


def layers_of(net):
    """{name: module} of a network's convolutions and linear layers, in order."""
    kinds = (nn.Conv2d, nn.Linear)
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


@torch.no_grad()
def observe(net, images):
    """{name: Layer} of a network's convolutions and linear layers, for a batch of images.

    The network stays in evaluation mode afterwards.
    """
    layers = {}

    def keep(number, name):
        def hook(module, inputs, output):
            # At once, because a ReLU may overwrite the output.
            layers[name] = layer_of(output.float().cpu(), f'layer {number} ({name})')

        return hook

    modules = layers_of(net).items()
    hooks = [
        module.register_forward_hook(keep(number, name))
        for number, (name, module) in enumerate(modules, 1)
    ]
    net.eval()
    net(images)
    for hook in hooks:
        hook.remove()
    return layers


def similarities(first, second):
    """A matrix: each layer of one network against each of another. Both are {name: Layer}."""
    return [[similarity(x, y) for y in second.values()] for x in first.values()]


def noise_floors(first, second, seed):
    """The same for the layers of one network, and noise like each layer of the other one."""
    generator = torch.Generator().manual_seed(seed)
    floors = np.zeros((len(first), len(second)))
    for _ in range(DRAWS):
        for column, layer in enumerate(second.values()):
            noise = noise_like(layer, generator)
            floors[:, column] += [similarity(x, noise) for x in first.values()]
    return (floors / DRAWS).tolist()


#### Picture #######################################################################################


def draw_matrices(matrices, stem, first='first network', second='second network'):
    """A heat map for each {title: (similarities, noise floors)} of two networks' layers.

    Both are (seeds, layers of the first, layers of the second), and the picture has their means
    over the seeds. A noise floor is a dot on its square; there is none where it is NaN.
    """
    columns = min(2, len(matrices))
    rows = math.ceil(len(matrices) / columns)
    values, _ = next(iter(matrices.values()))
    _, height, width = np.shape(values)
    figure = new_figure(4 * columns + 1, (3.2 * height / width + 1.2) * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    colours = {'vmin': 0, 'vmax': 1, 'cmap': 'viridis'}
    for axes, (title, (values, noise)) in zip(grid.flat, matrices.items()):
        image = axes.imshow(np.mean(values, axis=0), origin='lower', **colours)
        row, column = np.indices((height, width))
        axes.scatter(column, row, 16, np.mean(noise, axis=0), edgecolors='none', **colours)
        axes.set(title=title, xlabel=f'layer of the {second}', ylabel=f'layer of the {first}')
        axes.set_xticks(range(0, width, 2), range(1, width + 1, 2))
        axes.set_yticks(range(0, height, 2), range(1, height + 1, 2))
    label = 'similarity' if np.isnan(noise).all() else 'similarity\n(dots: noise)'
    figure.colorbar(image, ax=grid, label=label)
    save_both(figure, stem)
