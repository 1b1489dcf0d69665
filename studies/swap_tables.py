"""Small batches, large batches and SWAP (Gupta et al. 2020).

Tables 1 and 2, with the settings of Tables 5 and 6.

    python -m studies.swap_tables                           # in ten minutes, on two CPU cores
    torchrun --nproc_per_node=8 -m studies.swap_tables --net resnet9 --scale paper --data cifar10
    python -m studies.swap_tables --show --out logs/mine    # the table and the picture again

--net airbench is swap94.py's network, and at paper scale its settings. --net resnet9 is the
paper's: DAWNBench's ResNet-9, trained with SGD, Nesterov's momentum, cutout, and the batches,
epochs and learning rates of Table 5, or of Table 6 for 100 classes. Where the paper does not say
what it did, we use cutout of 8 pixels, shifts of up to 4, alternating flip, and learning rates that
rise to their peak and fall to 0 linearly.

Accuracies are without test-time augmentation. Operations and all-reduces are those of the slowest
of 8 ranks that share phase 1's batches and train a worker each. The seconds are those of one
process that does everything in turn, without validation.

--scale paper trains 10 networks for each row: with ResNet-9, 720 PFLOP, or 600 for 100 classes.
That is two A100-hours at airbench94's rate of 0.36 PFLOP in 3.29 seconds. --scale small trains
narrow networks on a tenth of the images.
"""

import sys

import numpy as np

import swap94
from lab.flops import swap_costs
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
    whole_seeds,
)
from studies.swap import FUNCTIONS, check_finished, hyp_of, loader_of, recipe_of, scales

SCALES = scales({'paper': {'runs': 10}, 'small': {'runs': 6}, 'smoke': {'runs': 2}})
METHODS = ['small-batch', 'large-batch', 'swap']
ROWS = ['small-batch', 'large-batch', 'SWAP, before averaging', 'SWAP, after averaging']

# {number of classes: (accuracy in %, its standard deviation, seconds on 8 V100s) of each row}
PUBLISHED = {
    10: [(95.24, 0.09, 254), (94.77, 0.23, 133), (94.70, 0.20, 168), (95.23, 0.08, 169)],
    100: [(77.01, 0.25, 574), (75.84, 0.35, 116), (75.74, 0.15, 123), (78.18, 0.21, 125)],
}


#### Training ######################################################################################


def plan(settings, records):
    """Every method, seed by seed."""
    cells = [{'method': method} for method in METHODS]
    return [(cell, seed) for seed in range(settings['runs']) for cell in cells]


def train(cell, seed, place):
    """A network's accuracy, its workers' before averaging, from 0 to 1, and what it cost."""
    hyp = hyp_of(place, cell['method'])
    net = place.settings['net']
    loader, tests = loader_of(place, hyp), place.test_loader
    _, record = swap94.train(loader, tests, hyp, seed, **FUNCTIONS[net])
    for result in (record, *record['workers']):
        check_finished(result, seed)
    sizes = len(loader.images), len(tests.images), place.num_classes
    costs = swap_costs(recipe_of(net), hyp, *sizes, record).values()
    return {
        'val_acc': record['val_acc'],
        'workers': [worker['val_acc'] for worker in record['workers']],
        'joint_epochs': len(record['phase1']['epochs']),
        'training_seconds': record['seconds'],
        'pflop': sum(cost['pflop'] for cost in costs),
        'all_reduces': sum(cost['all_reduces'] for cost in costs),
    }


#### Table and picture #############################################################################


def accuracies_of(records):
    """{row: accuracies in percent, by seed}. Those before averaging are means of the workers'."""
    found = {}
    for method, row in zip(METHODS, [*ROWS[:2], ROWS[3]]):
        of_method = by_seed(records, method=method)
        found[row] = np.array([100 * record['val_acc'] for record in of_method])
    found[ROWS[2]] = np.array([100 * np.mean(record['workers']) for record in of_method])
    return found


def costs_of(records):
    """{row: (seconds, PFLOP, all-reduces)}, means over the seeds."""
    found = {}
    for method, row in zip(METHODS, [*ROWS[:2], ROWS[3]]):
        keys = ('training_seconds', 'pflop', 'all_reduces')
        of_method = in_cell(records, method=method)
        found[row] = [np.mean([record[key] for record in of_method]) for key in keys]
    return found


def print_table(accuracies, costs, published):
    n = len(accuracies[ROWS[0]])
    about = f'accuracy in %, n={n}, with its standard deviation'
    print(f'{about:72} of the paper, on 8 V100s:')
    columns = f'{"accuracy":>14} {"seconds":>12} {"PFLOP":>9} {"all-reduces":>11}'
    print(f'{"":22} {columns} {"accuracy":>17} {"seconds":>8}')
    for i, row in enumerate(ROWS):
        values = accuracies[row]
        line = f'{row:22} {values.mean():6.2f} +-{values.std(ddof=1):5.2f}'
        if row in costs:
            seconds, pflop, all_reduces = costs[row]
            line += f' {seconds:12.1f} {pflop:9.2g} {all_reduces:11.0f}'
        if published:
            accuracy, deviation, seconds = published[i]
            line = f'{line:72} {accuracy:9.2f} +-{deviation:5.2f} {seconds:8}'
        print(line)
    ours = accuracies[ROWS[3]]
    print(
        '\nSWAP after averaging over the others, with 95% interval; one-sided p that it is better:'
    )
    for row in (ROWS[2], ROWS[1], ROWS[0]):
        gain, half = mean_and_interval(ours - accuracies[row])
        p = paired_p(ours, accuracies[row])
        print(f'  {row:22} {gain:+6.2f} +-{half:5.2f}, p={p:.2g}')


def draw(accuracies, stem):
    """Every network of every row, and their means."""
    figure = new_figure(8, 2.6)
    axes = figure.subplots()
    for i, (row, colour) in enumerate(zip(ROWS, COLOURS)):
        values = accuracies[row]
        axes.plot(values, np.full(len(values), i), 'o', color=colour, alpha=0.5)
        axes.plot([values.mean()], [i], '|', color='black', markersize=24)
    axes.set_yticks(range(len(ROWS)), ROWS)
    axes.set_ylim(len(ROWS) - 0.5, -0.5)
    axes.set_xlabel('test accuracy without TTA (%); the line is the mean')
    save_both(figure, stem)


def show(config, records, folder):
    records = whole_seeds(records, plan(config['settings'], []), folder, least=2)
    accuracies = accuracies_of(records)
    print_table(accuracies, costs_of(records), PUBLISHED.get(config['data']['classes']))
    draw(accuracies, folder / 'swap_tables')


STUDY = Study('swap_tables', __doc__, SCALES, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
