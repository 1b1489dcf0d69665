"""What warmup does, and freezing the head instead (Gotmare et al. 2019, section 4).

    python -m studies.warmup                                # 15 minutes on two CPU cores
    torchrun --nproc_per_node=8 -m studies.warmup --net resnet18 --scale paper --data cifar10
    python -m studies.warmup --show --out logs/mine         # the table and the pictures again

We train a network in small batches; and in large batches, at a learning rate that is higher by the
same factor: without warmup, with warmup (the rate rises from 0), and with the fully connected
layers frozen for as long as warmup would take. Later the rate is divided by 10 at three places.
SVCCA compares each layer after the warmup with the same layer at the start, and for the training
with warmup also the end with the state after the warmup (Figures 4 and 5). The paper: with warmup,
as in small batches, the last layers stay more similar to their start than without it, and freezing
them does as well as warmup (Figure 6, Appendix 10).

--scale paper is the paper's setting, with VGG-11, 3 seeds and 4 trainings of 300 epochs: 550 PFLOP,
or 1.4 A100-hours at airbench94's rate of 0.36 PFLOP in 3.29 seconds. --scale small trains narrow
networks on 2000 images.
"""

import sys

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

import airbench94
from lab.summary import new_figure
from studies.common import (
    COLOURS,
    Study,
    by_seed,
    mean_and_interval,
    paired_p,
    run_study,
    save_both,
    two_whole_seeds,
)
from studies.modes import dropping, loaders_of, make_network, make_sgd, train
from studies.svcca import (
    compared_images,
    draw_matrices,
    has_noise,
    layers_of,
    noise_floors,
    observe,
    similarities,
)

SCALES = {
    'paper': {
        'images': None,  # of the training set: all
        'compared': 2000,  # test images, for SVCCA
        'share': 1.0,  # of the network's full widths
        'batch_size': 100,
        'large_batch_size': 5000,
        'lr': 0.05,
        'large_lr': 2.5,
        'warm_up': 20,  # epochs
        'drops': [60, 120, 150],  # epochs after which the rate is divided by 10
        'epochs': 300,
        'runs': 3,
    },
    'small': {
        'images': 2000,
        'compared': 2000,
        'share': 0.125,
        'batch_size': 25,
        'large_batch_size': 250,
        'lr': 0.02,
        'large_lr': 0.2,
        'warm_up': 6,
        'drops': [18],
        'epochs': 24,
        'runs': 8,
    },
    'smoke': {
        'images': 100,
        'compared': 200,
        'share': 0.0625,
        'batch_size': 20,
        'large_batch_size': 50,
        'lr': 0.02,
        'large_lr': 0.05,
        'warm_up': 1,
        'drops': [2],
        'epochs': 2,
        'runs': 2,
    },
}
# The rates of ResNets are twice as high (Appendix 10).
RESNET = {}
for scale, own in SCALES.items():
    RESNET[scale] = own | {'lr': 2 * own['lr'], 'large_lr': 2 * own['large_lr']}
TRAININGS = {
    'sb': 'small batches',
    'lb': 'large batches',
    'lb-warmup': 'large, with warmup',
    'lb-frozen': 'large, head frozen',
}
COMPARED = ('sb', 'lb', 'lb-warmup')  # with their start, in the picture


#### Training ######################################################################################


def plan(settings, records):
    cells = [{'training': name} for name in TRAININGS]
    return [(cell, seed) for seed in range(settings['runs']) for cell in cells]


def rate_share(settings, steps, has_warmup):
    """A function: the learning rate at a step, as a share of the peak. steps: in an epoch."""
    dropped = dropping([drop * steps for drop in settings['drops']], 0.1)

    def share(step):
        warm_up = min(1, (step + 1) / (settings['warm_up'] * steps)) if has_warmup else 1
        return warm_up * dropped(step)

    return share


def head_of(net):
    """The parameters of the fully connected layers."""
    layers = [module for module in layers_of(net).values() if isinstance(module, torch.nn.Linear)]
    return [p for layer in layers for p in layer.parameters()]


def train_cell(cell, seed, place):
    """Accuracies after each epoch, and how similar the layers are at three moments."""
    settings, name = place.settings, cell['training']
    size = 'batch_size' if name == 'sb' else 'large_batch_size'
    lr = settings['lr'] if name == 'sb' else settings['large_lr']
    loader, tests = loaders_of(place, settings[size])
    loader.seed = seed
    net = make_network(settings['net'], loader, settings['share'], seed)
    images = compared_images(place)
    accuracies, layers = [], {}

    def look(epoch):
        accuracies.append(airbench94.evaluate(net, tests))
        if epoch in (0, settings['warm_up'], settings['epochs']):
            layers[epoch] = observe(net, images)
        if epoch == settings['warm_up']:
            for p in head_of(net):
                p.requires_grad = True

    look(0)
    optimizer = make_sgd(net, lr)
    for p in head_of(net):
        p.requires_grad = name != 'lb-frozen'
    share = rate_share(settings, len(loader), name == 'lb-warmup')
    train(net, loader, optimizer, LambdaLR(optimizer, share), settings['epochs'], on_epoch=look)
    start, warm, end = [layers[epoch] for epoch in (0, settings['warm_up'], settings['epochs'])]
    kinds = [type(layer).__name__ for layer in layers_of(net).values()]
    return {
        'val_acc': accuracies,
        'is_head': [kind == 'Linear' for kind in kinds],
        'start and warm': similarities(start, warm),
        'warm and end': similarities(warm, end),
        'noise': {
            'start and warm': noise_floors(start, warm, seed),
            'warm and end': noise_floors(warm, end, seed),
        },
    }


#### Table and pictures ############################################################################


def mean_of_head(record, matrix):
    """The mean over the head's layers of a matrix's diagonal."""
    return np.diag(matrix)[np.array(record['is_head'])].mean()


def head_similarities(records, name):
    """For each seed, how similar the head's layers are to their start, on average."""
    of_name = by_seed(records, training=name)
    return np.array([mean_of_head(record, record['start and warm']) for record in of_name])


def head_noise(records, name):
    """The noise floor of that, in the mean of the seeds."""
    of_name = by_seed(records, training=name)
    return np.mean([mean_of_head(record, record['noise']['start and warm']) for record in of_name])


def accuracies_at(records, name, epoch):
    """Each seed's accuracy after an epoch, in percent."""
    return np.array([100 * record['val_acc'][epoch] for record in by_seed(records, training=name)])


def print_table(records, warm_up):
    n = len(by_seed(records, training='lb'))
    print(f'n={n}, with 95% intervals; accuracies in %')
    print(f'{"":20} after warmup       at the end         similarity of the head to its start')
    for name, title in TRAININGS.items():
        row = f'{title:20}'
        for epoch in (warm_up, -1):
            mean, half = mean_and_interval(accuracies_at(records, name, epoch))
            row += f' {mean:6.2f} +-{half:6.2f}  '
        mean, half = mean_and_interval(head_similarities(records, name))
        row += f' {mean:6.3f} +-{half:6.3f}'
        if has_noise(records):
            row += f'   noise: {head_noise(records, name):.3f}'
        print(row)
    with_warmup, without = [head_similarities(records, name) for name in ('lb-warmup', 'lb')]
    p = paired_p(with_warmup, without)
    print(f'warmup keeps the head more similar to its start: one-sided p={p:.2g}')
    for when, epoch in (('after it', warm_up), ('at the end', -1)):
        frozen, warm, neither = [
            accuracies_at(records, name, epoch) for name in ('lb-frozen', 'lb-warmup', 'lb')
        ]
        gain, half = mean_and_interval(frozen - warm)
        print(f'{when}: freezing over warmup {gain:+.2f} +-{half:.2f} percentage points')
        print(f'  freezing better than neither: one-sided p={paired_p(frozen, neither):.2g}')
        print(f'  warmup better than neither: one-sided p={paired_p(warm, neither):.2g}')


def draw_trainings(records, warm_up, stem):
    """Figure 4: accuracies, and how similar each layer is to its start."""
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    for (name, title), colour in zip(TRAININGS.items(), COLOURS):
        accuracies = np.array([record['val_acc'] for record in by_seed(records, training=name)])
        left.plot(100 * accuracies.mean(0), color=colour, label=title)
        alike = [np.diag(record['start and warm']) for record in by_seed(records, training=name)]
        layers = range(1, len(alike[0]) + 1)
        right.plot(layers, np.mean(alike, axis=0), 'o-', color=colour)
        if has_noise(records):
            of_noise = [r['noise']['start and warm'] for r in by_seed(records, training=name)]
            right.plot(layers, np.diag(np.mean(of_noise, axis=0)), ':', color=colour)
    left.axvline(warm_up, color='grey', linewidth=0.8)
    left.set(xlabel='epochs', ylabel='test accuracy (%)')
    left.legend(frameon=False, fontsize='small')
    right.set(xlabel='layer', ylabel='similarity to its start, after warmup', ylim=(0, 1.02))
    right.set_title('dotted: noise' if has_noise(records) else '')
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    records = two_whole_seeds(records, plan(settings, []), folder)
    print_table(records, settings['warm_up'])
    draw_trainings(records, settings['warm_up'], folder / 'warmup')
    matrices, noise = {}, {}
    compared = [(f'{TRAININGS[name]}: start, warm', name, 'start and warm') for name in COMPARED]
    compared.append(('with warmup: warm, end', 'lb-warmup', 'warm and end'))
    for title, name, when in compared:
        of_seeds = by_seed(records, training=name)
        matrices[title] = np.mean([record[when] for record in of_seeds], axis=0)
        if has_noise(of_seeds):
            noise[title] = np.mean([record['noise'][when] for record in of_seeds], axis=0)
    draw_matrices(matrices, noise, folder / 'svcca')


STUDY = Study(
    'warmup',
    __doc__,
    {'vgg11-bn': SCALES, 'vgg11': SCALES, 'resnet18': RESNET, 'resnet32': RESNET},
    plan,
    train_cell,
    show,
)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
