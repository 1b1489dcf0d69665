"""Alternating flip against random flip and none (Jordan 2024, Tables 1, 2 and 6, Figures 1 and 5).

    python -m studies.flip                                  # 40 minutes on two CPU cores
    torchrun --nproc_per_node=8 -m studies.flip --scale paper --out logs/flip --data cifar10
    python -m studies.flip --show --out logs/flip           # the table and the pictures again

We train networks with each kind of flip, for several numbers of epochs. Random flip tosses a coin
for each image in each epoch. The loader's alternating flip tosses one coin per image, and turns it
over after each epoch (section 3.6). The speedup is defined as in the paper: a power law, fitted to
the errors of random flip, says how many epochs random flip needs for the error of alternating flip;
we divide them by the epochs of alternating flip. "Replaced" epochs draw the images with replacement
instead of shuffling them (Table 1).

--scale paper is Table 6 for airbench94, n=400. Its four numbers of epochs with three kinds of flip
cost about 5000 PFLOP per cutout, or 13 A100-hours at 0.36 PFLOP in 3.29 seconds. For --net
airbench96 the paper has the speedups, with cutout. --scale small trains a narrow network on 2500
images. Flips are its only augmentation, so that it fits its images within these epochs, as
airbench94 fits CIFAR-10.
"""

import sys

import numpy as np
import scipy.optimize
import torch

import airbench94
import airbench95
import airbench96
from lab.options import override
from studies.common import Study, in_cell, run_study, whole_seeds
from studies.show import (
    COLOURS,
    mean_and_interval,
    mean_text,
    new_figure,
    paired_p,
    print_table,
    save_both,
)

RECIPES = {'airbench94': airbench94, 'airbench95': airbench95, 'airbench96': airbench96}
FLIPS = ['none', 'random', 'alternating']
NARROW = ['net.widths.block1=8', 'net.widths.block2=32', 'net.widths.block3=64']
PAPER = {
    'hyp': [],
    'images': None,  # of the training set: all
    'epochs': [10, 20, 40, 80],
    'cutouts': [0, 12],
    'runs': 400,
}
SMALL = {
    'hyp': [*NARROW, 'opt.batch_size=50', 'aug.translate=0', 'net.tta_level=1'],
    'images': 2500,
    'epochs': [6, 10, 16],
    'cutouts': [0],
    'runs': 12,
}
SCALES = {'paper': PAPER, 'small': SMALL}

# Table 6: mean accuracy of airbench94 in percent, n=400, with each of FLIPS.
# (epochs, cutout, whether with TTA)
PUBLISHED = {
    (10, 0, False): (92.3053, 93.0988, 93.2798),
    (20, 0, False): (92.8166, 93.7446, 93.8652),
    (40, 0, False): (93.0143, 94.0133, 94.0729),
    (80, 0, False): (93.0612, 94.1169, 94.1628),
    (10, 0, True): (93.4071, 93.9488, 94.0186),
    (20, 0, True): (93.8528, 94.5565, 94.6530),
    (40, 0, True): (94.0381, 94.7803, 94.8203),
    (80, 0, True): (94.0638, 94.8506, 94.8676),
    (10, 12, False): (91.8487, 92.0402, 92.1374),
    (20, 12, False): (92.8474, 93.3825, 93.4876),
    (40, 12, False): (93.2675, 94.1014, 94.1952),
    (80, 12, False): (93.4193, 94.4311, 94.5204),
    (10, 12, True): (92.6455, 92.7780, 92.8103),
    (20, 12, True): (93.7862, 94.1306, 94.1670),
    (40, 12, True): (94.3090, 94.8511, 94.8960),
    (80, 12, True): (94.5253, 95.1839, 95.2362),
}

# Table 2: speedup of airbench96 in percent at 10, 20, 40 and 80 epochs, with cutout.
# (whether with TTA)
PUBLISHED_96 = {False: (4.94, 8.99, 17.2, 18.8), True: (1.11, 3.58, 6.48, None)}

# Table 1: accuracy of airbench94 in percent after 10 epochs, with TTA, with random and alternating
# flip. (whether images are drawn with replacement)
PUBLISHED_DRAWS = {True: (93.40, 93.48), False: (93.92, 94.01)}


class FlipLoader(airbench94.CifarLoader):
    """A loader that mirrors images in another way.

    Args:
        flips: one of FLIPS.
        replaced: whether images are drawn with replacement.
        The others are CifarLoader's.
    """

    def __init__(self, *args, flips, replaced=False, **options):
        super().__init__(*args, **options)
        self.flips = flips
        self.replaced = replaced

    def draw(self, epoch):
        draws = super().draw(epoch)
        n = len(self.images)
        rng = np.random.default_rng((self.seed, epoch, 2))  # a stream of its own
        if self.flips == 'none':
            draws['flip'] = torch.zeros(n, dtype=torch.bool)
        if self.flips == 'random':
            draws['flip'] = torch.from_numpy(rng.random(n) < 0.5)
        if self.replaced:
            draws['order'] = torch.from_numpy(rng.integers(n, size=n))
        return draws


#### What to train #################################################################################


def plan(settings, records):
    """Table 6's cells, and those of Table 1 that draw with replacement; seed by seed."""
    jobs = []
    for seed in range(settings['runs']):
        for epochs in settings['epochs']:
            for cutout in settings['cutouts']:
                for flip in FLIPS:
                    cell = {'flip': flip, 'replaced': False, 'epochs': epochs, 'cutout': cutout}
                    jobs.append((cell, seed))
        for flip in FLIPS[1:]:
            cell = {'flip': flip, 'replaced': True, 'epochs': settings['epochs'][0], 'cutout': 0}
            jobs.append((cell, seed))
    return jobs


def train(cell, seed, place):
    """A network's accuracies, in [0, 1], without and with test-time augmentation.

    As in the paper, that mirrors the test images whatever the flips in training were.
    """
    settings = place.settings
    changes = [f'opt.train_epochs={cell["epochs"]}', f'aug.cutout={cell["cutout"]}']
    recipe = RECIPES[settings['net']]
    hyp = override(recipe.hyp, [*settings['hyp'], *changes])
    how = {'flips': cell['flip'], 'replaced': cell['replaced']}
    loader = place.training_loader(hyp['opt']['batch_size'], hyp['aug'], FlipLoader, **how)
    net = place.train(recipe, loader, hyp, seed)
    return place.accuracies(net, hyp)


#### Estimates #####################################################################################


def power_law(epochs, a, b, c):
    return c + b * epochs**a


def fit_power_law(epochs, errors):
    """(a, b, c) of error = c + b * epochs^a, by least squares, with a <= 0 <= b, c."""
    epochs = np.array(epochs, float)
    errors = np.array(errors)
    start = (-1, np.ptp(errors) * min(epochs), min(errors))
    limits = ((-np.inf, 0, 0), (0, np.inf, np.inf))

    def residuals(law):
        return power_law(epochs, *law) - errors

    return scipy.optimize.least_squares(residuals, start, bounds=limits, max_nfev=10_000).x


def speedup(law, at, error):
    """How much longer a training takes for the `error` that another one has after `at` epochs.

    It takes 0.27 times longer in the paper's example, and infinitely longer for an error that the
    power law never reaches.

    Args:
        law: of the training that takes longer, from fit_power_law.
    """
    a, b, c = law
    if error <= c:
        return np.inf
    return ((error - c) / b) ** (1 / a) / at - 1


def speedups(epochs, random, alternating):
    """The speedup at each of `epochs`, from the mean over seeds of errors (seeds, epochs)."""
    law = fit_power_law(epochs, random.mean(0))
    pairs = zip(epochs, alternating.mean(0))
    return np.array([speedup(law, at, error) for at, error in pairs])


def speedup_intervals(epochs, random, alternating, resamples=100):
    """The 95% interval of each speedup, from a bootstrap over the seeds: (2, epochs)."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(resamples):
        seeds = rng.integers(len(random), size=len(random))
        found.append(speedups(epochs, random[seeds], alternating[seeds]))
    return np.percentile(found, [2.5, 97.5], axis=0, method='nearest')  # some are infinite


#### What to show ##################################################################################

KINDS = {'val_acc': 'without TTA', 'tta_val_acc': 'with TTA'}


def errors_of(records, key, **cell):
    """The errors of a cell's networks in percent, sorted by seed."""
    return np.array([100 * (1 - record[key]) for record in in_cell(records, **cell)])


def curves_of(records, key, epochs, cutout):
    """{flip: errors in percent (seeds, epochs)}."""
    curves = {}
    for flip in FLIPS:
        cells = [{'flip': flip, 'epochs': e, 'cutout': cutout, 'replaced': False} for e in epochs]
        curves[flip] = np.stack([errors_of(records, key, **cell) for cell in cells], axis=1)
    return curves


def published_speedup(epochs, cutout, has_tta):
    """The speedup in Table 6, from the same power law."""
    all_epochs = PAPER['epochs']
    rows = [PUBLISHED[e, cutout, has_tta] for e in all_epochs]
    law = fit_power_law(all_epochs, [100 - random for _, random, _ in rows])
    return speedup(law, epochs, 100 - PUBLISHED[epochs, cutout, has_tta][2])


def print_flips(records, settings):
    n, epochs = len({record['seed'] for record in records}), settings['epochs']
    print(f'accuracy in %, n={n}, with the 95% interval of its mean')
    print('p is one-sided, that alternating flip is better than random flip')
    rows, gains = [], []
    for cutout in settings['cutouts']:
        for key, kind in KINDS.items():
            curves = curves_of(records, key, epochs, cutout)
            random, alternating = curves['random'], curves['alternating']
            fastest = speedups(epochs, random, alternating)
            low, high = speedup_intervals(epochs, random, alternating)
            for i, at in enumerate(epochs):
                row = [f'{at} epochs, cutout {cutout}, {kind}']
                row += [mean_text(100 - curves[flip][:, i], '.2f') for flip in FLIPS]
                row.append(f'{paired_p(random[:, i], alternating[:, i]):.2g}')
                rows.append([*row, f'{fastest[i]:.0%} ({low[i]:.0%} to {high[i]:.0%})'])
            gain = mean_text((random - alternating).mean(1), '+.2f')
            p = paired_p(random.mean(1), alternating.mean(1))
            gains.append(f'  cutout {cutout}, {kind}: {gain}, p={p:.2g}')
    print_table(['', *FLIPS, 'p', 'speedup (95%)'], rows)
    print('alternating over random flip, mean of the epochs:', *gains, sep='\n')


def print_reshuffling(records, settings):
    """Table 1: epochs that shuffle the images, and epochs that draw them with replacement."""
    epochs = settings['epochs'][0]
    print(f'\nwith TTA, {epochs} epochs; of the paper (Table 1): 10 epochs')
    rows, gains = [], 0
    for name, replaced, sign in (('drawn with replacement', True, 1), ('reshuffled', False, -1)):
        row = [name]
        for flip in FLIPS[1:]:
            cell = {'epochs': epochs, 'cutout': 0, 'flip': flip, 'replaced': replaced}
            errors = errors_of(records, 'tta_val_acc', **cell)
            row.append(mean_text(100 - errors, '.2f'))
            gains = gains + sign * errors / 2
        rows.append([*row, *(f'{accuracy:.2f}' for accuracy in PUBLISHED_DRAWS[replaced])])
    print_table(['', *FLIPS[1:], *(f'paper: {flip}' for flip in FLIPS[1:])], rows)
    gain, p = mean_text(gains, '+.2f'), paired_p(gains, 0)
    print(f'reshuffling over drawing: {gain}, one-sided p={p:.2g}')


def print_published(net):
    if net == 'airbench96':
        print('\nspeedups in % of the paper (Table 2), at 10, 20, 40 and 80 epochs:')
        for has_tta, percents in PUBLISHED_96.items():
            print('  with TTA:   ' if has_tta else '  without TTA:', *percents)
    if net == 'airbench94':
        print('\nof the paper, airbench94, n=400 (Table 6; the speedup is of the same power law):')
        rows = []
        for (epochs, cutout, has_tta), accuracies in PUBLISHED.items():
            row = [f'{epochs} epochs, cutout {cutout}, {"with" if has_tta else "without"} TTA']
            row += [f'{accuracy:.2f}' for accuracy in accuracies]
            rows.append([*row, f'{published_speedup(epochs, cutout, has_tta):.1%}'])
        print_table(['', *FLIPS, 'speedup'], rows)


def draw_curves(records, settings, stem):
    """Figure 5: error against epochs, here with intervals, and in the paper (Table 6)."""
    cutouts = settings['cutouts']
    figure = new_figure(10, 3.8 * len(cutouts))
    grid = figure.subplots(len(cutouts), 4, squeeze=False)
    for cutout, axes_of_cutout in zip(cutouts, grid):
        for key, axes, axes_of_paper in zip(KINDS, axes_of_cutout, axes_of_cutout[2:]):
            has_tta = key == 'tta_val_acc'
            ours = curves_of(records, key, settings['epochs'], cutout)
            draw_errors(axes, settings['epochs'], ours, 'here')
            of_paper = [PUBLISHED[epochs, cutout, has_tta] for epochs in PAPER['epochs']]
            theirs = {flip: 100 - np.array([row]) for flip, row in zip(FLIPS, zip(*of_paper))}
            draw_errors(axes_of_paper, PAPER['epochs'], theirs, 'paper')
            for each in (axes, axes_of_paper):
                each.set_xlabel(f'epochs, cutout {cutout},\n{KINDS[key]}')
        axes_of_cutout[0].set_ylabel('test error (%)')
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc='outside upper center', ncols=4)
    save_both(figure, stem)


def draw_errors(axes, epochs, curves, title):
    """A panel with each flip's errors (seeds, epochs), and the power law of random flip."""
    for flip, colour, aside in zip(FLIPS, COLOURS, (0.98, 1, 1.02)):
        means, halves = zip(*[mean_and_interval(errors) for errors in curves[flip].T])
        halves = np.nan_to_num(halves)  # of one value
        at = aside * np.array(epochs)
        axes.errorbar(at, means, halves, fmt='o', color=colour, label=flip, capsize=3)
    x = np.geomspace(min(epochs), max(epochs), 100)
    law = power_law(x, *fit_power_law(epochs, curves['random'].mean(0)))
    axes.plot(x, law, color=COLOURS[1], linewidth=1, label='power law of random')
    axes.set(xscale='log', title=title)
    axes.set_xticks(epochs, epochs)
    axes.minorticks_off()


def draw_strip(stem, seed=1, epochs=6):
    """Figure 1: one image, one of scikit-learn's digits, as each kind of flip shows it."""
    images, labels = [values[:4] for values in airbench94.load_digits(True)]
    image = images[3].numpy()
    options = {'seed': seed, 'device': 'cpu', 'dtype': torch.float32}
    figure = new_figure(7, 2.6)
    grid = figure.subplots(2, epochs)
    for row, flips in zip(grid, FLIPS[1:]):
        loader = FlipLoader(images, labels, aug={'flip': True}, flips=flips, **options)
        for epoch, axes in enumerate(row):
            is_mirrored = bool(loader.draw(epoch)['flip'][3])
            axes.imshow(image[:, ::-1] if is_mirrored else image, interpolation='nearest')
            axes.set(xticks=[], yticks=[], xlabel='mirrored' if is_mirrored else '')
            if flips == 'random':
                axes.set_title(f'epoch {epoch + 1}')
        row[0].set_ylabel(flips)
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    records = whole_seeds(records, plan(settings, []), folder)
    print_flips(records, settings)
    print_reshuffling(records, settings)
    print_published(settings['net'])
    draw_curves(records, settings, folder / 'flip')
    draw_strip(folder / 'strip')


STUDY = Study('flip', __doc__, {recipe: SCALES for recipe in RECIPES}, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
