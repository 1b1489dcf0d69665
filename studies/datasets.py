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
from studies.common import Study, for_each_seed, in_cell, run_study
from studies.show import COLOURS, mean_text, new_figure, print_table, save_both

NARROW = ['net.widths.block1=16', 'net.widths.block2=32', 'net.widths.block3=64']
PAPER = {
    'hyp': [],
    'images': None,  # of the training set: all
    'runs': 10,
}
SMALL = {
    'hyp': [*NARROW, 'opt.train_epochs=8', 'opt.batch_size=100', 'net.tta_level=1'],
    'images': 5000,
    'runs': 3,
}
SCALES = {'paper': PAPER, 'small': SMALL}
CUTOUTS = (0, 12)  # pixels

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


#### What to train #################################################################################


def plan(settings, records):
    cells = [{'cutout': cutout} for cutout in CUTOUTS]
    return for_each_seed(cells, settings)


def train(cell, seed, place):
    """A network's accuracies, in [0, 1], without and with test-time augmentation."""
    hyp = place.hyp(airbench96, [*place.settings['hyp'], f'aug.cutout={cell["cutout"]}'])
    loader = place.training_loader(hyp['opt']['batch_size'], hyp['aug'])
    net = place.train(airbench96, loader, hyp, seed)
    return place.accuracies(net, hyp)


#### What to show ##################################################################################

KINDS = {'val_acc': 'without TTA', 'tta_val_acc': 'with TTA'}


def accuracies_of(records, cutout, key):
    return [100 * record[key] for record in in_cell(records, cutout=cutout)]


def print_accuracies(name, records):
    print(f'{name}: accuracy in %, with the 95% interval of its mean')
    rows = []
    for cutout in CUTOUTS:
        n = len(in_cell(records, cutout=cutout))
        if n > 0:
            row = [str(cutout), str(n)]
            row += [mean_text(accuracies_of(records, cutout, key), '.2f') for key in KINDS]
            published = PUBLISHED.get((name, cutout), (None, None))
            rows.append([*row, *(str(accuracy or '-') for accuracy in published)])
    papers = ['paper: ResNet-18', 'paper: airbench96']
    print_table(['cutout', 'n', *KINDS.values(), *papers], rows)


def draw_accuracies(name, records, stem):
    """A dot for each network's accuracy, and the paper's, if it has the set."""
    figure = new_figure(9, 3)
    ours, theirs = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    rows = []
    for cutout, colour in zip(CUTOUTS, COLOURS):
        of_paper = dict(zip(KINDS, PUBLISHED.get((name, cutout), (None, None))))
        for key, kind in KINDS.items():
            values = accuracies_of(records, cutout, key)
            ours.plot(values, [len(rows)] * len(values), 'o', color=colour, alpha=0.6)
            if of_paper[key]:
                marker = 's' if key == 'val_acc' else 'o'
                theirs.plot(of_paper[key], len(rows), marker, color=colour)
            rows.append(f'cutout {cutout}, {kind}')
    ours.set_yticks(range(len(rows)), rows)
    ours.set(ylim=(len(rows) - 0.5, -0.5), title=f'airbench96 on {name}, here')
    ours.set_xlabel('test accuracy (%)')
    theirs.set(title='paper', xlabel='test accuracy (%)\nsquares: ResNet-18')
    save_both(figure, stem)


def show(config, records, folder):
    name = Path(config['data']['path']).name
    print_accuracies(name, records)
    draw_accuracies(name, records, folder / 'datasets')


STUDY = Study('datasets', __doc__, {'airbench96': SCALES}, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
