"""SWA in sequence against SWAP in parallel (Gupta et al. 2020, Table 4 and Figure 6).

    python -m studies.swa                                   # in 40 minutes, on two CPU cores
    torchrun --nproc_per_node=8 -m studies.swa --net resnet9 --scale paper --data cifar100
    python -m studies.swa --show --out logs/mine            # the table and the picture again

Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407) lets one worker go on through
cycles of the learning rate, and averages the networks at the ends of the cycles. SWAP has a worker
for each of them, which all begin where phase 1 ends, so that a cycle is SWAP's phase 2:

- large-batch-swa: a large-batch training, then cycles of the same batches and rates;
- large-then-small-swa: SWAP's phase 1, then cycles of its phase 2, in sequence;
- small-batch-swa: a small-batch training, then those cycles;
- swap: phase 1, then 8 workers with a cycle each;
- swap-longer: 8 workers with two cycles each of twice the epochs, and 16 networks in the average.

torch.optim.swa_utils averages. Operations are those of the longest of 8 ranks, as in swap_tables.
--scale paper trains 10 networks a row: of ResNet-9, 1600 PFLOP, or four A100-hours at airbench94's
rate of 0.36 PFLOP in 3.29 seconds. --scale small trains narrow networks on a tenth of the images.
"""

import sys
from dataclasses import dataclass

import numpy as np
from torch.optim.swa_utils import AveragedModel

import swap94
from studies.common import (
    COLOURS,
    Study,
    UserError,
    by_seed,
    in_cell,
    mean_and_interval,
    new_figure,
    paired_p,
    run_study,
    save_both,
    two_whole_seeds,
)
from studies.swap import hyp_of, make_run, network, scales

SCALES = scales({'paper': {'runs': 10}, 'small': {'runs': 6}, 'smoke': {'runs': 2}})


@dataclass
class Way:
    """A row of Table 4: how networks are made whose weights are averaged."""

    start: str  # the method of swap94 whose phase 1 comes first
    has_large_cycles: bool  # whether cycles have phase 1's batches and rates, or phase 2's
    is_parallel: bool  # whether the workers share a cycle's networks out, or one makes them all
    cycles: int = 1  # in proportion to phase 2
    length: int = 1


WAYS = {
    'large-batch-swa': Way('large-batch', has_large_cycles=True, is_parallel=False),
    'large-then-small-swa': Way('swap', has_large_cycles=False, is_parallel=False),
    'small-batch-swa': Way('small-batch', has_large_cycles=False, is_parallel=False),
    'swap': Way('swap', has_large_cycles=False, is_parallel=True),
    'swap-longer': Way('swap', has_large_cycles=False, is_parallel=True, cycles=2, length=2),
}

# Accuracy in % and its deviation, before and after averaging, and seconds: CIFAR-100.
PUBLISHED = {
    'large-batch-swa': (76.06, 0.25, 76.00, 0.31, 376),
    'large-then-small-swa': (76.26, 0.35, 78.12, 0.14, 398),
    'small-batch-swa': (76.80, 0.15, 79.09, 0.19, 849),
    'swap': (75.74, 0.15, 78.18, 0.21, 125),
    'swap-longer': (76.19, 0.19, 79.11, 0.12, 242),
}


#### Training ######################################################################################


def plan(settings, records):
    """Every way, seed by seed."""
    return [({'way': way}, seed) for seed in range(settings['runs']) for way in WAYS]


def hyp_of_way(settings, way, num_classes):
    """swap94's hyp, whose phase 2 is a cycle."""
    hyp = hyp_of(settings, way.start, num_classes)
    cycle = hyp_of(settings, 'swap', num_classes)['phase2']
    if way.has_large_cycles:
        for key in ('batch_size', 'shards', 'lr', 'lr_biases', 'lr_head'):
            cycle[key] = hyp['phase1'][key]
    cycle['train_epochs'] *= way.length
    return hyp | {'phase2': cycle}


def chains(way, workers):
    """(how many workers there are, how many cycles each of them goes through)."""
    if way.is_parallel:
        return workers, way.cycles
    return 1, workers


def finish(model, seed):
    """A model, if it is finite. Raises UserError if not."""
    if model['failed']:
        raise UserError(f'the network of seed {seed} diverges: {model["failed"]}')
    return model


def train(cell, seed, place):
    """The accuracy of the average, those of its networks, in [0, 1], and what they cost."""
    way = WAYS[cell['way']]
    hyp = hyp_of_way(place.settings, way, len(place.train_loader.classes))
    workers, cycles = chains(way, hyp['phase2']['workers'])
    alone = swap94.Team()
    with network(place.settings['net']):
        run = make_run(place, hyp, seed)
        joint = finish(run.phase1(), seed)
        averaged = AveragedModel(run.net)
        accuracies = []
        for worker in range(workers):
            model = joint
            seconds = joint['seconds']
            for cycle in range(cycles):
                model = swap94.start_model(model['weights'], model['losses'])
                own_seed = swap94.worker_seed(seed, worker * cycles + cycle)
                model = finish(run.fit('cycle', 'phase2', model, own_seed, alone), seed)
                averaged.update_parameters(run.net)
                accuracies.append(model['epochs'][-1]['val_acc'])
                seconds += model['seconds']
        run.net.load_state_dict(averaged.module.state_dict())
        accuracy = run.measure('phase2', joint['losses'], 0, alone)
        of_cycle = sum(run.flop_of_steps('phase2', hyp['phase2']['shards']))
    return {
        'val_acc': accuracy,
        'networks': accuracies,
        'training_seconds': seconds,  # of phase 1, and of the last worker
        'pflop': run.phases['phase1']['pflop'] + 1e-15 * cycles * of_cycle,
    }


#### Table and picture #############################################################################


def accuracies_of(records, way):
    """In percent, by seed: (means of the networks before averaging, of the averages)."""
    of_way = by_seed(records, way=way)
    before = np.array([100 * np.mean(record['networks']) for record in of_way])
    after = np.array([100 * record['val_acc'] for record in of_way])
    return before, after


def print_table(records):
    n = len(in_cell(records, way='swap'))
    print(f'accuracy in %, n={n}, with its standard deviation; p of "averaging does not help"')
    print(f'{"":52}  of the paper, CIFAR-100, 8 V100s:')
    print(f'{"":20}  before averaging  after        p seconds   PFLOP', end='')
    print('   before averaging  after     seconds')
    for way, (before, spread, after, spread_after, seconds) in PUBLISHED.items():
        singles, averages = accuracies_of(records, way)
        row = f'{way:20}'
        for values in (singles, averages):
            row += f' {values.mean():7.2f} +-{values.std(ddof=1):5.2f}'
        p = paired_p(averages, singles)
        keys = ('training_seconds', 'pflop')
        costs = [np.mean([r[key] for r in in_cell(records, way=way)]) for key in keys]
        row += f' {p:8.2g} {costs[0]:7.1f} {costs[1]:7.2g}'
        row += f'   {before:6.2f} +-{spread:.2f} {after:6.2f} +-{spread_after:.2f} {seconds:7}'
        print(row)
    ours = accuracies_of(records, 'swap')[1]
    print('\nSWAP over SWA, after averaging, with 95% interval:')
    for way in list(WAYS)[:3]:
        gain, half = mean_and_interval(ours - accuracies_of(records, way)[1])
        print(f'  {way:20} {gain:+6.2f} +-{half:5.2f}')


def rates(hyp, cycles):
    """(epochs, the learning rate at them) of phase 1 and the cycles of a worker."""
    epochs, values = [], []
    done = 0
    for phase in ['phase1'] + cycles * ['phase2']:
        own = hyp[phase]
        for step in range(101):
            epochs.append(done + step / 100 * own['train_epochs'])
            values.append(own['lr'] * swap94.learning_rate_share(step, 100, own['schedule']))
        done += own['train_epochs']
    return epochs, values


def draw(config, records, num_classes, stem):
    """Figure 6's rates, and the accuracies before and after averaging."""
    figure = new_figure(9, 4.5)
    left, right = figure.subfigures(1, 2)
    of_rates = left.subplots(len(WAYS), 1, sharex=True)
    axes = right.subplots()
    for i, (name, way) in enumerate(WAYS.items()):
        hyp = hyp_of_way(config['settings'], way, num_classes)
        _, cycles = chains(way, hyp['phase2']['workers'])
        of_rates[i].plot(*rates(hyp, cycles), color=COLOURS[i])
        of_rates[i].set_ylim(0, None)
        before, after = accuracies_of(records, name)
        row = np.full(len(before), i)
        axes.plot(before, row, 'o', color=COLOURS[i], markerfacecolor='white')
        axes.plot(after, row, 'o', color=COLOURS[i])
    of_rates[-1].set_xlabel('epochs')
    left.suptitle('learning rate')
    axes.set_yticks(range(len(WAYS)), WAYS)
    axes.set_ylim(len(WAYS) - 0.5, -0.5)
    axes.set_xlabel('test accuracy without TTA (%)')
    right.suptitle('before averaging (empty) and after')
    save_both(figure, stem)


def show(config, records, folder):
    records = two_whole_seeds(records, plan(config['settings'], []), folder)
    print_table(records)
    draw(config, records, config['data']['classes'], folder / 'swa')


STUDY = Study('swa', __doc__, SCALES, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
