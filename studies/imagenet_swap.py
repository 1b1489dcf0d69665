"""Small batches, large batches and SWAP on ImageNet (Gupta et al. 2020, Table 3, Figure 5).

    python -m studies.imagenet_swap --data imagenette       # 90 minutes on a CPU core
    torchrun --nnodes=2 --nproc_per_node=8 -m studies.imagenet_swap --scale paper --net resnet50 \\
        --data IMAGENET --out DIR
    python -m studies.imagenet_swap --show --out DIR        # the table and the pictures again

The small-batch schedule is the public one that the paper used (cybertronai/imagenet18_old). Large
batches have twice the shards and rates, on twice the ranks. SWAP trains on large batches at first;
then half of the ranks train a worker each, on the last segments of the small-batch schedule. Their
weights are averaged, and BatchNorm's statistics are computed anew. So small batches train on half
of the ranks, too, and the other half does the same work in vain. One process does everything alone,
and trains the workers in turn. We test on centre crops, where the public code has rectangles.

All ranks need to see --data and --out. Several processes can share an --out, but not several jobs
of torchrun. --scale paper is 3 seeds, each of 140 V100-hours at the paper's speed. At --scale small
all sizes are a quarter of the paper's, for a few thousand pictures of about 128 pixels.
"""

import itertools
import math
import sys

import numpy as np
import torch
from torch.optim.swa_utils import update_bn

import swap94
from lab.errors import UserError
from lab.training import join_ranks
from studies import imagenet
from studies.common import (
    Study,
    for_each_seed,
    in_cell,
    run_study,
    settings_of,
    train_planned,
    whole_seeds,
)
from studies.pictures import TrainingImages, rate_at, segment, segment_of
from studies.show import COLOURS, new_figure, print_table, save_both
from studies.swap_tables import METHODS, ROWS, draw_methods, print_gains

# Table 3: top-1 and top-5 accuracy in % with standard deviations, and minutes, of each of ROWS.
PUBLISHED = [
    (76.14, 0.07, 93.30, 0.07, 235.29),
    (75.86, 0.03, 92.98, 0.06, 127.20),
    (75.96, 0.02, 93.15, 0.02, 149.12),
    (76.19, 0.03, 93.32, 0.02, 156.55),
]
COMMON = {
    'switch': 22,  # the epoch in which SWAP's large batches end
    'workers': 2,
    'momentum': 0.9,
    'weight_decay': 1e-4,
    'label_smoothing': 0.0,
    'blurs': False,
    'statistics': 0.1,  # share of an epoch from which BatchNorm's statistics are computed anew
}
SCALES = {
    'paper': COMMON
    | {
        'schedule': [  # of small batches; a shard is what a GPU has
            segment([0, 7], 128, 0.08, 8, 512, [1.0, 2.0]),
            segment([7, 13], 128, 0.08, 8, 512, [2.0, 0.25]),
            segment([13, 22], 224, 0.087, 8, 224, [0.4375, 0.04375]),
            segment([22, 25], 224, 0.087, 8, 224, [0.04375, 0.004375]),
            segment([25, 28], 288, 0.5, 8, 128, [0.0025, 0.00025]),
        ],
        'test_crop': [288, 0.875],
        'runs': 3,
    },
    'small': COMMON
    | {
        'schedule': [
            segment([0, 7], 32, 0.08, 1, 64, [0.06, 0.12]),
            segment([7, 13], 32, 0.08, 1, 64, [0.12, 0.015]),
            segment([13, 22], 56, 0.087, 1, 32, [0.03, 0.003]),
            segment([22, 25], 56, 0.087, 1, 32, [0.003, 0.0003]),
            segment([25, 28], 72, 0.5, 1, 16, [0.00015, 0.000015]),
        ],
        'test_crop': [72, 0.875],
        'runs': 3,
    },
}


#### What to train #################################################################################


def doubled(schedule):
    """The large-batch schedule: twice the shards, and twice the rates."""
    found = []
    for part in schedule:
        rates = [2 * rate for rate in part['rates']]
        found.append(part | {'shards': 2 * part['shards'], 'rates': rates})
    return found


def schedules_of(settings):
    """The schedules of each of METHODS: a list of one, or of SWAP's two phases."""
    small, switch = settings['schedule'], settings['switch']
    large = doubled(small)
    phase1 = [part for part in large if part['epochs'][1] <= switch]
    phase2 = [part for part in small if part['epochs'][0] >= switch]
    return {'small-batch': [small], 'large-batch': [large], 'swap': [phase1, phase2]}


def plan(settings, records):
    """Every method, seed by seed."""
    cells = [{'method': method} for method in METHODS]
    return for_each_seed(cells, settings)


def half_of(everyone):
    """The half of the ranks that this one is in. Raises UserError for an odd number of ranks."""
    if everyone.size > 1 and everyone.size % 2:
        raise UserError(f'{everyone.size} processes have no halves; start an even number')
    return swap94.form_teams(max(1, everyone.size // 2))


def train(cell, seed, place):
    """A network's accuracies, from 0 to 1, its losses, and its seconds of training."""
    everyone = swap94.all_ranks()
    ranks = half_of(everyone) if cell['method'] == 'small-batch' else everyone
    first, *rest = schedules_of(place.settings)[cell['method']]
    images = TrainingImages(place.train, first, seed, 'random')
    net = imagenet.make_net(place, seed)
    checkpoint = place.checkpoint(cell, seed, f'network{everyone.rank // ranks.size}')
    record = imagenet.fit(net, images, place, ranks, checkpoint)
    if rest:
        record |= train_workers(cell, seed, place, net, rest[0])
    record |= imagenet.evaluate(net, place.settings['test_crop'], place, ranks)
    damaged = everyone.gather(place.train.damaged | place.val.damaged)
    record['damaged'] = len(set().union(*damaged))
    place.remove_checkpoints(cell, seed)
    return record


def train_workers(cell, seed, place, net, schedule):
    """SWAP's second phase, after which `net` is the average of its workers.

    Returns:
        {'workers': their accuracies, losses and seconds, 'phase2_seconds': of the slowest rank,
        'averaging_seconds': of the average, and of BatchNorm's statistics}.
    """
    everyone = swap94.all_ranks()
    half = half_of(everyone)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    records, weights = [], []
    step = everyone.size // half.size
    for worker in range(everyone.rank // half.size, place.settings['workers'], step):
        net.load_state_dict(before)
        worker_seed = swap94.worker_seed(seed, worker)
        images = TrainingImages(place.train, schedule, worker_seed, 'random')
        checkpoint = place.checkpoint(cell, seed, f'worker{worker}')
        record = imagenet.fit(net, images, place, half, checkpoint)
        record |= imagenet.evaluate(net, place.settings['test_crop'], place, half)
        records.append(record)
        weights.append([p.detach().clone() for p in net.parameters()])
    of_ranks = everyone.gather(records)  # now all have finished, and the clock can start
    start = swap94.clock(place.device)
    average(net, weights, everyone)
    recompute_statistics(net, schedule, seed, place)
    averaging_seconds = swap94.clock(place.device) - start
    seconds = [sum(record['training_seconds'] for record in records) for records in of_ranks]
    return {
        'workers': list(itertools.chain(*of_ranks[:: half.size])),
        'phase2_seconds': max(seconds),
        'averaging_seconds': averaging_seconds,
    }


@torch.no_grad()
def average(net, workers, ranks):
    """Load the mean of all ranks' workers into `net`.

    Args:
        workers: this rank's, each a list of weights. All ranks have as many.
    """
    for p, *weights in zip(net.parameters(), *workers):
        mean = torch.stack(weights).mean(0) / ranks.size
        p.copy_(ranks.sum(mean.contiguous()))


def recompute_statistics(net, schedule, seed, place):
    """Compute BatchNorm's statistics anew, from a share of the images of a schedule's last epoch.

    All ranks take part in it. So there are as many shards as in large batches.
    """
    everyone = swap94.all_ranks()
    images = TrainingImages(place.train, doubled(schedule), seed, 'random')
    last = images.epochs[-1:]
    steps = math.ceil(place.settings['statistics'] * images.steps(last[0]))
    shards = segment_of(images.schedule, last[0])['shards'] // everyone.size
    keys = itertools.islice(images.keys(last, everyone), steps * shards)
    with place.autocast():
        update_bn(place.batches(images, keys), net)
    imagenet.mean_statistics(net, everyone)


#### Ranks #########################################################################################


def lead(cell, seed, place):
    """`train` on the first rank, which tells the others what to train."""
    swap94.all_ranks().gather((cell, seed))
    return train(cell, seed, place)


def follow(place):
    """What the other ranks do, until the first one has no more networks to train."""
    while True:
        job = swap94.all_ranks().gather(None)[0]
        if job is None:
            return
        train(*job, place)


def check(place):
    """Raise UserError if these ranks cannot train all that we plan on these pictures."""
    everyone = swap94.all_ranks()
    half = half_of(everyone)
    teams = {'small-batch': [half], 'large-batch': [everyone], 'swap': [everyone, half]}
    for method, schedules in schedules_of(place.settings).items():
        for schedule, ranks in zip(schedules, teams[method]):
            TrainingImages(place.train, schedule, 0, 'random').check(ranks)


def train_together(study, args, folder):
    """Train all that the study plans. All processes of torchrun train each network together."""
    place = imagenet.open_place(settings_of(study, args), args, folder)
    join_ranks(swap94, place.device)
    everyone = swap94.all_ranks()
    check(place)
    if everyone.rank > 0:
        follow(place)
        return
    train_planned(study, args.scale, place, place.describe_data())
    everyone.gather(None)


#### What to show ##################################################################################


def accuracies_of(records, key):
    """{row: accuracies in percent, by seed}. Those before averaging are means of the workers'."""
    small, large, swap = [in_cell(records, method=method) for method in METHODS]
    groups = [[record[key] for record in of_method] for of_method in (small, large)]
    groups.append([np.mean([worker[key] for worker in record['workers']]) for record in swap])
    groups.append([record[key] for record in swap])
    return {row: 100 * np.array(group) for row, group in zip(ROWS, groups)}


def seconds_of(records):
    """{row: mean seconds of training}."""
    small, large, swap = [in_cell(records, method=method) for method in METHODS]
    groups = [[record['training_seconds'] for record in of_method] for of_method in (small, large)]
    groups.append([record['training_seconds'] + record['phase2_seconds'] for record in swap])
    averaging = [record['averaging_seconds'] for record in swap]
    groups.append(np.add(groups[-1], averaging))
    return {row: np.mean(group) for row, group in zip(ROWS, groups)}


def print_schedules(settings):
    """Figure 5's schedules, as a table."""
    rows = []
    for method, schedules in schedules_of(settings).items():
        for part in itertools.chain(*schedules):
            (first, last), (start, end) = part['epochs'], part['rates']
            images = str(part['shards'] * part['batch'])
            rate = f'{start:.3g} to {end:.3g}'
            rows.append([method, f'{first} to {last}', str(part['pixels']), images, rate])
    print_table(['method', 'epochs', 'pixels', 'images a step', 'learning rate'], rows)


def print_accuracies(top1, top5, seconds):
    n = len(top1[ROWS[0]])
    print(f'\naccuracy in %, n={n}, with its standard deviation; the paper on V100s')
    rows = []
    for row, published in zip(ROWS, PUBLISHED):
        texts = [row]
        for values in (top1[row], top5[row]):
            texts.append(f'{values.mean():.2f} +-{values.std(ddof=1):.2f}')
        texts.append(f'{seconds[row]:.0f}')
        top1_there, deviation1, top5_there, deviation5, minutes = published
        texts.append(f'{top1_there:.2f} +-{deviation1:.2f}')
        texts.append(f'{top5_there:.2f} +-{deviation5:.2f}')
        rows.append([*texts, f'{60 * minutes:.0f}'])
    print_table(['', 'top-1', 'top-5', 'seconds', 'paper: top-1', 'top-5', 'seconds'], rows)


def draw_schedules(settings, stem):
    """Figure 5: learning rate and images a step against epochs, here and in the paper."""
    figure = new_figure(11, 7)
    here, paper = figure.subplots(2, 2)
    draw_schedule(*here, settings, 'here')
    draw_schedule(*paper, SCALES['paper'], 'paper')
    handles = here[0].get_legend_handles_labels()
    figure.legend(*handles, loc='outside upper center', ncols=len(METHODS))
    save_both(figure, stem)


def draw_schedule(left, right, settings, title):
    """Two panels with each method's learning rates, and its images a step."""
    methods = schedules_of(settings).items()
    for (method, schedules), colour, style in zip(methods, COLOURS, ('-', '-', '--')):
        epochs, rates, images = [], [], []
        for part in itertools.chain(*schedules):
            of_part = np.linspace(*part['epochs'], 50)  # a line in the rate is a curve in its log
            epochs.extend(of_part)
            rates.extend(rate_at(part, epoch) for epoch in of_part)
            images.extend([part['shards'] * part['batch']] * len(of_part))
        for axes, values in ((left, rates), (right, images)):
            axes.plot(epochs, values, style, color=colour, label=method)
    left.set(xlabel='epoch', ylabel='learning rate', yscale='log', title=title)
    right.set(xlabel='epoch', ylabel='images a step', ylim=(0, None), title=title)


def show(config, records, folder):
    settings = config['settings']
    records = whole_seeds(records, plan(settings, []), folder, least=2)
    top1, top5 = accuracies_of(records, 'top1'), accuracies_of(records, 'top5')
    print_schedules(settings)
    print_accuracies(top1, top5, seconds_of(records))
    for kind, accuracies in (('top-1', top1), ('top-5', top5)):
        print_gains(accuracies, f'{kind} accuracy of SWAP after averaging over the others')
    draw_schedules(settings, folder / 'schedules')
    draw_methods(top1, PUBLISHED, folder / 'imagenet_swap')


NETS = {'resnet18': SCALES, 'resnet50': SCALES}
OWN = {'add_options': imagenet.add_options, 'train_cells': train_together}
STUDY = Study('imagenet_swap', __doc__, NETS, plan, lead, show, **OWN)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
