"""Small batches, large batches and SWAP (Gupta et al. 2020).

Tables 1 and 2, with the settings of Tables 5 and 6.

    python -m studies.swap_tables                           # in ten minutes, on two CPU cores
    torchrun --nproc_per_node=8 -m studies.swap_tables --net resnet9 --scale paper --data cifar10
    python -m studies.swap_tables --show --out logs/mine    # the table and the picture again

--net airbench is swap94.py's network, and at paper scale its settings. --net resnet9 is the
paper's: DAWNBench's ResNet-9, trained with SGD, Nesterov's momentum, cutout, and the batches,
epochs and learning rates of Table 5, or of Table 6 for 100 classes. Where the paper does not say
what it did, we use cutout of 8 pixels, shifts of up to 4, alternating flip, and learning rates that
rise to their peak and fall to 0 linearly. Phase 2 begins without momentum, and BatchNorm's
statistics come from full batches only.

Accuracies are without test-time augmentation. Operations and all-reduces are those of the slowest
of 8 ranks that share phase 1's shards and train a worker each; where there is one shard, as with
--net airbench's small batches, one rank does all the work. The seconds are those of one
process that does everything in turn, without validation.

--scale paper trains 10 networks for each row: with ResNet-9, 720 PFLOP, or 600 for 100 classes.
That is two A100-hours at airbench94's rate of 0.36 PFLOP in 3.29 seconds. --scale small trains
narrow networks on a tenth of the images.
"""

import sys

import numpy as np

import swap94
from lab.flops import swap_costs
from studies.common import Study, for_each_seed, in_cell, run_study, whole_seeds
from studies.show import COLOURS, mean_text, new_figure, paired_p, print_table, save_both
from studies.swap import FUNCTIONS, check_finished, hyp_of, loader_of, recipe_of, scales

SCALES = scales({'paper': {'runs': 10}, 'small': {'runs': 6}})
METHODS = ['small-batch', 'large-batch', 'swap']
ROWS = ['small-batch', 'large-batch', 'SWAP, before averaging', 'SWAP, after averaging']
COSTS = {'training_seconds': '.1f', 'pflop': '.2g', 'all_reduces': '.0f'}

# Tables 1 and 2. {number of classes: (accuracy in %, its standard deviation, seconds on 8 V100s) of
# each row}
PUBLISHED = {
    10: [(95.24, 0.09, 254), (94.77, 0.23, 133), (94.70, 0.20, 168), (95.23, 0.08, 169)],
    100: [(77.01, 0.25, 574), (75.84, 0.35, 116), (75.74, 0.15, 123), (78.18, 0.21, 125)],
}


#### What to train #################################################################################


def plan(settings, records):
    """Every method, seed by seed."""
    cells = [{'method': method} for method in METHODS]
    return for_each_seed(cells, settings)


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


#### What to show ##################################################################################


def accuracies_of(records):
    """{row: accuracies in percent, by seed}. Those before averaging are means of the workers'."""
    small, large, swap = [in_cell(records, method=method) for method in METHODS]
    groups = [[record['val_acc'] for record in of_method] for of_method in (small, large)]
    groups.append([np.mean(record['workers']) for record in swap])
    groups.append([record['val_acc'] for record in swap])
    return {row: 100 * np.array(group) for row, group in zip(ROWS, groups)}


def print_methods(records, accuracies, published):
    """Print accuracies and what the methods cost. published: as in PUBLISHED, or None."""
    n = len(accuracies[ROWS[0]])
    print(f'accuracy in %, n={n}, with its standard deviation; the paper on 8 V100s')
    titles = ['', 'accuracy', 'seconds', 'PFLOP', 'all-reduces', 'paper: accuracy', 'seconds']
    with_costs = {ROWS[0]: 'small-batch', ROWS[1]: 'large-batch', ROWS[3]: 'swap'}
    rows = []
    for i, (name, values) in enumerate(accuracies.items()):
        row = [name, f'{values.mean():.2f} +-{values.std(ddof=1):.2f}']
        of_method = in_cell(records, method=with_costs.get(name))
        for key, form in COSTS.items():
            costs = [record[key] for record in of_method]
            row.append(f'{np.mean(costs):{form}}' if costs else '')
        if published:
            accuracy, deviation, seconds = published[i]
            row += [f'{accuracy:.2f} +-{deviation:.2f}', str(seconds)]
        rows.append(row)
    print_table(titles if published else titles[:5], rows)


def print_gains(accuracies, what='SWAP after averaging over the others'):
    """How much better SWAP's averages are than the other rows, and p."""
    ours = accuracies[ROWS[3]]
    print(f'\n{what}, with 95% interval; one-sided p that it is better:')
    for row in (ROWS[2], ROWS[1], ROWS[0]):
        gain, p = mean_text(ours - accuracies[row], '+.2f'), paired_p(ours, accuracies[row])
        print(f'  {row:22} {gain}, p={p:.2g}')


def draw_methods(accuracies, published, stem):
    """Every network of every row, and their means; and the paper's means and deviations."""
    figure = new_figure(10, 3.4)
    ours, theirs = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for i, (values, colour) in enumerate(zip(accuracies.values(), COLOURS)):
        ours.plot(values, np.full(len(values), i), 'o', color=colour, alpha=0.5)
        ours.plot([values.mean()], [i], '|', color='black', markersize=24)
        if published:
            accuracy, deviation, *_ = published[i]
            theirs.errorbar(accuracy, i, xerr=deviation, fmt='o', color=colour, capsize=3)
    ours.set_yticks(range(len(ROWS)), ROWS)
    ours.set(ylim=(len(ROWS) - 0.5, -0.5), title='here')
    theirs.set(title='paper')
    ours.set_xlabel('test accuracy without TTA (%);\nthe line is the mean')
    theirs.set_xlabel('mean and\nstandard deviation (%)')
    save_both(figure, stem)


def show(config, records, folder):
    records = whole_seeds(records, plan(config['settings'], []), folder, least=2)
    accuracies = accuracies_of(records)
    published = PUBLISHED.get(config['data']['classes'])
    print_methods(records, accuracies, published)
    print_gains(accuracies)
    draw_methods(accuracies, published, folder / 'swap_tables')


STUDY = Study('swap_tables', __doc__, SCALES, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
