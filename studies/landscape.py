"""Errors on the plane through three networks, and between two (Gupta et al. 2020, Figures 2, 3).

    python -m studies.landscape                             # in 20 minutes, on two CPU cores
    torchrun --nproc_per_node=8 -m studies.landscape --scale paper --net resnet9 --data cifar10
    python -m studies.landscape A.pt B.pt C.pt --out logs/plane     # any three that --save wrote
    python -m studies.landscape --show --out logs/plane     # the table and the pictures again

SWAP is trained, and then from other initial weights once more. Two planes are looked at: through
large-batch's result LB, a worker SGD and the average SWAP (Figure 2), and through three workers
(Figure 3), on which SWAP, of all workers, is marked where it projects to. BatchNorm's statistics
are recomputed at every point. Errors are also measured, for several seeds, on the segments between
two workers that have begun at the same LB, and between two from different initial weights. A
segment's barrier is its largest error less the larger one of its ends.

--scale paper trains 10 seeds, and passes over the sets at 2,300 points: of ResNet-9, 830 PFLOP, or
two A100-hours at airbench94's rate of 0.36 PFLOP in 3.29 seconds. --scale small trains narrow
networks on a tenth of the images.
"""

import sys
from operator import itemgetter

import numpy as np
import torch

import airbench94
import swap94
from studies.common import (
    COLOURS,
    Study,
    UserError,
    in_cell,
    load_network,
    mean_and_interval,
    new_figure,
    paired_p,
    run_study,
    save_both,
)
from studies.modes import barrier, values_of
from studies.plane import Plane, draw_plane
from studies.swap import hyp_of, loader_of, make_run, network, scales, train_swap

SCALES = scales(
    {
        'paper': {'runs': 10, 'grid': 31, 'segment': 21},
        'small': {'runs': 5, 'grid': 9, 'segment': 9},
        'smoke': {'runs': 2, 'grid': 2, 'segment': 3},
    }
)
PLANES = {'phases': ('LB', 'SGD1', 'SWAP'), 'workers': ('SGD1', 'SGD2', 'SGD3')}
SEGMENTS = {'same start': ('SGD1', 'SGD2'), 'other start': ('SGD1', 'OTHER')}
KINDS = {'train_acc': 'training images', 'val_acc': 'test images'}
GIVEN = ('A', 'B', 'C')

#### Networks ######################################################################################


def train_networks(hyp, seed, place):
    """{name: state dict} of LB, three workers, SWAP, and a worker from other initial weights."""
    run, joint, workers = train_swap(place, hyp, seed)
    other = swap94.override(hyp, ['phase2.workers=1'])
    _, _, others = train_swap(place, other, 10_000 + seed)
    found = {'LB': joint['weights'], 'SWAP': run.net.state_dict(), 'OTHER': others[0]['weights']}
    return found | {f'SGD{i}': model['weights'] for i, model in enumerate(workers[:3], 1)}


class Networks:
    """The networks of a seed, or those that were given, as vectors of weights.

    vectors: {name: (parameters,)}. Raises UserError if networks do not fit together.
    """

    def __init__(self, seed, place):
        self.hyp = hyp_of(place.settings, 'swap', len(place.train_loader.classes))
        self.loaders = loader_of(place, self.hyp), place.test_loader
        files = place.settings['files']
        if files:
            nets = [load_network(file, self.loaders[0])[0] for file in files]
            self.net = nets[0]
            weights = {name: net.state_dict() for name, net in zip(GIVEN, nets)}
        else:
            self.net = make_run(place, self.hyp, seed).net
            weights = self.read_or_train(seed, place)
        self.vectors = {name: self.vector_of(state) for name, state in weights.items()}

    def read_or_train(self, seed, place):
        file = place.folder / 'networks' / f'{seed}.pt'
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            airbench94.write_tensors(file, train_networks(self.hyp, seed, place))
        return torch.load(file, map_location=self.loaders[0].device, weights_only=True)

    def vector_of(self, weights):
        try:
            self.net.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError('the networks are not of one kind; choose others') from error
        return swap94.flatten(self.net.parameters())

    def measure(self, vector):
        """Accuracies in [0, 1] of the network with these weights, with its own statistics."""
        with torch.no_grad():
            swap94.unflatten(vector, list(self.net.parameters()))
        train_loader, test_loader = self.loaders
        alone = swap94.Team()
        swap94.recompute_statistics(self.net, train_loader, self.hyp['statistics'], alone)
        return {
            'train_acc': swap94.evaluate(self.net, train_loader),
            'val_acc': swap94.evaluate(self.net, test_loader),
        }


#### Training ######################################################################################


def planes_of(settings):
    return {'given': GIVEN} if settings['files'] else PLANES


def plan(settings, records):
    """The networks of all seeds, and then points of those whose networks are there."""
    seeds = range(1 if settings['files'] else settings['runs'])
    jobs = [({'part': 'networks'}, seed) for seed in seeds]
    trained = {record['seed'] for record in in_cell(records, part='networks')}
    n = settings['grid']
    if 0 in trained:
        for part in planes_of(settings):
            cells = [{'part': part, 'x': x, 'y': y} for x in range(n) for y in range(n)]
            jobs.extend((cell, 0) for cell in cells)
    if not settings['files']:
        for part in SEGMENTS:
            for seed in sorted(trained):
                places = range(settings['segment'])
                jobs.extend(({'part': part, 'x': x}, seed) for x in places)
    return jobs


def train(cell, seed, place):
    """The networks of a seed, with their accuracies and coordinates; or a point's accuracies."""
    with network(place.settings['net']):
        networks = Networks(seed, place)
        vectors = networks.vectors
        part = cell['part']
        if part == 'networks':
            found = {name: networks.measure(vector) for name, vector in vectors.items()}
            for name, corners in planes_of(place.settings).items():
                plane = Plane([vectors[corner] for corner in corners])
                for other, vector in vectors.items():
                    found[other][name] = plane.coordinates(vector)
            return {'networks': found}
        if part in SEGMENTS:
            first, last = [vectors[name] for name in SEGMENTS[part]]
            t = cell['x'] / (place.settings['segment'] - 1)
            return {'t': t} | networks.measure(torch.lerp(first, last, t))
        plane = Plane([vectors[name] for name in planes_of(place.settings)[part]])
        alphas, betas = plane.axes(place.settings['grid'])
        alpha, beta = alphas[cell['x']], betas[cell['y']]
        return {'alpha': alpha, 'beta': beta} | networks.measure(plane.point(alpha, beta))


#### Table and pictures ############################################################################


def segments_of(records, part):
    """{seed: the points of its segment, from end to end}."""
    segments = {}
    for point in sorted(in_cell(records, part=part), key=itemgetter('seed', 't')):
        segments.setdefault(point['seed'], []).append(point)
    return segments


def print_networks(records):
    """Their accuracies, and whether SWAP is the best one."""
    of_seeds = [record['networks'] for record in in_cell(records, part='networks')]
    print(f'accuracy in %, n={len(of_seeds)}       on training images, on test images')
    accuracies = {}
    for name in of_seeds[0]:
        row = f'  {name:24}'
        for key in KINDS:
            accuracies[name, key] = np.array([100 * found[name][key] for found in of_seeds])
            mean, half = mean_and_interval(accuracies[name, key])
            row += f' {mean:9.2f} +-{half:5.2f}'
        print(row)
    if 'SWAP' in of_seeds[0] and len(of_seeds) > 1:
        ours = accuracies['SWAP', 'val_acc']
        for name in ('LB', 'SGD1', 'SGD2', 'SGD3'):
            p = paired_p(ours, accuracies[name, 'val_acc'])
            print(f'  SWAP is not better than {name} on test images: p={p:.2g}')


def print_barriers(records):
    for key, what in KINDS.items():
        barriers = []
        for part in SEGMENTS:
            segments = segments_of(records, part).values()
            barriers.append([barrier(values_of(points, key)) for points in segments])
            mean, half = mean_and_interval(barriers[-1])
            print(f'barrier of {part} on {what}: {mean:6.2f} +-{half:5.2f} percentage points')
        same, other = barriers
        p = paired_p(other, same)
        print(f'  it is not lower from the same start: p={p:.2g}')


def draw_segments(records, stem):
    figure = new_figure(9, 3.4)
    for axes, (key, what) in zip(figure.subplots(1, 2), KINDS.items()):
        for part, colour in zip(SEGMENTS, COLOURS):
            for seed, points in segments_of(records, part).items():
                label = part if seed == 0 else None
                places = [point['t'] for point in points]
                axes.plot(places, values_of(points, key), color=colour, label=label)
        axes.set(xlabel='place on the segment', ylabel='error (%)', ylim=(0, None), title=what)
    figure.axes[0].legend(frameon=False)
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    jobs = plan(settings, records)
    if len(records) < len(jobs):
        missing = len(jobs) - len(records)
        raise UserError(f'{folder}: {missing} points are missing; the same line again goes on')
    print_networks(records)
    networks = in_cell(records, part='networks')[0]['networks']
    for part, corners in planes_of(settings).items():
        names = dict.fromkeys([*corners, *({'SWAP'} & networks.keys())])
        marks = {name: networks[name][part] for name in names}
        draw_plane(in_cell(records, part=part), marks, folder / f'plane-{part}')
    if not settings['files']:
        print_barriers(records)
        draw_segments(records, folder / 'segments')


STUDY = Study('landscape', __doc__, SCALES, plan, train, show, files=GIVEN)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
