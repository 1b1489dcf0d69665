"""SWA in sequence against SWAP in parallel (Gupta et al. 2020, Table 4 and Figure 6).

    python -m studies.swa                                   # in 40 minutes, on two CPU cores
    python -m studies.swa --scale full --dtype bfloat16     # swap94.py's networks, in two hours
    torchrun --nproc_per_node=8 -m studies.swa --net resnet9 --scale paper --data cifar100
    python -m studies.swa --show --out logs/mine            # the table and the picture again

Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407) trains one worker through
several cycles of the learning rate, and averages the networks at the ends of the cycles. SWAP
trains a worker for each of these networks, from where phase 1 ended. So a cycle is SWAP's phase 2:

- large-batch-swa: large-batch training, then cycles with the same batches and learning rates;
- large-then-small-swa: SWAP's phase 1, then cycles of its phase 2, in sequence;
- small-batch-swa: small-batch training, then the same cycles;
- swap: phase 1, then 8 workers with a cycle each;
- swap-longer: 8 workers with two cycles each of twice the epochs, and 16 networks in the average.

torch.optim.swa_utils averages. Operations are those of the slowest of 8 ranks, as in swap_tables.
--scale paper trains 10 networks for each row: with ResNet-9, 1600 PFLOP, or four A100-hours at
airbench94's rate of 0.36 PFLOP in 3.29 seconds. --scale full compares SWAP with its cycles in
sequence, on all images. --scale small trains narrow networks on a tenth of them.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

import swap94
from lab.flops import flop_of_steps
from lab.options import override
from studies.common import Study, for_each_seed, in_cell, run_study, whole_seeds
from studies.show import COLOURS, mean_text, new_figure, paired_p, print_table, save_both
from studies.swap import (
    METHODS,
    assignments_of,
    hyp_of,
    loader_of,
    measure,
    recipe_of,
    scales,
    train_phase1,
    train_worker,
)

SCALES = scales(
    {
        'paper': {'runs': 10},
        'full': {'runs': 3, 'ways': ['large-then-small-swa', 'swap']},  # without 'ways': all
        'small': {'runs': 6},
    }
)


@dataclass
class Way:
    """A row of Table 4: how we make the networks whose weights we average."""

    start: str  # the method whose phase 1 comes first
    has_large_cycles: bool  # whether cycles have phase 1's batches and rates, or phase 2's
    is_parallel: bool  # whether there are as many workers as in SWAP, or one for all the cycles
    cycles: int = 1  # of each worker, if they are parallel
    length: int = 1  # of a cycle, in SWAP's phases 2


WAYS = {
    'large-batch-swa': Way('large-batch', has_large_cycles=True, is_parallel=False),
    'large-then-small-swa': Way('swap', has_large_cycles=False, is_parallel=False),
    'small-batch-swa': Way('small-batch', has_large_cycles=False, is_parallel=False),
    'swap': Way('swap', has_large_cycles=False, is_parallel=True),
    'swap-longer': Way('swap', has_large_cycles=False, is_parallel=True, cycles=2, length=2),
}

# Table 4, on CIFAR-100: accuracy in % and its standard deviation, before and after averaging; and
# seconds.
PUBLISHED = {
    'large-batch-swa': (76.06, 0.25, 76.00, 0.31, 376),
    'large-then-small-swa': (76.26, 0.35, 78.12, 0.14, 398),
    'small-batch-swa': (76.80, 0.15, 79.09, 0.19, 849),
    'swap': (75.74, 0.15, 78.18, 0.21, 125),
    'swap-longer': (76.19, 0.19, 79.11, 0.12, 242),
}


#### What to train #################################################################################


def ways_of(settings):
    """{name: Way} of those that a scale compares."""
    return {name: WAYS[name] for name in settings.get('ways', WAYS)}


def plan(settings, records):
    """Every way, seed by seed."""
    return for_each_seed([{'way': way} for way in ways_of(settings)], settings)


def with_cycles(hyps, way):
    """The hyp of the method way.start, with a cycle as phase 2. hyps: {method: hyp}."""
    hyp = hyps[way.start]
    cycle = dict(hyps['swap']['phase2'])
    if way.has_large_cycles:
        for key in ('batch_size', 'shards', 'lr', 'lr_biases', 'lr_head'):
            cycle[key] = hyp['phase1'][key]
    cycle['train_epochs'] *= way.length
    return hyp | {'phase2': cycle}


def chains(way, workers):
    """(how many workers there are, through how many cycles each of them goes)."""
    if way.is_parallel:
        return workers, way.cycles
    return 1, workers


def pflop_of(place, hyp, steps, cycles):
    """PFLOP of the steps of phase 1 and of a worker's cycles.

    On the slowest of as many ranks as a batch has shards.
    """
    recipe, images = recipe_of(place.settings['net']), len(loader_of(place, hyp).images)
    flop = {}
    for phase in ('phase1', 'phase2'):
        settings = swap94.phase_settings(hyp, phase)
        ranks = hyp[phase]['shards']
        flop[phase] = flop_of_steps(recipe, settings, images, place.num_classes, ranks)
    return 1e-15 * (sum(flop['phase1'][:steps]) + cycles * sum(flop['phase2']))


def train(cell, seed, place):
    """The accuracy of the average, those of its networks, from 0 to 1, and what they cost."""
    way = WAYS[cell['way']]
    hyp = with_cycles({method: hyp_of(place, method) for method in METHODS}, way)
    workers, cycles = chains(way, hyp['phase2']['workers'])
    net, phase1 = train_phase1(place, hyp, seed)
    averaged = AveragedModel(net)
    accuracies, losses = [], []
    for worker in range(workers):
        result = phase1
        seconds = phase1['record']['seconds']
        for cycle in range(cycles):
            result = train_worker(place, hyp, seed, worker * cycles + cycle, net, result)
            averaged.update_parameters(net)
            accuracies.append(measure(place, hyp, net, result['losses']))
            losses.append(result['losses'])
            seconds += result['record']['seconds']
    return {
        'val_acc': measure(place, hyp, averaged.module, torch.stack(losses).mean(0)),
        'networks': accuracies,
        'training_seconds': seconds,  # of phase 1, and of the last worker
        'pflop': pflop_of(place, hyp, phase1['record']['steps'], cycles),
    }


#### What to show ##################################################################################


def accuracies_of(records, way):
    """In percent, by seed: (the mean of the networks before averaging, that of their average)."""
    of_way = in_cell(records, way=way)
    before = np.array([100 * np.mean(record['networks']) for record in of_way])
    after = np.array([100 * record['val_acc'] for record in of_way])
    return before, after


def print_ways(records, ways):
    n = len(in_cell(records, way='swap'))
    print(f'accuracy in %, n={n}, with its standard deviation; one-sided p that averaging helps')
    print('the paper: CIFAR-100, 8 V100s')
    titles = ['', 'before averaging', 'after', 'p', 'seconds', 'PFLOP']
    titles += ['paper: before averaging', 'after', 'seconds']
    rows = []
    for way in ways:
        before, deviation, after, deviation_after, seconds = PUBLISHED[way]
        row, (singles, averages) = [way], accuracies_of(records, way)
        for values in (singles, averages):
            row.append(f'{values.mean():.2f} +-{values.std(ddof=1):.2f}')
        row.append(f'{paired_p(averages, singles):.2g}')
        for key, form in (('training_seconds', '.1f'), ('pflop', '.2g')):
            row.append(f'{np.mean([record[key] for record in in_cell(records, way=way)]):{form}}')
        row += [f'{before:.2f} +-{deviation:.2f}', f'{after:.2f} +-{deviation_after:.2f}']
        rows.append([*row, str(seconds)])
    print_table(titles, rows)
    ours = accuracies_of(records, 'swap')[1]
    print('\nSWAP over SWA, after averaging, with 95% interval:')
    for way in [name for name in ways if not ways[name].is_parallel]:
        gain = mean_text(ours - accuracies_of(records, way)[1], '+.2f')
        print(f'  {way:20} {gain}')


def rates(hyp, cycles):
    """(epochs, the learning rate at each) in phase 1 and in the cycles of a worker."""
    epochs, values = [], []
    done = 0
    for phase in ['phase1'] + cycles * ['phase2']:
        own = hyp[phase]
        for step in range(101):
            epochs.append(done + step / 100 * own['train_epochs'])
            values.append(own['lr'] * swap94.learning_rate_share(step, 100, own['schedule']))
        done += own['train_epochs']
    return epochs, values


def draw_ways(config, records, ways, stem):
    """Figure 6's learning rates, and accuracies before and after averaging: ours, the paper's."""
    figure = new_figure(12, 1 + 0.9 * len(ways))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3))
    of_rates = left.subplots(len(ways), 1, sharex=True)
    ours, theirs = right.subplots(1, 2, sharey=True)
    num_classes = config['data']['classes']
    hyps = {
        method: override(swap94.hyp, assignments_of(config['settings'], method, num_classes))
        for method in METHODS
    }
    for i, (name, way) in enumerate(ways.items()):
        hyp, colour = with_cycles(hyps, way), COLOURS[i]
        _, cycles = chains(way, hyp['phase2']['workers'])
        of_rates[i].plot(*rates(hyp, cycles), color=colour)
        of_rates[i].set_ylim(0, None)
        before, deviation, after, deviation_after, _ = PUBLISHED[name]
        theirs.errorbar(before, i, 0, deviation, fmt='o', color=colour, markerfacecolor='white')
        theirs.errorbar(after, i, 0, deviation_after, fmt='o', color=colour)
        singles, averages = accuracies_of(records, name)
        ours.plot(singles, np.full(len(singles), i), 'o', color=colour, markerfacecolor='white')
        ours.plot(averages, np.full(len(averages), i), 'o', color=colour)
    of_rates[-1].set_xlabel('epochs')
    left.supylabel('learning rate')
    ours.set_yticks(range(len(ways)), ways)
    ours.set(ylim=(len(ways) - 0.5, -0.5), title='here')
    theirs.set(title='paper (CIFAR-100)')
    right.supxlabel('test accuracy without TTA (%), before averaging (empty) and after')
    save_both(figure, stem)


def show(config, records, folder):
    ways = ways_of(config['settings'])
    records = whole_seeds(records, plan(config['settings'], []), folder, least=2)
    print_ways(records, ways)
    draw_ways(config, records, ways, folder / 'swa')


STUDY = Study('swa', __doc__, SCALES, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
