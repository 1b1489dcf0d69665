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
from studies.common import (
    Stage,
    Study,
    check_complete,
    first_images,
    for_each_seed,
    in_cell,
    in_stages,
    run_study,
)
from studies.curves import barrier, values_of
from studies.plane import Plane, draw_plane
from studies.show import COLOURS, mean_text, new_figure, paired_p, print_table, save_both
from studies.swap import ALONE, FUNCTIONS, hyp_of, loader_of, scales, train_swap

SCALES = scales(
    {
        'paper': {'runs': 10, 'grid': 31, 'segment': 21, 'measured': None},
        'full': {'runs': 1, 'grid': 15, 'segment': 11, 'measured': 10_000},  # training images
        'small': {'runs': 5, 'grid': 9, 'segment': 9, 'measured': None},
    }
)
PLANES = {'phases': ('LB', 'SGD1', 'SWAP'), 'workers': ('SGD1', 'SGD2', 'SGD3')}
SEGMENTS = {'same start': ('SGD1', 'SGD2'), 'other start': ('SGD1', 'OTHER')}
KINDS = {'train_acc': 'training images', 'val_acc': 'test images'}
GIVEN = ('A', 'B', 'C')

#### What to train #################################################################################


def network_jobs(settings):
    return for_each_seed([{'part': 'networks'}], settings)


def planes_of(settings):
    return {'given': GIVEN} if settings['files'] else PLANES


def plane_jobs(settings):
    """The planes of seed 0: the points of a grid."""
    places = range(settings['grid'])
    parts = planes_of(settings)
    return [({'part': part, 'x': x, 'y': y}, 0) for part in parts for x in places for y in places]


def segment_jobs(settings):
    if settings['files']:
        return []
    cells = [{'part': part, 'x': x} for part in SEGMENTS for x in range(settings['segment'])]
    return for_each_seed(cells, settings)


class Networks:
    """The networks of a seed, as vectors of weights, and what we measure them with."""

    def __init__(self, place, seed):
        self.place, self.seed = place, seed
        self.hyp = hyp_of(place, 'swap')
        train_loader = first_images(loader_of(place, self.hyp), place.settings['measured'])
        self.loaders = train_loader, place.test_loader
        if place.settings['files']:
            self.net = place.load_network(place.settings['files'][0])
        else:
            make_net = FUNCTIONS[place.settings['net']]['make_net']
            where = {'device': place.device, 'dtype': place.dtype}
            self.net = make_net(self.hyp, place.num_classes, **where)

    def vector(self, name):
        """A network's parameters, (parameters,). Raises UserError if it is of another kind."""
        try:
            self.net.load_state_dict(self.place.load_weights(name, self.seed))
        except RuntimeError as error:
            line = f'network {name} and the first are of different kinds; choose others'
            raise UserError(line) from error
        return swap94.flatten(self.net.parameters())

    def measure(self, vector):
        """Accuracies from 0 to 1 of the network with these parameters.

        BatchNorm's statistics are recomputed, from full batches of training images.
        """
        with torch.no_grad():
            swap94.unflatten(vector, list(self.net.parameters()))
        train_loader, test_loader = self.loaders
        swap94.recompute_statistics(self.net, train_loader, self.hyp['statistics'], ALONE)
        return {
            'train_acc': swap94.evaluate(self.net, train_loader),
            'val_acc': swap94.evaluate(self.net, test_loader),
        }


def make_networks(cell, seed, place):
    """Train the networks of a seed, or take the given ones.

    Returns {name: accuracies, and coordinates on the planes}.
    """
    if place.settings['files']:
        nets = [place.load_network(file) for file in place.settings['files']]
        weights = {name: net.state_dict() for name, net in zip(GIVEN, nets)}
    else:
        weights = train_networks(seed, place)
    for name, of_network in weights.items():
        place.save_weights(name, seed, of_network)
    networks = Networks(place, seed)
    vectors = {name: networks.vector(name) for name in weights}
    found = {name: networks.measure(vector) for name, vector in vectors.items()}
    for part, corners in planes_of(place.settings).items():
        plane = Plane([vectors[corner] for corner in corners])
        for name, vector in vectors.items():
            found[name][part] = plane.coordinates(vector)
    return {'networks': found}


def train_networks(seed, place):
    """{name: weights} of LB, three workers, SWAP, and a worker from other initial weights."""
    hyp = hyp_of(place, 'swap')
    net, _, phase1, workers = train_swap(place, hyp, seed)
    alone = hyp | {'phase2': hyp['phase2'] | {'workers': 1}}
    _, _, _, [other] = train_swap(place, alone, 10_000 + seed)
    found = {'LB': phase1['weights'], 'SWAP': net.state_dict(), 'OTHER': other['weights']}
    return found | {f'SGD{i}': worker['weights'] for i, worker in enumerate(workers[:3], 1)}


def measure_plane(cell, seed, place):
    """The accuracies at a point of a plane."""
    networks = Networks(place, seed)
    plane = Plane([networks.vector(name) for name in planes_of(place.settings)[cell['part']]])
    alphas, betas = plane.axes(place.settings['grid'])
    alpha, beta = alphas[cell['x']], betas[cell['y']]
    return {'alpha': alpha, 'beta': beta} | networks.measure(plane.point(alpha, beta))


def measure_segment(cell, seed, place):
    """The accuracies at a point between two networks."""
    networks = Networks(place, seed)
    first, last = [networks.vector(name) for name in SEGMENTS[cell['part']]]
    t = cell['x'] / (place.settings['segment'] - 1)
    return {'t': t} | networks.measure(torch.lerp(first, last, t))


plan, train = in_stages(
    Stage(network_jobs, make_networks),
    Stage(plane_jobs, measure_plane),
    Stage(segment_jobs, measure_segment),
)

#### What to show ##################################################################################


def segments_of(records, part, key):
    """Each seed's errors in percent on its segment, from one end to the other: (seeds, points)."""
    points = sorted(in_cell(records, part=part), key=itemgetter('seed', 't'))
    errors = values_of(points, key)
    return errors.reshape(len({point['seed'] for point in points}), -1)


def print_networks(records):
    """Print the networks' accuracies, and whether SWAP is the best."""
    of_seeds = [record['networks'] for record in in_cell(records, part='networks')]
    print(f'accuracy in %; n={len(of_seeds)}; +-: 95% interval')
    accuracies, rows = {}, []
    for name in of_seeds[0]:
        for key in KINDS:
            accuracies[name, key] = np.array([100 * found[name][key] for found in of_seeds])
        rows.append([name, *(mean_text(accuracies[name, key], '.2f') for key in KINDS)])
    print_table(['network', *KINDS.values()], rows)
    if 'SWAP' in of_seeds[0] and len(of_seeds) > 1:
        ours = accuracies['SWAP', 'val_acc']
        for name in ('LB', 'SGD1', 'SGD2', 'SGD3'):
            p = paired_p(ours, accuracies[name, 'val_acc'])
            print(f'SWAP better than {name} on test images: one-sided p={p:.2g}')


def print_barriers(records):
    print('\nbarrier in percentage points; +-: 95% interval')
    barriers, rows = {}, []
    for part in SEGMENTS:
        for key in KINDS:
            errors = segments_of(records, part, key)
            barriers[part, key] = np.array([barrier(values) for values in errors])
        rows.append([part, *(mean_text(barriers[part, key], '.2f') for key in KINDS)])
    print_table(['segment', *KINDS.values()], rows)
    for key, kind in KINDS.items():
        same, other = [barriers[part, key] for part in SEGMENTS]
        if len(same) > 1:
            print(f'lower from the same start, {kind}: one-sided p={paired_p(other, same):.2g}')


def draw_segments(records, stem):
    figure = new_figure(9, 4)
    for axes, (key, kind) in zip(figure.subplots(1, 2), KINDS.items()):
        for part, colour in zip(SEGMENTS, COLOURS):
            errors = segments_of(records, part, key)
            places = np.linspace(0, 1, errors.shape[1])
            lines = axes.plot(places, errors.T, color=colour)
            lines[0].set_label(part)
        axes.set(xlabel='place on the segment', ylabel='error (%)', ylim=(0, None), title=kind)
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc='outside upper center', ncols=2)
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    check_complete(records, plan(settings, records), folder)
    print_networks(records)
    if not settings['files']:
        print_barriers(records)
        draw_segments(records, folder / 'segments')
    networks = in_cell(records, part='networks')[0]['networks']
    for part, corners in planes_of(settings).items():
        names = dict.fromkeys([*corners, *({'SWAP'} & networks.keys())])
        marks = {name: networks[name][part] for name in names}
        draw_plane(in_cell(records, part=part), marks, folder / f'plane-{part}')


STUDY = Study('landscape', __doc__, SCALES, plan, train, show, files=GIVEN)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
