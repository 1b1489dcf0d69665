"""How accuracies vary between runs, and whether networks are calibrated (Jordan 2024, Table 4).

    python -m studies.variance                              # 20 minutes on two CPU cores
    torchrun --nproc_per_node=8 -m studies.variance --scale paper --out logs/variance
    python -m studies.variance --show --out logs/variance   # the table and the pictures again

Networks with different seeds have different test accuracies. Most of that is not a difference in
quality: on other test images from the same distribution, other networks would be the best. The
table shows, without and with test-time augmentation (section 5.3):

- the standard deviation of the accuracy on the test set, as in the histograms (Figure 6);
- the distribution-wise standard deviation, which is that of the accuracy on infinitely many test
  images. Its square is the mean covariance of two test images being right (Jordan, "Calibrated
  chaos", 2023, arXiv:2304.01910). The estimate of the square can be "below 0" by chance;
- the class-aggregated calibration error (CACE). Among the images for which a certain share of the
  networks vote for a class, as large a share should be of that class. The error sums up how far off
  this is (Jiang et al. 2021, arXiv:2106.13799), in 15 bins of equal width. (With a bin for each
  share, 10,000 networks would have so few images in a bin that even a calibrated ensemble would
  look far off.) The error is larger for a few networks, because their votes are coarse. So only
  compare cells with equally many networks.

--scale paper trains 10,000 networks in each of three cells: 14,000 PFLOP, or 37 A100-hours at 0.36
PFLOP in 3.29 seconds. --scale small trains a narrow network on a tenth of the images. The test
logits are kept with the records, in half precision, 400 kB a network. OUT/votes.npz counts how many
networks vote for each class of each image, which is enough for table and pictures.
"""

import io
import math
import sys

import numpy as np
import scipy.stats

import airbench94
from lab.data import check_whole
from lab.errors import UserError
from lab.networks import tta_level
from lab.runs import write_atomically
from studies.common import Study, cell_file, for_each_seed, in_cell, run_study
from studies.show import COLOURS, new_figure, print_table, save_both

PAPER = {
    'hyp': [],
    'images': None,  # of the training set: all
    'widths': [64, 256, 256],
    'epochs': 9.9,
    'runs': 10_000,
}
SMALL = {
    'hyp': ['opt.batch_size=100', 'net.tta_level=1'],
    'images': 5000,
    'widths': [8, 32, 64],
    'epochs': 4,
    'runs': 16,
}
SCALES = {'paper': PAPER, 'small': SMALL}

BINS = 15  # for the calibration error
CELLS = [(1, 1), (2, 1), (1.5, 1.5)]  # factors of (epochs, width)
KINDS = {'plain': 'without TTA', 'tta': 'with TTA'}  # of logits

# Table 4, n=10,000: (accuracy, test-set and distribution-wise deviation in percent, CACE)
PUBLISHED = {
    (1, 1, 'plain'): (93.25, 0.157, 0.037, 0.0312),
    (2, 1, 'plain'): (93.86, 0.152, 0.025, 0.0233),
    (1.5, 1.5, 'plain'): (94.32, 0.142, 0.020, 0.0269),
    (1, 1, 'tta'): (94.01, 0.128, 0.029, 0.0533),
    (2, 1, 'tta'): (94.65, 0.124, 0.022, 0.0433),
    (1.5, 1.5, 'tta'): (94.97, 0.116, 0.018, 0.0444),
}


#### What to train #################################################################################


def plan(settings, records):
    """Table 4's cells, seed by seed."""
    cells = [{'epochs': epochs, 'width': width} for epochs, width in CELLS]
    return for_each_seed(cells, settings)


def logits_file(folder, cell, seed):
    return cell_file(folder, cell, seed).with_suffix('.npz')


def train(cell, seed, place):
    """A network's accuracies, in [0, 1]. Its logits go into a file next to the record's."""
    settings = place.settings
    widths = [round(cell['width'] * width) for width in settings['widths']]
    changes = [f'net.widths.block{i}={width}' for i, width in enumerate(widths, 1)]
    changes.append(f'opt.train_epochs={cell["epochs"] * settings["epochs"]}')
    hyp = place.hyp(airbench94, [*settings['hyp'], *changes])
    loader = place.training_loader(hyp['opt']['batch_size'], hyp['aug'])
    net = place.train(airbench94, loader, hyp, seed)
    logits = {
        'plain': airbench94.infer(net, place.test_loader, 0),
        'tta': airbench94.infer(net, place.test_loader, tta_level(hyp)),
    }
    labels = place.test_loader.labels
    content = io.BytesIO()
    arrays = {kind: values.half().cpu().numpy() for kind, values in logits.items()}
    np.savez(content, labels=labels.cpu().numpy(), **arrays)
    file = logits_file(place.folder, cell, seed)
    write_atomically(file, content.getvalue())
    return {
        'val_acc': (logits['plain'].argmax(1) == labels).double().mean().item(),
        'tta_val_acc': (logits['tta'].argmax(1) == labels).double().mean().item(),
    }


#### Estimates #####################################################################################


def distribution_variance(accuracies, shares):
    """An unbiased estimate of the variance of accuracies on infinitely many images.

    Args:
        accuracies: (networks,), in [0, 1].
        shares: (images,), the share of the networks that are right about each image.
    """
    networks, images = len(accuracies), len(shares)
    of_test_set = accuracies.var(ddof=1)
    of_images = networks / (networks - 1) * (shares * (1 - shares)).sum()
    by_chance = of_images / images**2
    return (of_test_set - by_chance) * images / (images - 1)


def calibration_error(votes, labels):
    """The class-aggregated calibration error.

    Args:
        votes: (images, classes), the share of the networks that vote for each class.
        labels: int (images,).
    """
    is_class = np.eye(votes.shape[1])[labels]
    place = np.minimum(BINS * votes, BINS - 1).astype(int)
    gaps = np.bincount(place.ravel(), weights=(is_class - votes).ravel())
    return np.abs(gaps).sum() / len(labels)


def p_of_deviation(larger, smaller):
    """One-sided p that `smaller` deviates less, from the Pitman-Morgan test of pairs."""
    if np.allclose(larger, smaller):  # as with TTA for digits, which has no views
        return 1.0
    pairs = scipy.stats.pearsonr(larger + smaller, larger - smaller, alternative='greater')
    return pairs.pvalue


def p_of_calibration(larger, smaller, labels, resamples=200):
    """One-sided p that `smaller` has the smaller calibration error, from a bootstrap over images.

    larger and smaller are votes, as for `calibration_error`.
    """
    rng = np.random.default_rng(0)
    contrary = 1  # so that p is never 0
    for _ in range(resamples):
        images = rng.integers(len(labels), size=len(labels))
        high = calibration_error(larger[images], labels[images])
        low = calibration_error(smaller[images], labels[images])
        contrary += high <= low
    return contrary / (resamples + 1)


def runs_needed(effect, deviation, p=0.05):
    """How many runs it takes, on average, to show that an effect is not chance (section 1).

    Args:
        effect: on the mean accuracy.
        deviation: between runs, in the same unit.
        p: of a one-sided test.
    """
    return math.ceil((scipy.stats.norm.isf(p) * deviation / effect) ** 2)


#### What to show ##################################################################################


def read_arrays(file, way_out):
    """The arrays in an .npz file, as a dict. Raises UserError, with the way out."""
    try:
        check_whole(file)
        with np.load(file) as arrays:
            return dict(arrays)
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f'{file}: is missing or damaged; {way_out}') from error


def count_votes(records, folder, kind):
    """(how many networks vote for each class, int (images, classes); labels, int (images,))."""
    votes = 0
    for record in records:
        file = logits_file(folder, record['cell'], record['seed'])
        way_out = f'delete {file.with_suffix(".json")}, and it will be made again'
        arrays = read_arrays(file, way_out)
        labels = arrays['labels']
        classes = arrays[kind].shape[1]
        votes = votes + np.eye(classes, dtype=np.uint16)[arrays[kind].argmax(1)]
    return votes, labels


def read_votes(folder, cells):
    """The arrays in votes.npz, which is made again if the logits are there."""
    file = folder / 'votes.npz'
    if (folder / 'cells').is_dir():
        arrays = {}
        for cell, records in cells.items():
            for kind in KINDS:
                arrays[f'{cell} {kind}'], arrays['labels'] = count_votes(records, folder, kind)
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        write_atomically(file, content.getvalue())
    return read_arrays(file, 'without it, --show needs the records in cells')


def describe(records, votes, labels, kind):
    """What the table says about a cell's networks; kind is one of KINDS."""
    key = {'plain': 'val_acc', 'tta': 'tta_val_acc'}[kind]
    accuracies = np.array([record[key] for record in records])
    shares = votes / len(records)
    right = shares[np.arange(len(labels)), labels]
    return {
        'accuracies': 100 * accuracies,
        'mean': 100 * accuracies.mean(),
        'deviation': 100 * accuracies.std(ddof=1),
        'distribution': 1e4 * distribution_variance(accuracies, right),  # percent, squared
        'calibration': calibration_error(shares, labels),
        'shares': shares,
    }


def print_cells(described):
    print('standard deviation of the accuracy in percentage points; of the paper in brackets')
    titles = ['', 'n', 'accuracy', 'on the test set (95%)', 'of the distribution', 'CACE']
    rows = []
    for kind, kind_text in KINDS.items():
        for (epochs, width), of_kinds in described.items():
            row, published = of_kinds[kind], PUBLISHED[epochs, width, kind]
            n, deviation, variance = len(row['accuracies']), row['deviation'], row['distribution']
            ends = np.sqrt((n - 1) / scipy.stats.chi2.ppf([0.975, 0.025], n - 1))
            low, high = deviation * ends
            distribution = f'{variance**0.5:.3f}' if variance > 0 else 'below 0'
            rows.append(
                [
                    f'{epochs}x epochs, {width}x width, {kind_text}',
                    str(n),
                    f'{row["mean"]:.2f}% [{published[0]:.2f}%]',
                    f'{deviation:.3f} ({low:.2f}-{high:.2f}) [{published[1]:.3f}]',
                    f'{distribution} [{published[2]:.3f}]',
                    f'{row["calibration"]:.4f} [{published[3]:.4f}]',
                ]
            )
    print_table(titles, rows)


def print_tests(described, labels):
    print('\nTTA, one-sided p that it lowers the deviation, and that it raises the CACE:')
    rows = []
    for (epochs, width), of_kinds in described.items():
        plain, tta = of_kinds['plain'], of_kinds['tta']
        of_deviation = p_of_deviation(plain['accuracies'], tta['accuracies'])
        of_calibration = p_of_calibration(tta['shares'], plain['shares'], labels)
        name = f'{epochs}x epochs, {width}x width'
        rows.append([name, f'{of_deviation:.2g}', f'{of_calibration:.2g}'])
    print_table(['', 'deviation', 'CACE'], rows)


def print_runs_needed(deviation):
    print('\nruns that show a better mean with p = 0.05, at the deviation of the first row:')
    for effect in (0.02, 0.05, 0.1, 0.2, 0.5):
        print(f'  {effect:.2f} percentage points: {runs_needed(effect, deviation)}')


def draw_histograms(described, stem):
    """Figure 6: our accuracies, and normal distributions with our and the paper's deviations."""
    figure = new_figure(10, 6)
    grid = figure.subplots(2, 2)
    for kind, (ours, theirs) in zip(KINDS, grid.T):
        for ((epochs, width), of_kinds), colour in zip(described.items(), COLOURS):
            row, label = of_kinds[kind], f'{epochs}x epochs, {width}x width'
            ours.hist(row['accuracies'], 'auto', density=True, alpha=0.5, color=colour)
            draw_normal(ours, row['mean'], row['deviation'], color=colour, label=label)
            draw_normal(theirs, *PUBLISHED[epochs, width, kind][:2], color=colour)
        ours.set(title=f'here, {KINDS[kind]}', yticks=[])
        theirs.set(title=f'paper, {KINDS[kind]}, n=10,000', yticks=[], xlabel='test accuracy (%)')
    figure.supylabel('share of the runs')
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc='outside upper center', ncols=3)
    save_both(figure, stem)


def draw_normal(axes, mean, deviation, **style):
    x = mean + deviation * np.linspace(-4, 4, 200)
    axes.plot(x, scipy.stats.norm(mean, deviation).pdf(x), linewidth=1.5, **style)


def show(config, records, folder):
    cells = {}
    for epochs, width in CELLS:
        cell = in_cell(records, epochs=epochs, width=width)
        if len(cell) > 1:
            cells[epochs, width] = cell
    if not cells:
        raise UserError(f'{folder}: no cell has two networks yet')
    votes = read_votes(folder, cells)
    labels = votes['labels']
    described = {}
    for cell, networks in cells.items():
        described[cell] = {
            kind: describe(networks, votes[f'{cell} {kind}'], labels, kind) for kind in KINDS
        }
    print_cells(described)
    print_tests(described, labels)
    print_runs_needed(next(iter(described.values()))['plain']['deviation'])
    draw_histograms(described, folder / 'variance')


STUDY = Study('variance', __doc__, {'airbench94': SCALES}, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
