"""Test accuracy of SWAP's workers and of their average, step by step (Gupta et al. 2020, Figure 1).

    python -m studies.progress                              # in ten minutes, on two CPU cores
    python -m studies.progress --scale full --dtype bfloat16  # swap94.py's networks, in 20 minutes
    torchrun --nproc_per_node=8 -m studies.progress --scale paper --net resnet9 --data cifar10
    python -m studies.progress --show --out logs/mine       # the table and the picture again

We train SWAP, and copy the weights at some steps of both phases. For phase 2 we average the copies
that the workers made at the same step. In the paper this average is consistently better than each
worker (section 3).

BatchNorm's statistics of all copies come from the images that the phase served last. If workers end
with a moving average of their weights, as those of swap94.py do, their last point has it.

--scale paper trains 3 seeds: with ResNet-9, 200 PFLOP, or half an A100-hour at airbench94's rate of
0.36 PFLOP in 3.29 seconds. --scale full trains one. --scale small trains narrow networks on a tenth
of the images.
"""

import copy
import itertools
import sys

import numpy as np

import swap94
from studies.common import Study, for_each_seed, in_cell, run_study
from studies.show import COLOURS, mean_text, new_figure, paired_p, print_table, save_both
from studies.swap import ALONE, hyp_of, loader_of, measure, scales, train_phase1, train_worker

SCALES = scales(
    {
        'paper': {'runs': 3, 'points': 16},  # in each phase
        'full': {'runs': 1, 'points': 9},
        'small': {'runs': 5, 'points': 9},
    }
)

#### What to train #################################################################################


def plan(settings, records):
    return for_each_seed([{'method': 'swap'}], settings)


def total_steps(place, hyp, phase):
    images = len(loader_of(place, hyp).images)
    epochs = swap94.plan_epochs(images, swap94.phase_settings(hyp, phase))
    return sum(steps for _, steps in epochs)


def spread(total, n):
    """n steps from 0 to total, or all of them if there are fewer."""
    return sorted(set(np.linspace(0, total, n, dtype=int).tolist()))


def learning_rates(own, total):
    """The filters' learning rate at each of so many steps. own: the settings of a phase."""
    shares = [swap94.learning_rate_share(step, total, own['schedule']) for step in range(total)]
    return [own['lr'] * share for share in shares]


def watched(steps, shards, copies):
    """swap94.compute_loss, but before some of the steps it appends the weights to a list.

    shards: how often a step calls it.
    """
    calls = itertools.count()

    def compute_loss(net, inputs, labels, label_smoothing):
        step, shard = divmod(next(calls), shards)
        if shard == 0 and step in steps:
            copies.append(copy.deepcopy(net.state_dict()))
        return swap94.compute_loss(net, inputs, labels, label_smoothing)

    return compute_loss


def with_copies(result, copies):
    """What swap94.fit returned, with each of the copied weights, and as it is."""
    return [result | {'weights': weights} for weights in (*copies, result['weights'])]


def steps_seen(planned, result):
    """After how many steps we have the weights: as planned, until the training ended."""
    last = result['record']['steps']  # tau may end it early
    return [*(step for step in planned if step < last), last]


def train(cell, seed, place):
    """Accuracies from 0 to 1 of phase 1, of each worker and of the average, at some steps."""
    hyp = hyp_of(place, 'swap')
    totals = {phase: total_steps(place, hyp, phase) for phase in ('phase1', 'phase2')}
    points = {phase: spread(total, place.settings['points']) for phase, total in totals.items()}

    def accuracy(result, phase):
        net.load_state_dict(result['weights'])
        return measure(place, hyp, net, result['losses'], phase)

    copies = []
    loss = watched(points['phase1'][:-1], hyp['phase1']['shards'], copies)
    net, phase1 = train_phase1(place, hyp, seed, loss)
    record = {'phase1': [accuracy(result, 'phase1') for result in with_copies(phase1, copies)]}
    workers = []
    for worker in range(hyp['phase2']['workers']):
        copies = []
        loss = watched(points['phase2'][:-1], hyp['phase2']['shards'], copies)
        result = train_worker(place, hyp, seed, worker, net, phase1, loss)
        workers.append(with_copies(result, copies))
    record['workers'] = [[accuracy(result, 'phase2') for result in results] for results in workers]
    record['average'] = []
    for at_step in zip(*workers):
        _, losses = swap94.average(at_step, net, phase1['losses'], ALONE)
        record['average'].append(measure(place, hyp, net, losses))
    record |= {'steps': {}, 'learning_rates': {}}
    for phase, of_phase in (('phase1', phase1), ('phase2', result)):
        steps = steps_seen(points[phase], of_phase)
        record['steps'][phase] = steps
        record['learning_rates'][phase] = learning_rates(hyp[phase], totals[phase])[: steps[-1]]
    return record


#### What to show ##################################################################################


def print_accuracies(records):
    """Print accuracies in phase 2, and whether the average is better than every worker."""
    of_seed = len(records[0]['workers'])
    about = f'n={len(records)}, with {of_seed} workers each; +-: 95% interval'
    print(f'test accuracy in % in phase 2; {about}')
    averages = 100 * np.array([record['average'] for record in records])
    workers = 100 * np.array([record['workers'] for record in records])  # (seeds, workers, steps)
    best = workers.max(1)
    rows = []
    for i, step in enumerate(records[0]['steps']['phase2']):
        values = workers.mean(1)[:, i], best[:, i], averages[:, i]
        rows.append([str(step), *(mean_text(value, '.2f') for value in values)])
    print_table(['step', 'workers (mean)', 'best of them', 'their average'], rows)
    later = slice(1, None)  # the workers begin at the same point
    wins = (averages > best)[:, later]
    print(f'the average is better than every worker at {wins.sum()} of {wins.size} steps;')
    if len(records) > 1:
        p = paired_p(averages[:, later].mean(1), best[:, later].mean(1))
        print(f'  better than the best of them in the mean of the steps: one-sided p={p:.2g}')
    print('the paper (section 3): "consistently better than each individual model"')


def draw_accuracies(record, stem):
    """Draw the accuracies of a seed, and the learning rates below."""
    figure = new_figure(8, 5.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    begin = record['steps']['phase1'][-1]
    later = [begin + step for step in record['steps']['phase2']]
    phase1, average = 100 * np.array(record['phase1']), 100 * np.array(record['average'])
    upper.plot(record['steps']['phase1'], phase1, 'o-', color=COLOURS[0], label='phase 1')
    for i, values in enumerate(100 * np.array(record['workers'])):
        label = 'workers' if i == 0 else None
        upper.plot(later, values, color=COLOURS[5], linewidth=1, label=label)
    upper.plot(later, average, 'o-', color=COLOURS[1], label='their average')
    lowest = phase1[len(phase1) // 2 :].min()  # the first steps are far below what we want to see
    upper.set(ylabel='test accuracy (%)', ylim=(lowest - 1, average.max() + 1))
    upper.legend(loc='lower right')
    for first, phase in ((0, 'phase1'), (begin, 'phase2')):
        rates = record['learning_rates'][phase]
        lower.plot(range(first, first + len(rates)), rates, color='black')
    lower.set(xlabel='step', ylabel='learning\nrate', ylim=(0, None))
    for axes in (upper, lower):
        axes.axvline(begin, color='grey', linestyle=':')
    save_both(figure, stem)


def show(config, records, folder):
    records = in_cell(records)
    print_accuracies(records)
    draw_accuracies(records[0], folder / 'progress')


STUDY = Study('progress', __doc__, SCALES, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
