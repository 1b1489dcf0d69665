"""airbench96 on other sets (Jordan 2024, Table 5).

    python -m lab data cifar100                     # or svhn, or PICTURES DEST
    python -m studies.datasets --data cifar100      # narrow networks on a tenth of it
    python -m studies.datasets --data cifar100 --scale paper --out logs/mine

We train airbench96 with and without cutout. Nothing else changes, except that we do not mirror
digits like SVHN's, neither in training nor in test-time augmentation. If the folder of the set is
called cifar10, cifar100, cinic10 or svhn, the table also has the paper's accuracies. --scale paper
trains 10 networks in both cells: 144 PFLOP at the paper's 7.2, or a quarter of an A100-hour at its
46.3 seconds.
"""

import sys
from pathlib import Path

import airbench96
from lab.summary import new_figure
from studies.common import COLOURS, Study, in_cell, mean_and_interval, run_study, save_both

NARROW = ['net.widths.block1=16', 'net.widths.block2=32', 'net.widths.block3=64']
SCALES = {
    'paper': {
        'hyp': [],
        'images': None,  # of the training set: all
        'runs': 10,
    },
    'small': {
        'hyp': [*NARROW, 'opt.train_epochs=8', 'opt.batch_size=100', 'net.tta_level=1'],
        'images': 5000,
        'runs': 3,
    },
    'smoke': {
        'hyp': [*NARROW, 'opt.train_epochs=1', 'opt.batch_size=50', 'net.tta_level=1'],
        'images': 200,
        'runs': 1,
    },
}

# Table 5, in percent: (set, cutout): (ResNet-18 without TTA, from the literature; airbench96)
PUBLISHED = {
    ('cifar10', 0): (95.55, 95.61),
    ('cifar10', 12): (96.01, 96.05),
    ('cifar100', 0): (77.54, 79.27),
    ('cifar100', 12): (78.04, 79.76),
    ('cinic10', 0): (87.58, 87.78),
    ('cinic10', 12): (None, 88.22),
    ('svhn', 0): (97.35, 97.38),
    ('svhn', 12): (None, 97.64),
}


#### Training ######################################################################################


def plan(settings, records):
    cells = [{'cutout': cutout} for cutout in (0, 12)]
    return [(cell, seed) for seed in range(settings['runs']) for cell in cells]


def train(cell, seed, place):
    """A network's accuracies, in [0, 1], without and with test-time augmentation."""
    hyp = place.hyp(airbench96, [*place.settings['hyp'], f'aug.cutout={cell["cutout"]}'])
    loader = place.training_loader(hyp['opt']['batch_size'], hyp['aug'])
    net = place.train(airbench96, loader, hyp, seed)
    return place.accuracies(net, hyp)


#### Table and picture #############################################################################

KINDS = {'val_acc': 'without TTA', 'tta_val_acc': 'with TTA'}


def print_table(name, records):
    print(f'{name}: accuracy in %, with the 95% interval of its mean')
    print('                                                    of the paper:')
    print('cutout    n       without TTA          with TTA   ResNet-18 airbench96')
    for cutout in (0, 12):
        cell = in_cell(records, cutout=cutout)
        if not cell:
            continue
        row = f'{cutout:6} {len(cell):4}'
        for key in KINDS:
            mean, half = mean_and_interval([100 * record[key] for record in cell])
            row += f'{mean:11.2f} +-{half:4.2f}'
        for published in PUBLISHED.get((name, cutout), ()):
            row += f'{published or "-":>11}'
        print(row)


def draw(name, records, stem):
    """A dot for each network's accuracy."""
    figure = new_figure(7, 2.4)
    axes = figure.subplots()
    rows = []
    for cutout, colour in zip((0, 12), COLOURS):
        for key, kind in KINDS.items():
            values = [100 * record[key] for record in in_cell(records, cutout=cutout)]
            axes.plot(values, [len(rows)] * len(values), 'o', color=colour, alpha=0.6)
            rows.append(f'cutout {cutout}, {kind}')
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel='test accuracy (%)', title=f'airbench96 on {name}, a dot a network')
    save_both(figure, stem)


def show(config, records, folder):
    name = Path(config['data']['path']).name
    print_table(name, records)
    draw(name, records, folder / 'datasets')


STUDY = Study('datasets', __doc__, {'airbench96': SCALES}, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
