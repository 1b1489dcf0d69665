"""Alternating flip against random flip and none on ImageNet (Jordan 2024, Table 3, section 5.2).

    python -m studies.imagenet_flip --data imagenette       # 90 minutes on a CPU core
    torchrun --nproc_per_node=8 -m studies.imagenet_flip --scale paper --data IMAGENET --out DIR
    python -m studies.imagenet_flip --show --out DIR        # the table and the picture again

Each network is a ResNet-18, trained by one process. The paper follows ffcv-imagenet's rn18 configs:
BlurPool, label smoothing, and larger crops in the last 4 of 16 and 17 of 88 epochs. The Heavy crop
takes 8% to 100% of a picture; the Light crop only moves along the longer side. Each network is
tested on two centre crops, CC(pixels, share of the resized shorter side), without and with the
mirror image (TTA). We differ in the pictures, which are JPEGs as they are, in the loader, in
residual blocks that begin as identities, and in that no BatchNorm has weight decay.

--scale paper trains 162 networks. ffcv's table has 35 A100-minutes for 16 epochs and 187 for 88, so
that is about 125 A100-hours, if the loader keeps up: it then has to read 10,000 pictures a second
for each GPU. At --scale small all sizes are a quarter of the paper's, for a few thousand pictures
of about 128 pixels. If they are square, the Light crop is no crop at all, and flips are the only
augmentation.
"""

import itertools
import sys

import numpy as np

import swap94
from lab.errors import UserError
from studies import imagenet
from studies.common import Study, in_cell, run_study
from studies.pictures import FLIPS, TrainingImages, segment
from studies.show import COLOURS, mean_text, new_figure, paired_p, print_table, save_both

LEAST_AREAS = {'heavy': 0.08, 'light': None}
OPTIMIZER = {'momentum': 0.9, 'weight_decay': 5e-5, 'label_smoothing': 0.1}
# 'cells': crop, epochs, and how many networks with each of FLIPS.
# 'pixels': at first, and in the last epochs.
# 'test_crops': pixels, and share of the resized shorter side.
SCALES = {
    'paper': {
        'cells': [
            ['heavy', 16, [8, 28, 28]],
            ['light', 16, [4, 26, 26]],
            ['light', 20, [0, 16, 16]],
            ['heavy', 88, [2, 4, 4]],
        ],
        'pixels': [160, 192],
        'batch': 1024,  # images
        'rate': 0.5,  # the highest, after
        'warm_up': 2,  # epochs
        'blurs': True,
        'test_crops': [[256, 0.875], [192, 1.0]],
        **OPTIMIZER,
    },
    'small': {
        'cells': [['light', 16, [4, 4, 4]], ['heavy', 16, [2, 2, 2]]],
        'pixels': [40, 48],
        'batch': 64,
        'rate': 0.12,
        'warm_up': 2,
        'blurs': True,
        'test_crops': [[64, 0.875], [48, 1.0]],
        **OPTIMIZER,
    },
}
# Table 3: mean top-1 accuracy in percent with each of FLIPS.
# (crop, epochs, number of the test crop, whether with TTA)
PUBLISHED = {
    ('heavy', 16, 0, False): (66.78, 66.54, 66.58),
    ('heavy', 16, 1, False): (64.43, 64.62, 64.63),
    ('light', 16, 0, False): (59.02, 61.84, 62.19),
    ('light', 16, 1, False): (61.79, 64.50, 64.93),
    ('heavy', 16, 0, True): (67.52, 67.65, 67.60),
    ('heavy', 16, 1, True): (65.36, 65.48, 65.51),
    ('light', 16, 0, True): (61.08, 62.89, 63.08),
    ('light', 16, 1, True): (63.91, 65.63, 65.87),
    ('light', 20, 1, True): (None, 65.80, 66.02),
    ('heavy', 88, 0, True): (72.34, 72.45, 72.46),
}


#### What to train #################################################################################


def schedule_of(crop, epochs, settings):
    """The rate rises to its peak and falls to 0, and the crops grow, as in ffcv's configs."""
    peak = settings['warm_up']
    grows = 71 if epochs == 88 else epochs * 3 // 4
    small, large = settings['pixels']
    highest = settings['rate']
    at_growth = highest * (epochs - grows) / (epochs - peak)
    always = LEAST_AREAS[crop], 1, settings['batch']  # one shard
    return [
        segment([0, peak], small, *always, [0, highest]),
        segment([peak, grows], small, *always, [highest, at_growth]),
        segment([grows, epochs], large, *always, [at_growth, 0]),
    ]


def plan(settings, records):
    """Seed by seed, as many networks of each cell as the scale wants."""
    jobs = []
    for seed in range(max(max(runs) for _, _, runs in settings['cells'])):
        for crop, epochs, runs in settings['cells']:
            for flip, n in zip(FLIPS, runs):
                if seed < n:
                    jobs.append(({'crop': crop, 'epochs': epochs, 'flip': flip}, seed))
    return jobs


def train(cell, seed, place):
    """A network's losses and seconds, and its accuracies on each test crop, from 0 to 1."""
    alone = swap94.Ranks()
    schedule = schedule_of(cell['crop'], cell['epochs'], place.settings)
    images = TrainingImages(place.train, schedule, seed, cell['flip'])
    net = imagenet.make_net(place, seed)
    record = imagenet.fit(net, images, place, alone, place.checkpoint(cell, seed))
    crops = place.settings['test_crops']
    record['accuracies'] = [imagenet.evaluate(net, crop, place, alone) for crop in crops]
    record['damaged'] = len(place.train.damaged | place.val.damaged)
    place.remove_checkpoints(cell, seed)
    return record


#### What to show ##################################################################################


def accuracies_of(records, crop, epochs, test_crop, has_tta):
    """{flip: {seed: top-1 accuracy in percent}}, as far as there are records."""
    key = 'tta_top1' if has_tta else 'top1'
    found = {}
    for flip in FLIPS:
        of_flip = in_cell(records, crop=crop, epochs=epochs, flip=flip)
        found[flip] = {r['seed']: 100 * r['accuracies'][test_crop][key] for r in of_flip}
    return found


def rows_of(settings):
    """(crop, epochs, number of the test crop, whether with TTA) of each row."""
    for crop, epochs, _ in settings['cells']:
        for has_tta in (False, True):
            for test_crop in range(len(settings['test_crops'])):
                yield crop, epochs, test_crop, has_tta


def crop_name(settings, test_crop):
    pixels, share = settings['test_crops'][test_crop]
    return f'CC({pixels}, {share})'


def name_of(settings, row):
    crop, epochs, test_crop, has_tta = row
    tta = 'with TTA' if has_tta else 'without TTA'
    return f'{crop}, {epochs} epochs, {crop_name(settings, test_crop)}, {tta}'


def print_accuracies(records, settings):
    print('top-1 accuracy in %, with the 95% interval of its mean, and the number of networks')
    rows = []
    for row in rows_of(settings):
        texts = [name_of(settings, row)]
        for values in accuracies_of(records, *row).values():
            if values:
                texts.append(f'{mean_text(list(values.values()), ".2f")} ({len(values)})')
            else:
                texts.append('-')
        rows.append(texts)
    print_table(['', *FLIPS], rows)


def print_gains(records, settings):
    """How much better each flip is than the one before, for seeds that both have."""
    print('\ngain in points, with its 95% interval, and one-sided p')
    rows = []
    for row in rows_of(settings):
        texts = [name_of(settings, row)]
        accuracies = list(accuracies_of(records, *row).values())
        for before, after in itertools.pairwise(accuracies):
            gains = [after[seed] - before[seed] for seed in after if seed in before]
            if len(gains) < 2:
                texts += ['-', '-']
            else:
                texts += [mean_text(gains, '+.2f'), f'{paired_p(gains, 0):.2g}']
        rows.append(texts)
    print_table(['', 'random over none', 'p', 'alternating over random', 'p'], rows)


def print_published():
    print('\nof the paper, on ImageNet:')
    rows = []
    for row, means in PUBLISHED.items():
        texts = [f'{mean:.2f}' if mean else '-' for mean in means]
        rows.append([name_of(SCALES['paper'], row), *texts])
    print_table(['', *FLIPS], rows)


def published_accuracies(row):
    """A row of Table 3, in the form of accuracies_of. Its means stand for one network each."""
    means = PUBLISHED.get(row, [None] * len(FLIPS))
    return {flip: {0: mean} if mean else {} for flip, mean in zip(FLIPS, means)}


def draw(records, settings, stem):
    """For each cell, every network's accuracy and the means; and the paper's means."""
    cells = settings['cells']
    figure = new_figure(12, 3.6 * len(cells))
    grid = figure.subplots(len(cells), 2, squeeze=False)
    for (crop, epochs, _), (ours, theirs) in zip(cells, grid):
        rows = [row for row in rows_of(settings) if row[:2] == (crop, epochs)]
        draw_rows(ours, settings, rows, [accuracies_of(records, *row) for row in rows])
        draw_rows(theirs, SCALES['paper'], rows, [published_accuracies(row) for row in rows])
        ours.set(title=f'{crop} crop, {epochs} epochs, here', ylabel='top-1 accuracy (%)')
        theirs.set(title='paper')
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc='outside upper center', ncols=len(FLIPS))
    save_both(figure, stem)


def draw_rows(axes, settings, rows, accuracies):
    """A panel with the networks of each row, and a line at each flip's mean."""
    for i, of_row in enumerate(accuracies):
        for flip, colour, aside in zip(FLIPS, COLOURS, (-0.2, 0, 0.2)):
            values = list(of_row[flip].values())
            label = flip if i == 0 else None
            x = np.full(len(values), i + aside)
            axes.plot(x, values, 'o', color=colour, alpha=0.5, label=label)
            if values:
                axes.plot(i + aside, np.mean(values), '_', color='black', markersize=20)
    names = []
    for _, _, test_crop, has_tta in rows:
        names.append(crop_name(settings, test_crop) + ('\nTTA' if has_tta else ''))
    axes.set_xticks(range(len(rows)), names)


def show(config, records, folder):
    settings = config['settings']
    if not in_cell(records, flip='random') or not in_cell(records, flip='alternating'):
        raise UserError(f'{folder}: needs networks with both flips; train on, then --show')
    print_accuracies(records, settings)
    print_gains(records, settings)
    print_published()
    draw(records, settings, folder / 'imagenet_flip')


OWN = {'add_options': imagenet.add_options, 'train_cells': imagenet.train_cells}
STUDY = Study('imagenet_flip', __doc__, {'resnet18': SCALES}, plan, train, show, **OWN)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
