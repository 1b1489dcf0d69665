"""Other sets in the form that --data takes, and airbench96 on them (Jordan 2024, Table 5).

    python -m studies.datasets cifar100 DEST                # or svhn: torchvision downloads it
    python -m studies.datasets IMAGES DEST                  # a folder of images, like CINIC-10's
    python -m studies.datasets --data DEST --out logs/mine  # narrow networks on a tenth of it
    python -m studies.datasets --data DEST --out logs/mine --scale paper

IMAGES holds `train` and `test`, and these a folder for each class; images become 32 x 32 pixels.
The study trains airbench96, with and without cutout, unchanged but for flips, which SVHN's figures
do not bear. Where DEST is named cifar10, cifar100, cinic10 or svhn, the paper's figures are printed
beside. --scale paper trains 10 networks in both cells: 144 PFLOP at the paper's 7.2, or a quarter
of an A100-hour at its 46.3 seconds.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

import airbench94
import airbench96
from studies.common import (
    COLOURS,
    Parser,
    Study,
    UserError,
    exit_code,
    in_cell,
    mean_and_interval,
    new_figure,
    run_study,
    save_both,
)

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
        'runs': 2,
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

#### Writing sets ##################################################################################


def split_of(images, labels, classes):
    """What train.pt and test.pt hold; images: uint8 (N, 32, 32, 3)."""
    return {
        'images': torch.as_tensor(np.ascontiguousarray(images)),
        'labels': torch.as_tensor(np.array(labels), dtype=torch.int64),
        'classes': list(classes),
    }


def read_cifar100(folder, train):
    data = torchvision.datasets.CIFAR100(folder, train, download=True)
    return split_of(data.data, data.targets, data.classes)


def read_svhn(folder, train):
    data = torchvision.datasets.SVHN(folder, 'train' if train else 'test', download=True)
    return split_of(data.data.transpose(0, 2, 3, 1), data.labels, '0123456789')


def read_images(folder, train):
    """The images in the folders of `folder`/train, or /test, resized to 32 x 32."""
    data = torchvision.datasets.ImageFolder(folder / ('train' if train else 'test'))
    images = []
    for path, _ in airbench94.progress(data.samples, 'images'):
        with Image.open(path) as image:
            images.append(np.asarray(image.convert('RGB').resize((32, 32))))
    return split_of(np.stack(images), data.targets, data.classes)


SOURCES = {'cifar100': read_cifar100, 'svhn': read_svhn}


def write_set(source, dest):
    """Write train.pt and test.pt into dest. source: one of SOURCES, or a folder of images.

    Raises UserError if there is no such set, or its splits have different classes.
    """
    read, folder = SOURCES.get(source), dest
    if read is None:
        read, folder = read_images, Path(source)
        if not folder.is_dir():
            raise UserError(f'{source}: is no folder, and none of {", ".join(SOURCES)}')
    dest.mkdir(parents=True, exist_ok=True)
    try:
        splits = {'train': read(folder, True), 'test': read(folder, False)}
    except (OSError, RuntimeError) as error:  # torchvision says RuntimeError for a bad download
        raise UserError(f'{source}: cannot be read: {error}') from error
    if splits['train']['classes'] != splits['test']['classes']:
        raise UserError(f'{source}: train and test have different classes')
    for name, split in splits.items():
        airbench94.write_tensors(dest / f'{name}.pt', split)
        print(f'{dest / name}.pt: {len(split["labels"])} images of {len(split["classes"])} classes')


#### Training ######################################################################################


def plan(settings, records):
    cells = [{'cutout': cutout} for cutout in (0, 12)]
    return [(cell, seed) for seed in range(settings['runs']) for cell in cells]


def train(cell, seed, place):
    """A network's accuracies, in [0, 1], without and with test-time augmentation."""
    settings = place.settings
    changes = [f'aug.cutout={cell["cutout"]}']
    if place.train_loader.classes == list('0123456789'):
        changes.append('aug.flip=False')
    hyp = airbench96.override(airbench96.hyp, [*settings['hyp'], *changes])
    net = place.train(airbench96, place.training(hyp, settings['images']), hyp, seed)
    return place.accuracies(net, hyp['net']['tta_level'])


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
    """Every network's accuracies."""
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


def write(argv):
    parser = Parser('python -m studies.datasets', __doc__)
    parser.add_argument('source', help='cifar100, svhn, or a folder of images')
    parser.add_argument('dest', type=Path, metavar='DEST', help='folder for train.pt and test.pt')
    args = parser.parse_args(argv)
    write_set(args.source, args.dest)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith('-'):
        return exit_code('studies.datasets', write, argv)
    return run_study(STUDY, argv)


if __name__ == '__main__':
    sys.exit(main())
