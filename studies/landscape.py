"""Errors on the plane through three networks, and between two (Gupta et al. 2020, Figures 2, 3).

    python -m studies.landscape                             # in 20 minutes, on two CPU cores
    python -m studies.landscape --scale full --dtype bfloat16   # swap94.py's networks, in an hour
    torchrun --nproc_per_node=8 -m studies.landscape --scale paper --net resnet9 --data cifar10
    python -m studies.landscape A.pt B.pt C.pt --out logs/plane     # any three from lab run --save
    python -m studies.landscape --show --out logs/plane     # the table and the pictures again

We train SWAP, and then once more from other initial weights. We look at two planes: the one through
the result of phase 1 (LB), a worker (SGD) and the average (SWAP), as in Figure 2; and the one
through three workers (Figure 3), onto which we project SWAP, the average of all workers. We
recompute BatchNorm's statistics at every point. For several seeds, we also measure the errors on
the segment between two workers that began at the same LB, and between two with different initial
weights. A segment's barrier is its largest error minus the larger error of its two ends.

--scale paper trains 10 seeds, and evaluates both sets at 2,300 points: with ResNet-9, 830 PFLOP, or
two A100-hours at airbench94's rate of 0.36 PFLOP in 3.29 seconds. --scale full trains one seed, and
measures the training error on 10,000 images, from which the statistics are, too. --scale small
trains narrow networks on a tenth of the images.
"""

import sys
from operator import itemgetter

import numpy as np
import torch

import swap94
from lab.errors import UserError
from lab.runs import write_tensors
from lab.summary import new_figure
from studies.common import (
    COLOURS,
    Study,
    first_images,
    in_cell,
    mean_text,
    paired_p,
    read_networks,
    run_study,
    save_both,
)
from studies.curves import barrier, values_of
from studies.plane import Plane, draw_plane
from studies.swap import ALONE, FUNCTIONS, hyp_of, loader_of, scales, train_swap

SCALES = scales(
    {
        'paper': {'runs': 10, 'grid': 31, 'segment': 21, 'measured': None},
        'full': {'runs': 1, 'grid': 15, 'segment': 11, 'measured': 10_000},  # training images
        'small': {'runs': 5, 'grid': 9, 'segment': 9, 'measured': None},
        'smoke': {'runs': 2, 'grid': 2, 'segment': 3, 'measured': None},
    }
)
PLANES = {'phases': ('LB', 'SGD1', 'SWAP'), 'workers': ('SGD1', 'SGD2', 'SGD3')}
SEGMENTS = {'same start': ('SGD1', 'SGD2'), 'other start': ('SGD1', 'OTHER')}
KINDS = {'train_acc': 'training images', 'val_acc': 'test images'}
GIVEN = ('A', 'B', 'C')

#### Networks ######################################################################################


def train_networks(place, hyp, seed):
    """{name: state dict} of LB, three workers, SWAP, and a worker from other initial weights."""
    net, _, phase1, workers = train_swap(place, hyp, seed)
    alone = hyp | {'phase2': hyp['phase2'] | {'workers': 1}}
    _, _, _, [other] = train_swap(place, alone, 10_000 + seed)
    found = {'LB': phase1['weights'], 'SWAP': net.state_dict(), 'OTHER': other['weights']}
    return found | {f'SGD{i}': worker['weights'] for i, worker in enumerate(workers[:3], 1)}


def read_or_train(place, hyp, seed):
    """What train_networks returns, from a file if it exists."""
    file = place.folder / 'networks' / f'{seed}.pt'
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_tensors(file, train_networks(place, hyp, seed))
    return read_networks(file, 'delete it, and it will be made again')


class Networks:
    """The networks of a seed, or those that the user gave, as vectors of weights.

    vectors: {name: (parameters,)}. Raises UserError if the networks don't fit together.
    """

    def __init__(self, place, seed):
        files = place.settings['files']
        self.hyp = hyp_of(place, 'swap')
        train_loader = first_images(loader_of(place, self.hyp), place.settings['measured'])
        self.loaders = train_loader, place.test_loader
        if files:
            nets = [place.load_network(file) for file in files]
            self.net = nets[0]
            weights = {name: net.state_dict() for name, net in zip(GIVEN, nets)}
        else:
            make_net = FUNCTIONS[place.settings['net']]['make_net']
            where = {'device': place.device, 'dtype': place.dtype}
            self.net = make_net(self.hyp, place.num_classes, **where)
            weights = read_or_train(place, self.hyp, seed)
        self.vectors = {name: self.vector_of(state) for name, state in weights.items()}

    def vector_of(self, weights):
        try:
            self.net.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError('the networks are of different kinds; choose others') from error
        return swap94.flatten(self.net.parameters())

    def measure(self, vector):
        """Accuracies from 0 to 1 of the network with these weights, with its own statistics."""
        with torch.no_grad():
            swap94.unflatten(vector, list(self.net.parameters()))
        train_loader, test_loader = self.loaders
        swap94.recompute_statistics(self.net, train_loader, self.hyp['statistics'], ALONE)
        return {
            'train_acc': swap94.evaluate(self.net, train_loader),
            'val_acc': swap94.evaluate(self.net, test_loader),
        }


#### Training ######################################################################################


def planes_of(settings):
    return {'given': GIVEN} if settings['files'] else PLANES


def plan(settings, records):
    """The networks of all seeds, and then points between those that exist."""
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


def describe_networks(networks, planes):
    """{name: accuracies, and coordinates on the planes}."""
    found = {name: networks.measure(vector) for name, vector in networks.vectors.items()}
    for part, corners in planes.items():
        plane = Plane([networks.vectors[corner] for corner in corners])
        for name, vector in networks.vectors.items():
            found[name][part] = plane.coordinates(vector)
    return found


def train(cell, seed, place):
    """The networks of a seed, with their accuracies and coordinates; or a point's accuracies."""
    networks, planes = Networks(place, seed), planes_of(place.settings)
    vectors = networks.vectors
    part = cell['part']
    if part == 'networks':
        return {'networks': describe_networks(networks, planes)}
    if part in SEGMENTS:
        first, last = [vectors[name] for name in SEGMENTS[part]]
        t = cell['x'] / (place.settings['segment'] - 1)
        return {'t': t} | networks.measure(torch.lerp(first, last, t))
    plane = Plane([vectors[name] for name in planes[part]])
    alphas, betas = plane.axes(place.settings['grid'])
    alpha, beta = alphas[cell['x']], betas[cell['y']]
    return {'alpha': alpha, 'beta': beta} | networks.measure(plane.point(alpha, beta))


#### Table and pictures ############################################################################


def segments_of(records, part):
    """{seed: the points on its segment, from one end to the other}."""
    segments = {}
    for point in sorted(in_cell(records, part=part), key=itemgetter('seed', 't')):
        segments.setdefault(point['seed'], []).append(point)
    return segments


def print_networks(records):
    """Print the networks' accuracies, and whether SWAP is the best."""
    of_seeds = [record['networks'] for record in in_cell(records, part='networks')]
    print(f'accuracy in %, n={len(of_seeds)}       on training images, on test images')
    accuracies = {}
    for name in of_seeds[0]:
        row = f'  {name:24}'
        for key in KINDS:
            accuracies[name, key] = np.array([100 * found[name][key] for found in of_seeds])
            row += f' {mean_text(accuracies[name, key], "5.2f"):>17}'
        print(row)
    if 'SWAP' in of_seeds[0] and len(of_seeds) > 1:
        ours = accuracies['SWAP', 'val_acc']
        for name in ('LB', 'SGD1', 'SGD2', 'SGD3'):
            p = paired_p(ours, accuracies[name, 'val_acc'])
            print(f'  SWAP better than {name} on test images: one-sided p={p:.2g}')


def print_barriers(records):
    for key, what in KINDS.items():
        barriers = []
        for part in SEGMENTS:
            segments = segments_of(records, part).values()
            barriers.append([barrier(values_of(points, key)) for points in segments])
            text = mean_text(barriers[-1], '5.2f')
            print(f'barrier of {part} on {what}: {text:>14} percentage points')
        same, other = barriers
        if len(same) > 1:
            p = paired_p(other, same)
            print(f'  barrier lower from the same start: one-sided p={p:.2g}')


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
        raise UserError(f'{folder}: {missing} points are missing; the same command again goes on')
    print_networks(records)
    if not settings['files']:
        print_barriers(records)
    networks = in_cell(records, part='networks')[0]['networks']
    for part, corners in planes_of(settings).items():
        names = dict.fromkeys([*corners, *({'SWAP'} & networks.keys())])
        marks = {name: networks[name][part] for name in names}
        draw_plane(in_cell(records, part=part), marks, folder / f'plane-{part}')
    if not settings['files']:
        draw_segments(records, folder / 'segments')


STUDY = Study('landscape', __doc__, SCALES, plan, train, show, files=GIVEN)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
