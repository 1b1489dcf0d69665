"""How alike the layers of two networks are: SVCCA (Gotmare et al. 2019, section 2.2).

    python -m studies.svcca                                 # in five minutes, on two CPU cores
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
3.29 seconds. --scale small trains narrow networks on 1000 images.
"""

import itertools
import math
import sys

import numpy as np
import torch
from torch import nn

from studies.common import Study, load_network, mean_and_interval, new_figure, run_study, save_both
from studies.modes import loaders_of, make_network, train_by_steps

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
        'images': 1000,
        'compared': 2000,
        'share': 0.125,
        'epochs': 40,
        'batch_size': 25,
        'lr': 0.01,
        'runs': 4,
    },
    'smoke': {
        'images': 100,
        'compared': 40,
        'share': 0.0625,
        'epochs': 1,
        'batch_size': 20,
        'lr': 0.02,
        'runs': 2,
    },
}
GIVEN = ('A', 'B')

#### Estimates #####################################################################################


def principal(x, variance=0.99):
    """Orthonormal directions of x, (..., n, features), that have so much of its variance.

    x may be complex; its columns are centred first. Returns (directions (..., n, k), of which those
    after the last one that is needed are 0; how many are needed (...)).
    """
    u, s, _ = torch.linalg.svd(x - x.mean(-2, keepdim=True), full_matrices=False)
    before = (s**2).cumsum(-1) - s**2
    is_needed = before < variance * (s**2).sum(-1, keepdim=True)
    return u * is_needed[..., None, :], is_needed.sum(-1)


def correlations(x, y):
    """The canonical correlations of what `principal` returns, (..., k): largest first, then 0.

    As the directions are orthonormal, they are the singular values of the directions' product.
    """
    (x, _), (y, _) = x, y
    return torch.linalg.svdvals(x.mH @ y).clamp(max=1)


def frequencies(size):
    """Rows and columns of the Fourier transform of real maps of size * size that are independent.

    A frequency's negative is its conjugate, so that one of them is left out. Those of smaller maps
    are among those of larger ones.
    """
    found = []
    for a, b in itertools.product(range(size), repeat=2):
        if (a, b) <= (-a % size, -b % size):
            found.append(tuple(k if k <= size // 2 else k - size for k in (a, b)))
    return found


class Layer:
    """A layer's outputs to n images, as the principal directions of each of its frequencies.

    outputs: (n, channels, size, size), or (n, features), whose one frequency is the mean.
    """

    def __init__(self, outputs):
        maps = outputs.double() if outputs.ndim == 4 else outputs.double()[..., None, None]
        self.size = maps.shape[-1]
        self.places = {place: i for i, place in enumerate(frequencies(self.size))}
        spectrum = torch.fft.fft2(maps)
        self.directions, self.needed = principal(
            torch.stack([spectrum[:, :, row, column] for row, column in self.places])
        )

    def at(self, places):
        """(directions, how many are needed) of some of the frequencies."""
        chosen = [self.places[place] for place in places]
        return self.directions[chosen], self.needed[chosen]


def similarity(first, second):
    """The mean canonical correlation of two Layers, over directions and common frequencies.

    A frequency at which a layer answers all images alike has none, and counts as 0.
    """
    places = frequencies(min(first.size, second.size))
    x, y = first.at(places), second.at(places)
    count = torch.minimum(x[1], y[1]).clamp(min=1)
    return (correlations(x, y).sum(-1) / count).mean().item()


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
    rows, columns = [[Layer(outputs) for outputs in net.values()] for net in (first, second)]
    return [[similarity(x, y) for y in columns] for x in rows]


#### Training ######################################################################################


def plan(settings, records):
    """A pair of networks a seed, or the one that is given."""
    seeds = range(1 if settings['files'] else settings['runs'])
    return [({'part': 'pair'}, seed) for seed in seeds]


def train_network(seed, place, images):
    """The layers' outputs to some images: (before training, after it)."""
    settings = place.settings
    loader, _ = loaders_of(place, settings['batch_size'])
    loader.seed = seed
    net = make_network(settings['net'], loader, settings['share'], seed)
    before = outputs_of(net, images)
    train_by_steps(net, loader, settings['lr'], settings['epochs'])
    return before, outputs_of(net, images)


def compared_images(place):
    """The first test images, normalized, as a batch."""
    loader = place.test_loader
    images = loader.normalize(loader.images[: place.settings['compared']])
    return images.contiguous(memory_format=torch.channels_last)


def compare(cell, seed, place):
    """Similarities of the layers of two networks, and of one with itself before training."""
    images = compared_images(place)
    files = place.settings['files']
    if files:
        nets = [load_network(file, place.test_loader)[0] for file in files]
        first, second = [outputs_of(net, images) for net in nets]
        found = {'two networks': similarities(first, second)}
    else:
        at_start, first = train_network(2 * seed, place, images)
        _, second = train_network(2 * seed + 1, place, images)
        found = {
            'two networks': similarities(first, second),
            'before and after': similarities(at_start, first),
        }
    return {'layers': [list(first), list(second)], 'similarities': found}


#### Table and picture #############################################################################


def mean_matrices(records):
    """{what is compared: (seeds, layers, layers)}."""
    kinds = records[0]['similarities']
    return {kind: np.array([record['similarities'][kind] for record in records]) for kind in kinds}


def print_table(matrices):
    for kind, of_seeds in matrices.items():
        print(f'similarity of the same layer, {kind}, n={len(of_seeds)}, with its 95% interval:')
        for i in range(min(of_seeds.shape[1:])):
            mean, half = mean_and_interval(of_seeds[:, i, i])
            print(f'  layer {i + 1:2}: {mean:6.3f} +-{half:5.3f}')


def draw_matrices(matrices, stem, networks=('first', 'second')):
    """A heat map of each {title: matrix} of similarities, of layers of the two networks."""
    columns = min(2, len(matrices))
    rows = math.ceil(len(matrices) / columns)
    first, second = np.shape(next(iter(matrices.values())))
    figure = new_figure(4 * columns + 1, (3 * first / second + 0.8) * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, matrix) in zip(grid.flat, matrices.items()):
        image = axes.imshow(matrix, vmin=0, vmax=1, origin='lower', cmap='viridis')
        axes.set(title=title)
        axes.set_ylabel(f'layer of the {networks[0]}')
        axes.set_xlabel(f'layer of the {networks[1]}')
        axes.set_xticks(range(0, second, 2), range(1, second + 1, 2))
        axes.set_yticks(range(0, first, 2), range(1, first + 1, 2))
    figure.colorbar(image, ax=grid, label='similarity')
    save_both(figure, stem)


def show(config, records, folder):
    matrices = mean_matrices(records)
    print_table(matrices)
    means = {kind: of_seeds.mean(0) for kind, of_seeds in matrices.items()}
    draw_matrices(means, folder / 'svcca')


STUDY = Study(
    'svcca',
    __doc__,
    {net: SCALES for net in ('vgg16-bn', 'vgg16', 'airbench')},
    plan,
    compare,
    show,
    files=GIVEN,
)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
