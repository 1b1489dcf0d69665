"""What restarts of the learning rate do to the trajectory (Gotmare et al. 2019, section 3).

    python -m studies.restarts                              # 20 minutes on two CPU cores
    torchrun --nproc_per_node=8 -m studies.restarts --scale paper --net vgg16 --data cifar10
    python -m studies.restarts --show --out logs/mine       # the table and the pictures again

We train a network with SGDR, whose cosines restart after 10, 30, 70 and 150 epochs, and with step
decay from the same initial weights. w70 is the network after 70 epochs of SGDR. Between networks
from just before the restarts, and between networks from before and after the steps, we measure the
loss on the segment and on a trained curve (Figure 2). We also measure it on the plane through w70,
w150 and the bend of their curve, onto which we project the networks on SGDR's way (Figure 3). A
barrier is the largest training loss on a segment minus the larger one at its ends. SVCCA compares
the layers of an early and a late network, and of one before and one after a restart (Appendix 9).

--scale paper is the paper's setting, with --net vgg16, which has no BatchNorm: 320 epochs of
training and 480 of curves a seed, 230 PFLOP for 3 seeds, or 35 A100-minutes at airbench94's rate
of 0.36 PFLOP in 3.29 seconds. --scale small trains narrow networks for as many epochs on a
hundredth of the images, without augmentation: the networks have to fit the images, or there is no
barrier between them. Without BatchNorm, such networks do not learn at its learning rate.
"""

import sys

import numpy as np
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR

import airbench94
from lab.errors import UserError
from lab.summary import new_figure
from studies.common import (
    COLOURS,
    Study,
    by_seed,
    in_cell,
    mean_and_interval,
    paired_p,
    run_study,
    save_both,
)
from studies.modes import (
    NETS,
    barrier,
    dropping,
    loaders_of,
    make_network,
    make_sgd,
    measure,
    measure_curve,
    new_curve,
    parameters_of,
    read_weights,
    save_weights,
    train,
    train_curve,
    values_of,
    vector_of,
)
from studies.plane import Plane, draw_plane
from studies.svcca import (
    compared_images,
    draw_matrices,
    has_noise,
    noise_floors,
    observe,
    similarities,
)

SCALES = {
    'paper': {
        'images': None,  # of the training set: all
        'augmented': True,
        'compared': 2000,  # test images, for SVCCA
        'share': 1.0,  # of the network's full widths
        'batch_size': 100,
        'lr': 0.05,
        'first_period': 10,  # epochs until the first restart; each next one takes twice as many
        'drops': [60, 150],  # epochs after which step decay divides the rate by 5
        'pairs': {
            'sgdr': [[30, 70], [70, 150], [30, 150]],
            'steps': [[55, 65], [145, 165], [55, 165]],
        },
        'alike': [[10, 150], [150, 155]],  # epochs of SGDR that SVCCA compares
        'iterates_every': 10,  # epochs
        'curve_epochs': 80,
        'points': 21,
        'grid': 21,
        'runs': 3,
    },
    'small': {
        'images': 500,
        'augmented': False,
        'compared': 1000,
        'share': 0.125,
        'batch_size': 25,
        'lr': 0.05,
        'first_period': 10,
        'drops': [60, 150],
        'pairs': {
            'sgdr': [[30, 70], [70, 150], [30, 150]],
            'steps': [[55, 65], [145, 165], [55, 165]],
        },
        'alike': [[10, 150], [150, 155]],
        'iterates_every': 10,
        'curve_epochs': 40,
        'points': 9,
        'grid': 9,
        'runs': 6,
    },
    'smoke': {
        'images': 100,
        'augmented': True,
        'compared': 200,
        'share': 0.0625,
        'batch_size': 50,
        'lr': 0.02,
        'first_period': 1,
        'drops': [1, 2],
        'pairs': {'sgdr': [[1, 3]], 'steps': [[1, 3]]},
        'alike': [[1, 3]],
        'iterates_every': 1,
        'curve_epochs': 1,
        'points': 3,
        'grid': 2,
        'runs': 1,
    },
}
SCHEDULES = ('sgdr', 'steps')


#### Training ######################################################################################


def plan(settings, records):
    """For each seed: both trainings, then curves and comparisons; for the first, a plane."""
    jobs = []
    n = settings['grid']
    for seed in range(settings['runs']):
        mine = [record for record in records if record['seed'] == seed]
        for schedule in SCHEDULES:
            jobs.append(({'part': 'training', 'schedule': schedule}, seed))
            if in_cell(mine, part='training', schedule=schedule):
                for first, last in settings['pairs'][schedule]:
                    ends = {'schedule': schedule, 'first': first, 'last': last}
                    jobs.append(({'part': 'curve'} | ends, seed))
        if in_cell(mine, part='training', schedule='sgdr'):
            for first, last in settings['alike']:
                jobs.append(({'part': 'alike', 'first': first, 'last': last}, seed))
        first, last = plane_pair(settings)
        if seed == 0 and in_cell(mine, part='curve', schedule='sgdr', first=first, last=last):
            jobs.append(({'part': 'path'}, 0))
            jobs.extend(({'part': 'plane', 'x': x, 'y': y}, 0) for x in range(n) for y in range(n))
    return jobs


def plane_pair(settings):
    """The epochs of SGDR's networks on the plane: 70 and 150."""
    pairs = settings['pairs']['sgdr']
    return pairs[1 % len(pairs)]


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
    return LambdaLR(optimizer, dropping([drop * steps for drop in settings['drops']]))


def make_training(schedule, seed, place):
    """Train with a schedule, and keep networks on the way. Returns accuracies after each epoch."""
    settings = place.settings
    loader, tests = loaders_of(place, settings['batch_size'], settings['augmented'])
    loader.seed = seed
    net = make_network(settings['net'], loader, settings['share'], seed)
    observe(net, compared_images(place))  # if the images are too few, it says so before we train
    kept = kept_epochs(settings, schedule)
    accuracies = []

    def look(epoch):
        accuracies.append(airbench94.evaluate(net, tests))
        if epoch in kept:
            save_weights(place, f'{schedule}-{epoch}', seed, parameters_of(net))

    look(0)
    optimizer = make_sgd(net, settings['lr'])
    scheduler = make_scheduler(schedule, optimizer, settings, len(loader))
    train(net, loader, optimizer, scheduler, max(kept), on_epoch=look)
    return {'val_acc': accuracies}


def make_curve(cell, seed, place):
    """Train a chain between two networks. Returns what we measure on segment and curve."""
    settings = place.settings
    loader, tests = loaders_of(place, settings['batch_size'], settings['augmented'])
    loader.seed = seed
    net = make_network(settings['net'], loader, settings['share'], seed)
    names = [f'{cell["schedule"]}-{cell[end]}' for end in ('first', 'last')]
    curve = new_curve(*[read_weights(place, name, seed) for name in names], net)
    segment = measure_curve(curve, net, (loader, tests), settings['points'])
    train_curve(curve, net, loader, settings['lr'], settings['curve_epochs'], seed)
    save_weights(place, '-'.join(names), seed, curve.bend)
    return {
        'segment': segment,
        'curve': measure_curve(curve, net, (loader, tests), settings['points']),
    }


def make_alike(cell, seed, place):
    """How similar the layers of SGDR's networks are after two of its epochs."""
    settings = place.settings
    loaders = loaders_of(place, settings['batch_size'], settings['augmented'])
    net = make_network(settings['net'], loaders[0], settings['share'], seed)
    images = compared_images(place)
    layers = []
    for end in ('first', 'last'):
        weights = read_weights(place, f'sgdr-{cell[end]}', seed)
        measure(net, weights, *loaders)  # for BatchNorm's statistics
        layers.append(observe(net, images))
    return {'similarities': similarities(*layers), 'noise': noise_floors(*layers, seed)}


def plane_of(place, seed):
    """The plane through w70, w150 and the bend of their curve."""
    first, last = plane_pair(place.settings)
    names = [f'sgdr-{first}', f'sgdr-{last}', f'sgdr-{first}-sgdr-{last}']
    return Plane([vector_of(read_weights(place, name, seed)) for name in names])


def make_path(seed, place):
    """Where on the plane SGDR's networks up to w150 are, and the bend."""
    plane = plane_of(place, seed)
    _, last = plane_pair(place.settings)
    iterates = {}
    for epoch in kept_epochs(place.settings, 'sgdr'):
        if epoch <= last:
            vector = vector_of(read_weights(place, f'sgdr-{epoch}', seed))
            iterates[str(epoch)] = plane.coordinates(vector)
    return {'iterates': iterates, 'bend': plane.coordinates(plane.vectors[2])}


def make_point(cell, seed, place):
    """What we measure at a point of the plane."""
    settings = place.settings
    loaders = loaders_of(place, settings['batch_size'], settings['augmented'])
    net = make_network(settings['net'], loaders[0], settings['share'], seed)
    plane = plane_of(place, seed)
    alphas, betas = plane.axes(settings['grid'])
    alpha, beta = alphas[cell['x']], betas[cell['y']]
    weights = named_like(plane.point(alpha, beta), net)
    return {'alpha': alpha, 'beta': beta} | measure(net, weights, *loaders)


def named_like(vector, net):
    """A vector as {name: parameter}, with the shapes of a network's parameters."""
    sizes = [p.numel() for p in net.parameters()]
    parts = zip(net.named_parameters(), vector.split(sizes))
    return {name: part.view(p.shape).to(p.dtype) for (name, p), part in parts}


def train_part(cell, seed, place):
    if cell['part'] == 'training':
        return make_training(cell['schedule'], seed, place)
    if cell['part'] == 'curve':
        return make_curve(cell, seed, place)
    if cell['part'] == 'alike':
        return make_alike(cell, seed, place)
    if cell['part'] == 'path':
        return make_path(seed, place)
    return make_point(cell, seed, place)


#### Table and pictures ############################################################################


def barriers_of(records, schedule, way):
    """Barriers of the training loss: {(first, last): an array with each seed's}."""
    found = {}
    for record in by_seed(records, part='curve', schedule=schedule):
        ends = record['cell']['first'], record['cell']['last']
        found.setdefault(ends, []).append(barrier(values_of(record[way], 'train_loss')))
    return {ends: np.array(values) for ends, values in found.items()}


def print_table(records):
    print('barrier of training loss, with its 95% interval; one-sided p that it is above 0')
    print('schedule  epochs        n     segment                 p   trained curve')
    means = {}
    for schedule in SCHEDULES:
        of_segments = barriers_of(records, schedule, 'segment')
        of_curves = barriers_of(records, schedule, 'curve')
        for (first, last), values in of_segments.items():
            mean, half = mean_and_interval(values)
            row = f'{schedule:9} {first:3} to {last:3} {len(values):4} {mean:9.4f} +-{half:7.4f}'
            row += f' {paired_p(values, 0):9.2g}'
            mean, half = mean_and_interval(of_curves[first, last])
            print(f'{row} {mean:9.4f} +-{half:7.4f}')
        means[schedule] = np.mean(list(of_segments.values()), axis=0)
    p = paired_p(means['sgdr'], means['steps'])
    claim = 'SGDR has higher barriers than step decay, mean of the segments'
    print(f'{claim}: one-sided p={p:.2g}')
    for schedule in SCHEDULES:
        trainings = in_cell(records, part='training', schedule=schedule)
        mean, half = mean_and_interval([100 * max(r['val_acc']) for r in trainings])
        print(f'best accuracy, {schedule:5}: {mean:6.2f} +-{half:5.2f}%')


def draw_ways(records, points, stem):
    """Figure 2, for seed 0: accuracies, and training losses on segments and curves."""
    figure = new_figure(11, 3.4)
    first_axes, *others = figure.subplots(1, 3)
    t = np.linspace(0, 1, points)
    for schedule, axes, colour in zip(SCHEDULES, others, COLOURS):
        training = in_cell(records, part='training', schedule=schedule)[0]
        first_axes.plot(100 * np.array(training['val_acc']), color=colour, label=schedule)
        curves = in_cell(records, part='curve', schedule=schedule)
        for record, of_pair in zip((r for r in curves if r['seed'] == 0), COLOURS[2:]):
            label = f'{record["cell"]["first"]} to {record["cell"]["last"]}'
            segment, curve = [values_of(record[way], 'train_loss') for way in ('segment', 'curve')]
            axes.plot(t, segment, '--', color=of_pair)
            axes.plot(t, curve, color=of_pair, label=label)
        title = f'{schedule}; segments dashed'
        axes.set(xlabel='t', ylabel='training loss', yscale='log', title=title)
        axes.legend(frameon=False, fontsize='small', title='epochs')
    first_axes.set(xlabel='epochs', ylabel='test accuracy (%)')
    first_axes.legend(frameon=False)
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    missing = len(plan(settings, records)) - len(records)
    if missing > 0:
        raise UserError(f'{folder}: {missing} parts are missing; the same command again goes on')
    print_table(records)
    draw_ways(records, settings['points'], folder / 'restarts')
    points = in_cell(records, part='plane')
    [path] = in_cell(records, part='path')
    iterates = path['iterates']
    marks = {f'w{epoch}': iterates[str(epoch)] for epoch in plane_pair(settings)}
    draw_plane(points, marks | {'bend': path['bend']}, folder / 'plane', path=iterates.values())
    matrices, noise = {}, {}
    for first, last in settings['alike']:
        of_pair = in_cell(records, part='alike', first=first, last=last)
        title = f'first: w{first}, second: w{last}'
        matrices[title] = np.mean([record['similarities'] for record in of_pair], axis=0)
        if has_noise(of_pair):
            noise[title] = np.mean([record['noise'] for record in of_pair], axis=0)
    draw_matrices(matrices, noise, folder / 'svcca')


STUDY = Study('restarts', __doc__, dict.fromkeys(NETS, SCALES), plan, train_part, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
