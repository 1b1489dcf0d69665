"""What warmup does, and freezing the head instead (Gotmare et al. 2019, section 4).

    python -m studies.warmup                                # 15 minutes on two CPU cores
    torchrun --nproc_per_node=8 -m studies.warmup --net resnet18 --scale paper --data cifar10
    python -m studies.warmup --show --out logs/mine         # the table and the pictures again

We train a network in small batches; and in large batches, at a learning rate that is higher by the
same factor: without warmup, with warmup (the rate rises from 0), and with the fully connected
layers frozen for as long as warmup would take. Later the rate is divided by 10 at three places.
SVCCA (studies/similarity.py) compares each layer after the warmup with the same layer at the start,
and for the training with warmup also the end with the state after the warmup (Figures 4 and 5). The
paper: with warmup, as in small batches, the last layers stay more similar to their start than
without it, and freezing them does as well as warmup (Figure 4, Appendix 10). It gives no figures.

--scale paper is the paper's setting, with VGG-11, 3 seeds and 4 trainings of 300 epochs: 550 PFLOP,
or 1.4 A100-hours at airbench94's rate of 0.36 PFLOP in 3.29 seconds. --scale small trains narrow
networks on 2000 images. Our VGG-11 has no dropout, of which the paper does not speak. ResNet-18 and
ResNet-32 have projections where they halve the maps.
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
SCALES = {'paper': PAPER, 'small': SMALL}
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
    """Accuracies after each epoch, and how similar the layers are at three moments."""
    settings, name = place.settings, cell['training']
    batch_size = settings['batch_size' if name == 'sb' else 'large_batch_size']
    lr = settings['lr' if name == 'sb' else 'large_lr']
    loader, tests = sgd.loaders_of(place, batch_size, seed)
    net = make_network(settings, loader, seed)
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
    optimizer = sgd.make_sgd(net, lr)
    for p in head_of(net):
        p.requires_grad = name != 'lb-frozen'
    scheduler = LambdaLR(optimizer, rate_share(settings, len(loader), name == 'lb-warmup'))
    sgd.train(net, loader, optimizer, scheduler, settings['epochs'], on_epoch=look)
    start, warm, end = [layers[epoch] for epoch in (0, settings['warm_up'], settings['epochs'])]
    return {
        'val_acc': accuracies,
        'is_head': [isinstance(layer, nn.Linear) for layer in layers_of(net).values()],
        'start and warm': similarities(start, warm),
        'warm and end': similarities(warm, end),
        'noise': {
            'start and warm': noise_floors(start, warm, seed),
            'warm and end': noise_floors(warm, end, seed),
        },
    }


#### What to show ##################################################################################


def matrices_of(records, name, when='start and warm'):
    """(similarities, noise floors), each (seeds, layers, layers). In old records noise is NaN."""
    of_name = in_cell(records, training=name)
    similar = np.array([record[when] for record in of_name])
    unknown = {when: np.full_like(similar[0], np.nan)}
    return similar, np.array([record.get('noise', unknown)[when] for record in of_name])


def to_the_start(records, name):
    """How similar each layer after warmup is to its start, and the noise: both (seeds, layers)."""
    return [np.diagonal(values, axis1=1, axis2=2) for values in matrices_of(records, name)]


def head_similarities(records, name):
    """(similarity of the head's layers to their start, noise), each in the mean of the layers."""
    is_head = np.array(in_cell(records, training=name)[0]['is_head'])
    return [of_layers[:, is_head].mean(1) for of_layers in to_the_start(records, name)]


def accuracies_at(records, name, epoch):
    """Each seed's accuracy after an epoch, in percent."""
    return np.array([100 * record['val_acc'][epoch] for record in in_cell(records, training=name)])


def print_trainings(records, settings):
    n = len(in_cell(records, training='lb'))
    print(f'{describe(settings)}; n={n}, with 95% intervals; accuracies in %')
    titles = ['', 'after warmup', 'at the end', 'similarity of the head to its start', 'noise']
    rows = []
    for name, title in TRAININGS.items():
        row = [title]
        for epoch in (settings['warm_up'], -1):
            row.append(mean_text(accuracies_at(records, name, epoch), '.2f'))
        similar, noise = head_similarities(records, name)
        rows.append([*row, mean_text(similar, '.3f'), mean_text([noise.mean()], '.3f')])
    print_table(titles, rows)
    (with_warmup, _), (without, _) = [head_similarities(records, n) for n in ('lb-warmup', 'lb')]
    p = paired_p(with_warmup, without)
    print(f'warmup keeps the head more similar to its start: one-sided p={p:.2g}')
    for when, epoch in (('after it', settings['warm_up']), ('at the end', -1)):
        frozen, warm, neither = [
            accuracies_at(records, name, epoch) for name in ('lb-frozen', 'lb-warmup', 'lb')
        ]
        gain = mean_text(frozen - warm, '+.2f')
        print(f'{when}: freezing over warmup {gain} percentage points')
        print(f'  freezing better than neither: one-sided p={paired_p(frozen, neither):.2g}')
        print(f'  warmup better than neither: one-sided p={paired_p(warm, neither):.2g}')


def draw_trainings(records, warm_up, stem):
    """Figure 4: accuracies, and how similar each layer is to its start."""
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    for (name, title), colour in zip(TRAININGS.items(), COLOURS):
        accuracies = np.array([record['val_acc'] for record in in_cell(records, training=name)])
        left.plot(100 * accuracies.mean(0), color=colour, label=title)
        similar, noise = [values.mean(0) for values in to_the_start(records, name)]
        layers = range(1, len(similar) + 1)
        right.plot(layers, similar, 'o-', color=colour)
        right.plot(layers, noise, ':', color=colour)
    left.axvline(warm_up, color='grey', linewidth=0.8)
    left.set(xlabel='epochs; the line is where warmup ends', ylabel='test accuracy (%)')
    right.set(xlabel='layer', ylabel='similarity to the start,\nafter warmup', ylim=(0, 1.02))
    if np.isfinite(noise).all():
        right.set_title('dotted: noise')
    figure.legend(loc='outside upper center', ncols=4, fontsize='small')
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    records = whole_seeds(records, plan(settings, []), folder, least=2)
    print_trainings(records, settings)
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
