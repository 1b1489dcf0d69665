"""What restarts of the learning rate do to the trajectory (Gotmare et al. 2019, section 3).

    python -m studies.restarts                              # 20 minutes on two CPU cores
    torchrun --nproc_per_node=8 -m studies.restarts --scale paper --net vgg16 --data cifar10
    python -m studies.restarts --show --out logs/mine       # the table and the pictures again

We train a network with SGDR, whose cosines restart after 10, 30, 70 and 150 epochs, and with step
decay from the same initial weights. w70 is the network after 70 epochs of SGDR. Between networks
from just before the restarts, and between networks from before and after the steps, we measure the
loss on the segment and on a trained chain (Figure 2; studies/curves.py). We also measure it on the
plane through w70, w150 and the bend of their chain, onto which we project the networks on SGDR's
way (Figure 3). A barrier is the largest training loss on a segment minus the larger one at its
ends. SVCCA (studies/similarity.py) compares the layers of an early and a late network, and of one
before and one after a restart (Appendix 9).

--scale paper is the paper's setting, with --net vgg16, which has dropout and no BatchNorm: 320
epochs of training and 480 of curves a seed, 230 PFLOP for 3 seeds, or 35 A100-minutes at
airbench94's rate of 0.36 PFLOP in 3.29 seconds. --scale small trains narrow networks for as many
epochs on a hundredth of the images, without augmentation and dropout: the networks have to fit the
images, or there is no barrier between them. Without BatchNorm, such networks do not learn at its
learning rate. The paper shows pictures, without figures.
"""

import sys

import numpy as np
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR

import airbench94
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
from studies.plane import Plane, draw_plane
from studies.show import COLOURS, mean_text, new_figure, paired_p, print_table, save_both
from studies.similarity import compared_images, draw_matrices, noise_floors, observe, similarities

PAPER = {
    'images': None,  # of the training set: all
    'augmented': True,
    'compared': 2000,  # test images, for SVCCA
    'share': 1.0,  # of the network's full widths
    'dropout': 0.5,
    'batch_size': 100,
    'lr': 0.05,
    'first_period': 10,  # epochs until the first restart; each next one takes twice as many
    'drops': [60, 150],  # epochs after which step decay divides the rate by 5
    'pairs': {  # epochs of the networks that we join; the second pair of SGDR is on the plane
        'sgdr': [[30, 70], [70, 150], [30, 150]],
        'steps': [[55, 65], [145, 165], [55, 165]],
    },
    'alike': [[10, 150], [150, 155]],  # epochs of SGDR that SVCCA compares
    'iterates_every': 10,  # epochs
    'curve_epochs': 80,
    'points': 21,  # of a curve
    'grid': 21,
    'runs': 3,
}
SMALL = PAPER | {
    'images': 500,
    'augmented': False,
    'compared': 1000,
    'share': 0.125,
    'dropout': 0.0,
    'batch_size': 25,
    'curve_epochs': 40,
    'points': 9,
    'grid': 9,
    'runs': 6,
}
SCALES = {'paper': PAPER, 'small': SMALL}
SCHEDULES = {'sgdr': 'SGDR', 'steps': 'step decay'}

#### What to train #################################################################################


def training_jobs(settings):
    cells = [{'part': 'training', 'schedule': schedule} for schedule in SCHEDULES]
    return for_each_seed(cells, settings)


def curve_jobs(settings):
    cells = []
    for schedule in SCHEDULES:
        for first, last in settings['pairs'][schedule]:
            cells.append({'part': 'curve', 'schedule': schedule, 'first': first, 'last': last})
    return for_each_seed(cells, settings)


def alike_jobs(settings):
    cells = [{'part': 'alike', 'first': first, 'last': last} for first, last in settings['alike']]
    return for_each_seed(cells, settings)


def plane_jobs(settings):
    """The plane of seed 0: where SGDR's way is, and the points of a grid."""
    places = range(settings['grid'])
    cells = [{'part': 'path'}, *({'part': 'plane', 'x': x, 'y': y} for x in places for y in places)]
    return [(cell, 0) for cell in cells]


def kept_epochs(settings, schedule):
    """The epochs after which we keep the network."""
    pairs = list(settings['pairs'][schedule])
    if schedule == 'sgdr':
        pairs += settings['alike']
    epochs = {epoch for pair in pairs for epoch in pair}
    return sorted(epochs | set(range(0, max(epochs) + 1, settings['iterates_every'])))


def make_scheduler(schedule, optimizer, settings, steps):
    """The learning rate's schedule: 'sgdr' or 'steps'. steps: in an epoch."""
    if schedule == 'sgdr':
        period = settings['first_period'] * steps
        return CosineAnnealingWarmRestarts(optimizer, period, T_mult=2, eta_min=1e-6)
    return LambdaLR(optimizer, sgd.dropping([drop * steps for drop in settings['drops']]))


def start(seed, place):
    """(loaders of training and test images, an untrained network)."""
    settings = place.settings
    loaders = sgd.loaders_of(place, settings['batch_size'], seed, augmented=settings['augmented'])
    return loaders, make_network(settings, loaders[0], seed)


def make_training(cell, seed, place):
    """Train with a schedule, and keep networks on the way. Returns accuracies after each epoch."""
    settings, schedule = place.settings, cell['schedule']
    (loader, tests), net = start(seed, place)
    observe(net, compared_images(place))  # if the images are too few, it says so before we train
    kept = kept_epochs(settings, schedule)
    accuracies = []

    def look(epoch):
        accuracies.append(airbench94.evaluate(net, tests))
        if epoch in kept:
            place.save_weights(f'{schedule}-{epoch}', seed, curves.parameters_of(net))

    look(0)
    optimizer = sgd.make_sgd(net, settings['lr'])
    scheduler = make_scheduler(schedule, optimizer, settings, len(loader))
    sgd.train(net, loader, optimizer, scheduler, max(kept), on_epoch=look)
    return {'val_acc': accuracies}


def make_curve(cell, seed, place):
    """Train a chain between two networks. Returns what we measure on segment and chain."""
    settings = place.settings
    loaders, net = start(seed, place)
    names = [f'{cell["schedule"]}-{cell[end]}' for end in ('first', 'last')]
    curve = curves.new_curve(*[place.load_weights(name, seed) for name in names], net)
    segment = curves.measure_curve(curve, net, loaders, settings['points'])
    curves.train_curve(curve, net, loaders[0], settings['lr'], settings['curve_epochs'])
    place.save_weights('-'.join(names), seed, curve.bend)
    trained = curves.measure_curve(curve, net, loaders, settings['points'])
    return {'segment': segment, 'curve': trained}


def make_alike(cell, seed, place):
    """How similar the layers of SGDR's networks are after two of its epochs."""
    loaders, net = start(seed, place)
    layers = []
    for end in ('first', 'last'):
        weights = place.load_weights(f'sgdr-{cell[end]}', seed)
        curves.measure(net, weights, *loaders)  # for BatchNorm's statistics
        layers.append(observe(net, compared_images(place)))
    return {'similarities': similarities(*layers), 'noise': noise_floors(*layers, seed)}


def make_point(cell, seed, place):
    """What we measure at a point of the plane, or where SGDR's way and the bend are on it."""
    settings = place.settings
    first, last = settings['pairs']['sgdr'][1]
    names = [f'sgdr-{first}', f'sgdr-{last}', f'sgdr-{first}-sgdr-{last}']
    plane = Plane([curves.vector_of(place.load_weights(name, seed)) for name in names])
    if cell['part'] == 'path':
        iterates = {}
        for epoch in kept_epochs(settings, 'sgdr'):
            if epoch <= last:
                weights = place.load_weights(f'sgdr-{epoch}', seed)
                iterates[str(epoch)] = plane.coordinates(curves.vector_of(weights))
        return {'iterates': iterates, 'bend': plane.coordinates(plane.vectors[2])}
    loaders, net = start(seed, place)
    alphas, betas = plane.axes(settings['grid'])
    alpha, beta = alphas[cell['x']], betas[cell['y']]
    weights = curves.named_like(plane.point(alpha, beta), net)
    return {'alpha': alpha, 'beta': beta} | curves.measure(net, weights, *loaders)


plan, train = in_stages(
    Stage(training_jobs, make_training),
    Stage(curve_jobs, make_curve),
    Stage(alike_jobs, make_alike),
    Stage(plane_jobs, make_point),
)

#### What to show ##################################################################################


def barriers_of(records, way, **cell):
    """The barriers of training loss on segments or curves, by seed. way: 'segment' or 'curve'."""
    found = [record[way] for record in in_cell(records, part='curve', **cell)]
    return np.array([curves.barrier(curves.values_of(points, 'train_loss')) for points in found])


def print_barriers(records, settings):
    curves.print_about(settings)
    print('barrier of training loss, with its 95% interval; one-sided p that it is above 0')
    rows, means = [], {}
    for schedule, name in SCHEDULES.items():
        of_pairs = []
        for first, last in settings['pairs'][schedule]:
            cell = {'schedule': schedule, 'first': first, 'last': last}
            segment, curve = [barriers_of(records, way, **cell) for way in ('segment', 'curve')]
            row = [f'{name}, {first} to {last}', str(len(segment)), mean_text(segment, '.4f')]
            rows.append([*row, f'{paired_p(segment, 0):.2g}', mean_text(curve, '.4f')])
            of_pairs.append(segment)
        means[schedule] = np.mean(of_pairs, axis=0)
    print_table(['epochs', 'n', 'segment', 'p', 'trained chain'], rows)
    p = paired_p(means['sgdr'], means['steps'])
    claim = 'SGDR has higher barriers than step decay, mean of the segments'
    print(f'{claim}: one-sided p={p:.2g}')
    for schedule, name in SCHEDULES.items():
        trainings = in_cell(records, part='training', schedule=schedule)
        best = [100 * max(record['val_acc']) for record in trainings]
        print(f'best accuracy, {name}: {mean_text(best, ".2f")}%')


def draw_ways(records, settings, stem):
    """Figure 2, for seed 0: accuracies, and training losses on segments and curves."""
    figure = new_figure(11, 5)
    left, *others = figure.subplots(1, 3)
    t = np.linspace(0, 1, settings['points'])
    for (schedule, name), axes, colour in zip(SCHEDULES.items(), others, COLOURS):
        training = in_cell(records, part='training', schedule=schedule)[0]
        left.plot(100 * np.array(training['val_acc']), color=colour, label=name)
        for (first, last), of_pair in zip(settings['pairs'][schedule], COLOURS[2:]):
            ends = {'schedule': schedule, 'first': first, 'last': last}
            record = in_cell(records, part='curve', **ends)[0]
            segment, curve = [
                curves.values_of(record[way], 'train_loss') for way in ('segment', 'curve')
            ]
            axes.plot(t, segment, '--', color=of_pair)
            axes.plot(t, curve, color=of_pair, label=f'w{first} to w{last}')
        axes.set(xlabel='place t (segments dashed)', ylabel='training loss', yscale='log')
        axes.set_title(name)
    left.set(xlabel='epochs', ylabel='test accuracy (%)')
    for axes in (left, *others):
        axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.2))
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    check_complete(records, plan(settings, records), folder)
    print_barriers(records, settings)
    draw_ways(records, settings, folder / 'restarts')
    [path] = in_cell(records, part='path')
    marks = {f'w{epoch}': path['iterates'][str(epoch)] for epoch in settings['pairs']['sgdr'][1]}
    marks['bend'] = path['bend']
    points = in_cell(records, part='plane')
    draw_plane(points, marks, folder / 'plane', path=path['iterates'].values())
    matrices = {}
    for first, last in settings['alike']:
        of_pair = in_cell(records, part='alike', first=first, last=last)
        similar = np.array([record['similarities'] for record in of_pair])
        unknown = np.full_like(similar[0], np.nan)  # in old records
        noise = np.array([record.get('noise', unknown) for record in of_pair])
        matrices[f'w{first} and w{last}'] = similar, noise
    draw_matrices(matrices, folder / 'svcca', 'earlier network', 'later network')


STUDY = Study('restarts', __doc__, dict.fromkeys(NETS, SCALES), plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
