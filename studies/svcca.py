"""How similar the layers of two networks are (Gotmare et al. 2019, section 2.2).

    python -m studies.svcca                                 # five minutes on two CPU cores
    python -m studies.svcca A.pt B.pt --out logs/alike      # any two networks that --save wrote
    python -m studies.svcca --show --out logs/alike         # the table and the pictures again

We train pairs of networks from different initial weights. SVCCA (studies/similarity.py) compares
the two after training, and one of them with itself before training. Next to each similarity we give
its noise floor, and in the picture it is the dot on each square.

--scale paper trains VGG-16 at full width, with dropout as in the code that the paper took over, on
all images, for 100 epochs each: 28 PFLOP a seed, or 4 A100-minutes at airbench94's rate of 0.36
PFLOP in 3.29 seconds. --scale small trains narrow networks without dropout on 1000 images. The
paper only uses the method, so there is no figure to compare with.
"""

import sys

import numpy as np

from studies import sgd
from studies.common import Study, for_each_seed, run_study
from studies.networks import NETS, describe, make_network
from studies.show import mean_text, print_table
from studies.similarity import compared_images, draw_matrices, noise_floors, observe, similarities

PAPER = {
    'images': None,  # of the training set: all
    'compared': 2000,  # test images
    'share': 1.0,  # of the network's full widths
    'dropout': 0.5,
    'epochs': 100,
    'batch_size': 100,
    'lr': 0.05,
    'runs': 3,
}
SMALL = PAPER | {
    'images': 1000,
    'share': 0.125,
    'dropout': 0.0,
    'epochs': 40,
    'batch_size': 25,
    'lr': 0.01,
    'runs': 4,
}
SCALES = {'paper': PAPER, 'small': SMALL}
GIVEN = ('A', 'B')

#### What to train #################################################################################


def plan(settings, records):
    """A pair of networks for each seed, or the given pair."""
    return for_each_seed([{'part': 'pair'}], settings)


def train_network(seed, place, images):
    """{name: Layer} of a network: (before training, after it)."""
    settings = place.settings
    loader, _ = sgd.loaders_of(place, settings['batch_size'], seed)
    net = make_network(settings, loader, seed)
    before = observe(net, images)
    sgd.train_by_steps(net, loader, settings['lr'], settings['epochs'])
    return before, observe(net, images)


def train(cell, seed, place):
    """Similarities of two networks' layers, and of one network's before and after training.

    With their noise floors.
    """
    images = compared_images(place)
    files = place.settings['files']
    if files:
        first, second = [observe(place.load_network(file), images) for file in files]
        pairs = {'two networks': (first, second)}
    else:
        at_start, first = train_network(2 * seed, place, images)
        _, second = train_network(2 * seed + 1, place, images)
        pairs = {'two networks': (first, second), 'before and after': (at_start, first)}
    return {
        'layers': [list(first), list(second)],
        'similarities': {kind: similarities(*pair) for kind, pair in pairs.items()},
        'noise': {kind: noise_floors(*pair, seed) for kind, pair in pairs.items()},
    }


#### What to show ##################################################################################


def matrices_of(records):
    """{what we compare: (similarities, noise floors)}, each an array (seeds, layers, layers)."""
    found = {}
    for kind in records[0]['similarities']:
        keys = ('similarities', 'noise')
        found[kind] = [np.array([record[key][kind] for record in records]) for key in keys]
    return found


def print_similarities(matrices):
    """Print how similar each layer is to the same layer of the other network."""
    titles, columns = ['layer'], []
    for kind, (similar, noise) in matrices.items():
        titles += [kind, 'noise']
        same = [np.diagonal(of_seeds, axis1=1, axis2=2).T for of_seeds in (similar, noise)]
        columns.append([mean_text(values, '.3f') for values in same[0]])
        columns.append([f'{values.mean():.3f}' for values in same[1]])
    print(f'similarity of the same layer, n={len(similar)}, with its 95% interval')
    print_table(titles, [[str(i), *row] for i, row in enumerate(zip(*columns), 1)])


def show(config, records, folder):
    print(describe(config['settings']))
    matrices = matrices_of(records)
    print_similarities(matrices)
    draw_matrices(matrices, folder / 'svcca')


STUDY = Study('svcca', __doc__, dict.fromkeys(NETS, SCALES), plan, train, show, files=GIVEN)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
