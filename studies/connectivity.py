"""Curves of low loss between differently trained networks (Gotmare et al. 2019, section 2.1).

    python -m studies.connectivity                              # half an hour on two CPU cores
    torchrun --nproc_per_node=8 -m studies.connectivity --scale paper --data cifar10
    python -m studies.connectivity A.pt B.pt --out logs/curve   # two networks that --save wrote
    python -m studies.connectivity --show --out logs/curve      # the table and the pictures again

A mode is a trained network. We train mode G with SGD, step decay, weight decay and augmentation.
The other modes each differ from it in one thing (MODES). Between G and each of them, we train a
polygonal chain with one bend and a quadratic Bezier curve for the smallest expected loss
(studies/curves.py), and measure them at some of the epochs. At epoch 0 they are the segment. A
barrier is the largest loss on the curve minus the larger one at its ends. Without BatchNorm (--net
vgg16) there is no mode E: from such weights, training diverges in its first steps.

--scale paper is the paper's setting: 200 epochs a mode and 80 a curve, 2400 epochs a seed. With
VGG-16 a seed costs 230 PFLOP, or 35 A100-minutes at airbench94's rate of 0.36 PFLOP in 3.29
seconds. Its VGG-16 has dropout, as in the code that the paper took over. --scale small trains
narrow networks without dropout on 1000 images. The paper shows curves, without figures.
"""

import sys

import numpy as np
import torch
from sklearn.manifold import TSNE
from torch.optim.lr_scheduler import LambdaLR

from lab.errors import UserError
from studies import curves, sgd
from studies.common import (
    Stage,
    Study,
    check_complete,
    for_each_seed,
    in_cell,
    in_stages,
    run_study,
)
from studies.networks import NETS, make_network
from studies.show import COLOURS, mean_text, new_figure, paired_p, print_table, save_both

PAPER = {
    'images': None,  # of the training set: all
    'share': 1.0,  # of the network's full widths
    'dropout': 0.5,
    'epochs': 200,  # of a mode
    'batch_size': 100,
    'large_batch_size': 4000,
    'lr': 0.05,
    'lr_adam': 1e-3,
    'curve_epochs': [0, 20, 40, 60, 80],  # after which we measure a curve
    'points': 21,  # of a curve
    'runs': 3,
}
SMALL = PAPER | {
    'images': 1000,
    'share': 0.125,
    'dropout': 0.0,
    'epochs': 40,
    'batch_size': 25,
    'large_batch_size': 100,
    'lr': 0.01,
    'curve_epochs': [0, 10, 30],
    'points': 9,
}
SCALES = {'paper': PAPER, 'small': SMALL}
MODES = {
    'G': {},
    'A': {'large_batches': True},
    'B': {'adam': True},
    'C': {'linear_decay': True},
    'D': {'weight_decay': 5e-6},  # a hundredth
    'E': {'variance': 6.0},  # of the initial weights: three times as much
    'F': {'augmented': False},
}
GIVEN = ('A', 'B')

#### What to train #################################################################################


def modes_of(settings):
    """The names of the networks. Curves join the first one with each of the others."""
    if settings['files']:
        return list(GIVEN)
    return [mode for mode in MODES if not (mode == 'E' and settings['net'] == 'vgg16')]


def pairs_of(settings):
    first, *others = modes_of(settings)
    return [first + other for other in others]


def mode_jobs(settings):
    cells = [{'part': 'mode', 'mode': mode} for mode in modes_of(settings)]
    return for_each_seed(cells, settings)


def curve_jobs(settings):
    pairs = pairs_of(settings)
    cells = [
        {'part': 'curve', 'pair': pair, 'kind': kind} for pair in pairs for kind in curves.KINDS
    ]
    return for_each_seed(cells, settings)


def distance_jobs(settings):
    return for_each_seed([{'part': 'distances'}], settings)


def make_mode(cell, seed, place):
    """Train a mode, or load a given one. Returns its losses and accuracies."""
    mode, settings = cell['mode'], place.settings
    if settings['files']:
        net = place.load_network(settings['files'][GIVEN.index(mode)])
    else:
        net = train_mode(mode, seed, place)
    weights = curves.parameters_of(net)
    place.save_weights(mode, seed, weights)
    return curves.measure(net, weights, *sgd.loaders_of(place, settings['batch_size']))


def train_mode(mode, seed, place):
    """A network, trained as MODES says."""
    own, settings = MODES[mode], place.settings
    batch_size = settings['large_batch_size' if own.get('large_batches') else 'batch_size']
    own_seed = 100 * seed + list(MODES).index(mode)  # each starts from other weights
    loader, _ = sgd.loaders_of(place, batch_size, own_seed, augmented=own.get('augmented', True))
    net = make_network(settings, loader, own_seed, own.get('variance', 2.0))
    weight_decay = own.get('weight_decay', sgd.WEIGHT_DECAY)
    optimizer = sgd.make_sgd(net, settings['lr'], weight_decay)
    if own.get('adam'):
        trained = optimizer.param_groups[0]['params']
        optimizer = torch.optim.Adam(trained, settings['lr_adam'], weight_decay=weight_decay)
    share = sgd.step_decay(len(loader), settings['epochs'])
    if own.get('linear_decay'):
        share = sgd.linear_decay(settings['epochs'] * len(loader))
    sgd.train(net, loader, optimizer, LambdaLR(optimizer, share), settings['epochs'])
    return net


def make_curve(cell, seed, place):
    """Train a curve between two modes, and measure it after some of the epochs."""
    settings, pair = place.settings, cell['pair']
    loader, tests = sgd.loaders_of(place, settings['batch_size'], seed)
    if settings['files']:
        net = place.load_network(settings['files'][0])
    else:
        net = make_network(settings, loader, seed)
    first, last = [place.load_weights(mode, seed) for mode in pair]
    if {n: p.shape for n, p in first.items()} != {n: p.shape for n, p in last.items()}:
        raise UserError('the two networks are of different kinds; choose others')
    curve = curves.new_curve(first, last, net, cell['kind'])
    measured = []

    def look(epoch):
        if epoch in settings['curve_epochs']:
            points = settings['points']
            measured.append(curves.measure_curve(curve, net, (loader, tests), points))

    look(0)
    epochs = max(settings['curve_epochs'])
    curves.train_curve(curve, net, loader, settings['lr'], epochs, look)
    place.save_weights(f'{pair}-{cell["kind"]}', seed, curve.bend)
    return {'epochs': settings['curve_epochs'], 'curves': measured}


def measure_distances(cell, seed, place):
    """The Euclidean distances between all modes and bends."""
    names = modes_of(place.settings)
    names += [f'{pair}-{kind}' for pair in pairs_of(place.settings) for kind in curves.KINDS]
    vectors = [curves.vector_of(place.load_weights(name, seed)) for name in names]
    stacked = torch.stack(vectors)
    return {'names': names, 'distances': torch.cdist(stacked, stacked).tolist()}


plan, train = in_stages(
    Stage(mode_jobs, make_mode),
    Stage(curve_jobs, make_curve),
    Stage(distance_jobs, measure_distances),
)

#### What to show ##################################################################################

KEYS = {'train_loss': 'training loss', 'val_acc': 'test error'}


def barriers_of(records, key, at, **cell):
    """The barriers of some curves, by seed, at the place `at` in their lists of epochs."""
    found = [record['curves'][at] for record in in_cell(records, part='curve', **cell)]
    return np.array([curves.barrier(curves.values_of(points, key)) for points in found])


def mean_barriers(records, key, at, kind):
    """The mean barrier of each seed's curves."""
    seeds = sorted({record['seed'] for record in records})
    of_seeds = [[record for record in records if record['seed'] == seed] for seed in seeds]
    return np.array([barriers_of(mine, key, at, kind=kind).mean() for mine in of_seeds])


def print_barriers(records, settings):
    curves.print_about(settings)
    print('barrier of training loss, and of test error in percentage points, with 95% intervals')
    titles = ['curve', 'n', 'loss: segment', 'loss: curve', 'error: segment', 'error: curve']
    rows = []
    for pair in pairs_of(settings):
        for kind in curves.KINDS:
            row = [f'{pair}, {kind}', str(len(in_cell(records, pair=pair, kind=kind)))]
            for key in KEYS:
                for at in (0, -1):
                    barriers = barriers_of(records, key, at, pair=pair, kind=kind)
                    row.append(mean_text(barriers, '.3f'))
            rows.append(row)
    print_table(titles, rows)
    for kind in curves.KINDS:
        for key, what in KEYS.items():
            segment, curve = [barriers_of(records, key, at, kind=kind) for at in (0, -1)]
            lower = (curve < segment).sum()
            print(f'{kind}: the barrier of {what} is lower on {lower} of {len(curve)} curves')
            segment, curve = [mean_barriers(records, key, at, kind) for at in (0, -1)]
            p = paired_p(segment, curve)
            print(f'  lower in the mean of the pairs, n={len(segment)}: one-sided p={p:.2g}')


def draw_curves(records, settings, stem):
    """Figure 1, for seed 0: the test error along each chain, at several epochs of its training."""
    pairs, t = pairs_of(settings), np.linspace(0, 1, settings['points'])
    columns, rows = min(3, len(pairs)), -(-len(pairs) // 3)
    figure = new_figure(3 * columns + 1, 2.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, pair in zip(grid.flat, pairs):
        record = in_cell(records, part='curve', pair=pair, kind='chain')[0]
        for epoch, points, colour in zip(record['epochs'], record['curves'], COLOURS):
            label = f'epoch {epoch}' if epoch else 'segment'
            axes.plot(t, curves.values_of(points, 'val_acc'), color=colour, label=label)
        axes.set(title=f'{pair[0]} to {pair[1]}', xticks=[0, 0.5, 1])
    figure.supxlabel('place t on the chain')
    figure.supylabel('test error (%)')
    figure.legend(*axes.get_legend_handles_labels(), loc='outside upper center', ncols=5)
    save_both(figure, stem)


def draw_map(record, stem):
    """Figure 10: modes and bends in t-SNE, which keeps neighbours together, but not distances."""
    names, distances = record['names'], np.array(record['distances'])
    options = {'metric': 'precomputed', 'init': 'random', 'perplexity': 4, 'random_state': 0}
    places = dict(zip(names, TSNE(**options).fit_transform(distances)))
    modes = [name for name in names if '-' not in name]
    figure = new_figure(6, 5)
    axes = figure.subplots()
    axes.plot(*np.transpose([places[mode] for mode in modes]), 'o', color='black', label='modes')
    for kind, marker, colour in zip(curves.KINDS, 'sD', COLOURS):
        bends = [places[name] for name in names if name.endswith(kind)]
        axes.plot(*np.transpose(bends), marker, color=colour, label=f'bends: {kind}')
    for name, place in places.items():
        text = name.partition('-')[0]
        axes.annotate(text, place, xytext=(5, 4), textcoords='offset points')
    axes.set(xticks=[], yticks=[], xlabel='t-SNE, no unit', ylabel='t-SNE, no unit')
    figure.legend(loc='outside upper center', ncols=3)
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    check_complete(records, plan(settings, records), folder)
    print_barriers(records, settings)
    draw_curves(records, settings, folder / 'curves')
    if not settings['files']:
        draw_map(in_cell(records, part='distances')[0], folder / 'map')


STUDY = Study('connectivity', __doc__, dict.fromkeys(NETS, SCALES), plan, train, show, files=GIVEN)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
