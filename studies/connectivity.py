"""Curves of low loss between differently trained networks (Gotmare et al. 2019, section 2.1).

    python -m studies.connectivity                              # half an hour on two CPU cores
    torchrun --nproc_per_node=8 -m studies.connectivity --scale paper --data cifar10
    python -m studies.connectivity A.pt B.pt --out logs/curve   # two networks that --save wrote
    python -m studies.connectivity --show --out logs/curve      # the table and the pictures again

A mode is a trained network. We train mode G with SGD, step decay, weight decay and augmentation.
The other modes each differ from it in one thing:

    A  large batches                D  a hundredth of the weight decay
    B  Adam                         E  three times the variance of the initial weights
    C  a linearly decaying rate     F  no augmentation

Between G and each of them, we train a polygonal chain with one bend and a quadratic Bezier curve
for the smallest expected loss (Garipov et al. 2018, arXiv:1802.10026), and measure them at some of
the epochs. At epoch 0 they are the segment. A barrier is the largest loss on the curve minus the
larger one at its ends. Without BatchNorm (--net vgg16) there is no mode E: from such weights,
training diverges in its first steps.

--scale paper is the paper's setting: 200 epochs a mode and 80 a curve, 2400 epochs a seed. With
VGG-16 a seed costs 230 PFLOP, or 35 A100-minutes at airbench94's rate of 0.36 PFLOP in 3.29
seconds. --scale small trains narrow networks on 1000 images.
"""

import sys

import numpy as np
import torch
from sklearn.manifold import TSNE
from torch.optim.lr_scheduler import LambdaLR

from lab.errors import UserError
from lab.summary import new_figure
from studies.common import (
    COLOURS,
    Study,
    in_cell,
    mean_and_interval,
    paired_p,
    run_study,
    save_both,
)
from studies.modes import (
    KINDS,
    NETS,
    WEIGHT_DECAY,
    barrier,
    linear_decay,
    loaders_of,
    make_network,
    make_sgd,
    measure,
    measure_curve,
    new_curve,
    parameters_of,
    read_weights,
    save_weights,
    step_decay,
    train,
    train_curve,
    values_of,
    vector_of,
)

SCALES = {
    'paper': {
        'images': None,  # of the training set: all
        'share': 1.0,  # of the network's full widths
        'epochs': 200,  # of a mode
        'batch_size': 100,
        'large_batch_size': 4000,
        'lr': 0.05,
        'lr_adam': 1e-3,
        'curve_epochs': [0, 20, 40, 60, 80],
        'points': 21,
        'runs': 3,
    },
    'small': {
        'images': 1000,
        'share': 0.125,
        'epochs': 40,
        'batch_size': 25,
        'large_batch_size': 100,
        'lr': 0.01,
        'lr_adam': 1e-3,
        'curve_epochs': [0, 10, 30],
        'points': 9,
        'runs': 3,
    },
    'smoke': {
        'images': 100,
        'share': 0.0625,
        'epochs': 1,
        'batch_size': 20,
        'large_batch_size': 50,
        'lr': 0.02,
        'lr_adam': 1e-3,
        'curve_epochs': [0, 1],
        'points': 3,
        'runs': 1,
    },
}
MODES = {
    'G': {},
    'A': {'large_batches': True},
    'B': {'adam': True},
    'C': {'linear_decay': True},
    'D': {'weight_decay': 5e-6},
    'E': {'variance': 6.0},
    'F': {'augmented': False},
}
GIVEN = ('A', 'B')

#### Training ######################################################################################


def modes_of(settings):
    """The names of the networks. Curves join the first one with each of the others."""
    if settings['files']:
        return list(GIVEN)
    return [mode for mode in MODES if not (mode == 'E' and settings['net'] == 'vgg16')]


def pairs_of(settings):
    first, *others = modes_of(settings)
    return [first + other for other in others]


def plan(settings, records):
    """For each seed: the modes, the curves between trained modes, and then all distances."""
    jobs = []
    pairs = pairs_of(settings)
    curves = [{'part': 'curve', 'pair': pair, 'kind': kind} for pair in pairs for kind in KINDS]
    for seed in range(1 if settings['files'] else settings['runs']):
        mine = [record for record in records if record['seed'] == seed]
        jobs.extend(({'part': 'mode', 'mode': mode}, seed) for mode in modes_of(settings))
        there = {record['cell']['mode'] for record in in_cell(mine, part='mode')}
        jobs.extend((cell, seed) for cell in curves if set(cell['pair']) <= there)
        if len(in_cell(mine, part='curve')) == len(curves):
            jobs.append(({'part': 'distances'}, seed))
    return jobs


def train_mode(mode, seed, place):
    """A network, trained as one of MODES says."""
    own, settings = MODES[mode], place.settings
    batch_size = settings['large_batch_size' if own.get('large_batches') else 'batch_size']
    loader, _ = loaders_of(place, batch_size, own.get('augmented', True))
    loader.seed = 100 * seed + list(MODES).index(mode)  # each starts from other weights
    variance = own.get('variance', 2.0)
    net = make_network(settings['net'], loader, settings['share'], loader.seed, variance)
    weight_decay = own.get('weight_decay', WEIGHT_DECAY)
    optimizer = make_sgd(net, settings['lr'], weight_decay)
    if own.get('adam'):
        trained = optimizer.param_groups[0]['params']
        optimizer = torch.optim.Adam(trained, settings['lr_adam'], weight_decay=weight_decay)
    share = step_decay(len(loader), settings['epochs'])
    if own.get('linear_decay'):
        share = linear_decay(settings['epochs'] * len(loader))
    train(net, loader, optimizer, LambdaLR(optimizer, share), settings['epochs'])
    return net


def make_mode(mode, seed, place):
    """Train a mode, or load a given one; save and measure it."""
    files = place.settings['files']
    loaders = loaders_of(place, place.settings['batch_size'])
    if files:
        net = place.load_network(files[GIVEN.index(mode)])
    else:
        net = train_mode(mode, seed, place)
    weights = parameters_of(net)
    save_weights(place, mode, seed, weights)
    return measure(net, weights, *loaders)


def make_curve(pair, kind, seed, place):
    """Train a curve between two modes, and measure it after some of the epochs."""
    settings = place.settings
    loader, tests = loaders_of(place, settings['batch_size'])
    loader.seed = seed
    if settings['files']:
        net = place.load_network(settings['files'][0])
    else:
        net = make_network(settings['net'], loader, settings['share'], seed)
    first, last = [read_weights(place, mode, seed) for mode in pair]
    if {n: p.shape for n, p in first.items()} != {n: p.shape for n, p in last.items()}:
        raise UserError('the two networks are of different kinds; choose others')
    curve = new_curve(first, last, net, kind)
    measured = []

    def look(epoch):
        if epoch in settings['curve_epochs']:
            measured.append(measure_curve(curve, net, (loader, tests), settings['points']))

    look(0)
    epochs = max(settings['curve_epochs'])
    train_curve(curve, net, loader, settings['lr'], epochs, seed, look)
    save_weights(place, f'{pair}-{kind}', seed, curve.bend)
    return {'epochs': settings['curve_epochs'], 'curves': measured}


def measure_distances(seed, place):
    """The Euclidean distances between all modes and bends."""
    names = modes_of(place.settings)
    names += [f'{pair}-{kind}' for pair in pairs_of(place.settings) for kind in KINDS]
    vectors = torch.stack([vector_of(read_weights(place, name, seed)) for name in names])
    return {'names': names, 'distances': torch.cdist(vectors, vectors).tolist()}


def train_part(cell, seed, place):
    """What we measure for a mode or a curve, or all distances."""
    if cell['part'] == 'mode':
        return make_mode(cell['mode'], seed, place)
    if cell['part'] == 'curve':
        return make_curve(cell['pair'], cell['kind'], seed, place)
    return measure_distances(seed, place)


#### Table and pictures ############################################################################


def barriers_of(records, key, at, **settings):
    """The barrier of each curve, at the place `at` in its list of epochs."""
    found = []
    for record in in_cell(records, part='curve', **settings):
        found.append(barrier(values_of(record['curves'][at], key)))
    return np.array(found)


def mean_barriers(records, key, at, kind):
    """The mean barrier of each seed's curves."""
    of_kind = in_cell(records, part='curve', kind=kind)
    means = []
    for seed in sorted({record['seed'] for record in of_kind}):
        mine = [record for record in of_kind if record['seed'] == seed]
        means.append(barriers_of(mine, key, at).mean())
    return np.array(means)


def print_table(records, pairs):
    print('barrier of training loss, and of test error in percentage points, with 95% intervals')
    print('pair  kind       n  loss: segment           curve    error: segment           curve')
    for pair in pairs:
        for kind in KINDS:
            row = f'{pair:5} {kind:8}'
            row += f'{len(in_cell(records, pair=pair, kind=kind)):4}'
            for key in ('train_loss', 'val_acc'):
                for at in (0, -1):
                    mean, half = mean_and_interval(
                        barriers_of(records, key, at, pair=pair, kind=kind)
                    )
                    row += f' {mean:8.3f} +-{half:5.3f}'
            print(row)
    for kind in KINDS:
        for key, what in (('train_loss', 'training loss'), ('val_acc', 'test error')):
            segment, curve = [barriers_of(records, key, at, kind=kind) for at in (0, -1)]
            lower = (curve < segment).sum()
            print(f'{kind}: the barrier of {what} is lower on {lower} of {len(curve)} curves')
            segment, curve = [mean_barriers(records, key, at, kind) for at in (0, -1)]
            p = paired_p(segment, curve)
            print(f'  lower in the mean of the pairs, n={len(segment)}: one-sided p={p:.2g}')


def draw_curves(records, pairs, points, stem):
    """Figure 1: the test error along each chain, at several epochs of its training."""
    figure = new_figure(9, 2.6 * -(-len(pairs) // 3))
    grid = figure.subplots(-(-len(pairs) // 3), min(3, len(pairs)), squeeze=False, sharey=True)
    for axes, pair in zip(grid.flat, pairs):
        record = in_cell(records, part='curve', pair=pair, kind='chain')[0]
        for epoch, curve, colour in zip(record['epochs'], record['curves'], COLOURS):
            label = f'epoch {epoch}' if epoch else 'segment'
            t = np.linspace(0, 1, points)
            axes.plot(t, values_of(curve, 'val_acc'), color=colour, label=label)
        axes.set_title(f'{pair[0]} to {pair[1]}')
    for axes in grid[-1]:
        axes.set_xlabel('t')
    for row in grid:
        row[0].set_ylabel('test error (%)')
    grid[0, 0].legend(frameon=False, fontsize='small')
    save_both(figure, stem)


def draw_map(record, stem):
    """Figure 10: modes and bends in t-SNE, which keeps neighbours together, but not distances."""
    names, distances = record['names'], np.array(record['distances'])
    options = {'metric': 'precomputed', 'init': 'random', 'perplexity': 4, 'random_state': 0}
    places = TSNE(**options).fit_transform(distances)
    figure = new_figure(6, 5)
    axes = figure.subplots()
    for name, (x, y) in zip(names, places):
        is_mode = '-' not in name
        axes.plot(x, y, 'o' if is_mode else '.', color=COLOURS[0 if is_mode else 1])
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords='offset points', fontsize='small')
    axes.set(xticks=[], yticks=[], title='t-SNE of modes and bends')
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    pairs = pairs_of(settings)
    curves = in_cell(records, part='curve')
    pairs = [pair for pair in pairs if in_cell(curves, pair=pair, kind='chain')]
    if not pairs:
        raise UserError(f'{folder}: has no curve yet; the same command again goes on')
    print_table(records, pairs)
    draw_curves(records, pairs, settings['points'], folder / 'curves')
    distances = in_cell(records, part='distances')
    if distances and not settings['files']:
        draw_map(distances[0], folder / 'map')


STUDY = Study(
    'connectivity', __doc__, dict.fromkeys(NETS, SCALES), plan, train_part, show, files=GIVEN
)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
