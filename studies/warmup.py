"""What warmup does, and freezing the head instead (Gotmare et al. 2019, section 4).

    python -m studies.warmup                                # 15 minutes on two CPU cores
    python -m studies.warmup --scale medium                 # an hour or two
    torchrun --nproc_per_node=8 -m studies.warmup --net resnet18 --scale paper --data cifar10
    python -m studies.warmup --show --out logs/mine         # the table and the pictures again

We train a network in small batches; and in large batches, at a learning rate that is higher by the
same factor: without warmup, with warmup (the rate rises from 0), and with the fully connected
layers frozen for as long as warmup would take. Later the rate is divided by 10 at a few places.
SVCCA (studies/similarity.py) compares each layer after the warmup with the same layer at the start,
and for the training with warmup also the end with the state after the warmup (Figures 4 and 5). In
small batches, "after the warmup" is after as many steps. We also measure how far the weights moved.
The paper: with warmup, and in small batches, the last layers stay more similar to their start than
without warmup, their weights move less, and freezing them does as well as warmup (Figure 4,
Appendix 10). It gives no figures.

--scale paper is the paper's setting, with VGG-11, 3 seeds and 4 trainings of 300 epochs: 550 PFLOP,
or 1.4 A100-hours at airbench94's rate of 0.36 PFLOP in 3.29 seconds. --scale medium trains networks
of a quarter of the widths, on half of the images. --scale small trains narrower networks on 2000
images; they learn little. Our VGG-11 has no dropout, of which the paper does not speak. ResNet-18
and ResNet-32 have projections where they halve the maps.
"""

import sys

import numpy as np
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import airbench94
from studies import sgd
from studies.common import Study, for_each_seed, in_cell, run_study, whole_seeds
from studies.networks import describe, make_network
from studies.show import COLOURS, mean_text, new_figure, paired_p, print_table, save_both
from studies.similarity import (
    compared_images,
    draw_matrices,
    layers_of,
    noise_floors,
    observe,
    similarities,
)

PAPER = {
    'images': None,  # of the training set: all
    'compared': 2000,  # test images, for SVCCA
    'share': 1.0,  # of the network's full widths
    'dropout': 0.0,
    'batch_size': 100,
    'large_batch_size': 5000,
    'lr': 0.05,
    'large_lr': 2.5,
    'warm_up': 20,  # epochs
    'drops': [60, 120, 150],  # epochs after which the rate is divided by 10
    'epochs': 300,
    'runs': 3,
}
SMALL = PAPER | {
    'images': 2000,
    'share': 0.125,
    'batch_size': 25,
    'large_batch_size': 250,
    'lr': 0.02,
    'large_lr': 0.2,
    'warm_up': 6,
    'drops': [18],
    'epochs': 24,
    'runs': 8,
}
MEDIUM = PAPER | {
    'images': 25_000,
    'share': 0.25,
    'large_batch_size': 1000,
    'lr': 0.015,
    'large_lr': 0.15,
    'warm_up': 4,
    'drops': [14, 20],
    'epochs': 24,
    'runs': 5,
}
SCALES = {'paper': PAPER, 'medium': MEDIUM, 'small': SMALL}
# The rates of ResNets are twice as high (Appendix 10).
RESNET = {}
for scale, own in SCALES.items():
    RESNET[scale] = own | {'lr': 2 * own['lr'], 'large_lr': 2 * own['large_lr']}
NETS = {'vgg11-bn': SCALES, 'vgg11': SCALES, 'resnet18': RESNET, 'resnet32': RESNET}
TRAININGS = {
    'sb': 'small batches',
    'lb': 'large batches',
    'lb-warmup': 'large, with warmup',
    'lb-frozen': 'large, head frozen',
}

#### What to train #################################################################################


def plan(settings, records):
    cells = [{'training': name} for name in TRAININGS]
    return for_each_seed(cells, settings)


def rate_share(settings, steps, has_warmup):
    """A function: the learning rate at a step, as a share of the peak. steps: in an epoch."""
    dropped = sgd.dropping([drop * steps for drop in settings['drops']], 0.1)

    def share(step):
        warm_up = min(1, (step + 1) / (settings['warm_up'] * steps)) if has_warmup else 1
        return warm_up * dropped(step)

    return share


def head_of(net):
    """The parameters of the fully connected layers."""
    layers = [module for module in layers_of(net).values() if isinstance(module, nn.Linear)]
    return [p for layer in layers for p in layer.parameters()]


def train(cell, seed, place):
    """Accuracies after each epoch, and how similar the layers are at three moments.

    Also how far the weights of each layer moved until the second moment, as a share of their norm.
    """
    settings, name = place.settings, cell['training']
    batch_size = settings['batch_size' if name == 'sb' else 'large_batch_size']
    lr = settings['lr' if name == 'sb' else 'large_lr']
    loader, tests = sgd.loaders_of(place, batch_size, seed)
    net = make_network(settings, loader, seed)
    images = compared_images(place)
    # As in the paper, we look at small batches after as many steps, not epochs.
    warm = settings['warm_up'] * (len(loader.images) // settings['large_batch_size'])
    end = settings['epochs'] * len(loader)
    accuracies, layers, weights = [], {}, {}

    def look(step):
        if step in (0, warm, end):
            layers[step] = observe(net, images)
            weights[step] = [layer.weight.detach().clone() for layer in layers_of(net).values()]
        if step == warm:
            for p in head_of(net):
                p.requires_grad = True

    def evaluate(epoch):
        accuracies.append(airbench94.evaluate(net, tests))

    look(0)
    evaluate(0)
    optimizer = sgd.make_sgd(net, lr)
    for p in head_of(net):
        p.requires_grad = name != 'lb-frozen'
    scheduler = LambdaLR(optimizer, rate_share(settings, len(loader), name == 'lb-warmup'))
    callbacks = {'on_step': look, 'on_epoch': evaluate}
    sgd.train(net, loader, optimizer, scheduler, settings['epochs'], **callbacks)
    return {
        'val_acc': accuracies,
        'is_head': [isinstance(layer, nn.Linear) for layer in layers_of(net).values()],
        'moved': [
            ((after - before).norm() / before.norm()).item()
            for before, after in zip(weights[0], weights[warm])
        ],
        'start and warm': similarities(layers[0], layers[warm]),
        'warm and end': similarities(layers[warm], layers[end]),
        'noise': {
            'start and warm': noise_floors(layers[0], layers[warm], seed),
            'warm and end': noise_floors(layers[warm], layers[end], seed),
        },
    }


#### What to show ##################################################################################


def matrices_of(records, name, when='start and warm'):
    """(similarities, noise floors), each (seeds, layers, layers)."""
    of_name = in_cell(records, training=name)
    similar = np.array([record[when] for record in of_name])
    return similar, np.array([record['noise'][when] for record in of_name])


def to_the_start(records, name):
    """How similar each layer after warmup is to its start, and the noise: both (seeds, layers)."""
    return [np.diagonal(values, axis1=1, axis2=2) for values in matrices_of(records, name)]


def moves(records, name):
    """How far each layer moved until warmup ended, in % of its weights' norm: (seeds, layers)."""
    return np.array([100 * np.array(record['moved']) for record in in_cell(records, training=name)])


def of_parts(records, values):
    """Means over the fully connected layers, and over the convolutions, of (seeds, layers)."""
    is_head = np.array(records[0]['is_head'])
    return values[:, is_head].mean(1), values[:, ~is_head].mean(1)


def accuracies_at(records, name, epoch):
    """Each seed's accuracy after an epoch, in percent."""
    return np.array([100 * record['val_acc'][epoch] for record in in_cell(records, training=name)])


def print_trainings(records, settings):
    n = len(in_cell(records, training='lb'))
    print(f'{describe(settings)}; n={n}, with 95% intervals; accuracies in %')
    titles = ['', 'after warmup', 'at the end']
    titles += ['similarity of the head to its start', 'noise', 'its weights moved, %']
    rows = []
    for name, title in TRAININGS.items():
        row = [title]
        for epoch in (settings['warm_up'], -1):
            row.append(mean_text(accuracies_at(records, name, epoch), '.2f'))
        (similar, _), (noise, _) = [of_parts(records, x) for x in to_the_start(records, name)]
        moved, _ = of_parts(records, moves(records, name))
        row += [mean_text(similar, '.3f'), f'{noise.mean():.3f}', mean_text(moved, '.0f')]
        rows.append(row)
    print_table(titles, rows)


def print_changes(records):
    """Whether the layers change less by the end of warmup, with p."""
    similar, head, convolutions = {}, {}, {}
    for name in ('sb', 'lb', 'lb-warmup'):
        similar[name], _ = of_parts(records, to_the_start(records, name)[0])
        head[name], convolutions[name] = of_parts(records, moves(records, name))
    for name in ('lb-warmup', 'sb'):
        print(f'{TRAININGS[name]}, against large batches: one-sided p that the head is')
        print(f'  more similar to its start: {paired_p(similar[name], similar["lb"]):.2g}')
        print(f'  less far from it: {paired_p(head["lb"], head[name]):.2g}')
    shares = {}
    for part, moved in (('head', head), ('convolutions', convolutions)):
        shares[part] = moved['lb-warmup'] / moved['lb']
        share = mean_text(shares[part], '.2f')
        print(f'with warmup, the weights of the {part} move {share} times as far as without')
    p = paired_p(shares['convolutions'], shares['head'])
    print(f'  warmup limits the head more: one-sided p={p:.2g}')


def print_freezing(records, settings):
    """Whether freezing the head does as well as warmup, with p."""
    for when, epoch in (('after warmup', settings['warm_up']), ('at the end', -1)):
        frozen, warm, neither = [
            accuracies_at(records, name, epoch) for name in ('lb-frozen', 'lb-warmup', 'lb')
        ]
        gain = mean_text(frozen - warm, '+.2f')
        print(f'{when}: freezing over warmup {gain} percentage points')
        print(f'  freezing better than neither: one-sided p={paired_p(frozen, neither):.2g}')
        print(f'  warmup better than neither: one-sided p={paired_p(warm, neither):.2g}')


def draw_trainings(records, warm_up, stem):
    """Figure 4: accuracies; how similar each layer is to its start; and how far its weights are."""
    figure = new_figure(14, 4)
    left, middle, right = figure.subplots(1, 3)
    for (name, title), colour in zip(TRAININGS.items(), COLOURS):
        accuracies = np.array([record['val_acc'] for record in in_cell(records, training=name)])
        left.plot(100 * accuracies.mean(0), color=colour, label=title)
        similar, noise = [values.mean(0) for values in to_the_start(records, name)]
        layers = range(1, len(similar) + 1)
        middle.plot(layers, similar, 'o-', color=colour)
        middle.plot(layers, noise, ':', color=colour)
        right.plot(layers, moves(records, name).mean(0), 'o-', color=colour)
    left.axvline(warm_up, color='grey', linewidth=0.8)
    left.set(xlabel='epochs; the line is where warmup ends', ylabel='test accuracy (%)')
    middle.set(xlabel='layer', ylabel='similarity to the start,\nafter warmup', ylim=(0, 1.02))
    middle.set_title('dotted: noise')
    right.set(xlabel='layer', ylabel='weights moved by then\n(% of their norm)', ylim=(0, None))
    figure.legend(loc='outside upper center', ncols=4)
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    records = whole_seeds(records, plan(settings, []), folder, least=2)
    print_trainings(records, settings)
    print_changes(records)
    print_freezing(records, settings)
    draw_trainings(records, settings['warm_up'], folder / 'warmup')
    compared = [(name, 'start and warm') for name in ('sb', 'lb', 'lb-warmup')]
    compared.append(('lb-warmup', 'warm and end'))
    matrices = {}
    for name, when in compared:
        matrices[f'{TRAININGS[name]}:\n{when}'] = matrices_of(records, name, when)
    draw_matrices(matrices, folder / 'svcca', 'earlier network', 'later network')


STUDY = Study('warmup', __doc__, NETS, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
