"""How many epochs each feature of airbench94 saves (Jordan 2024, Figure 4 and section 5.1).

    python -m studies.ablation                              # in half an hour, on two CPU cores
    torchrun --nproc_per_node=8 -m studies.ablation --scale paper --out logs/ablation --data cifar10
    python -m studies.ablation --show --out logs/ablation   # the table and the picture again

Epochs to the target are searched for the final recipe without a feature, and for the whitened
baseline with it: twice the epochs while the mean of some networks is below the target, half of them
while it is above, then the geometric mean of the two epochs that enclose it. The result comes of
the straight line, in logarithms, through the errors at all epochs that were tried, and its interval
of a bootstrap over the networks. The baseline has whitening alone; whitening itself is only taken
from the final recipe.

--scale paper has the paper's target, 94%, and 25 networks at each number of epochs: about 14 * 6 *
25 trainings, of 0.4 PFLOP and more, or two A100-hours and more. --scale small has another target,
for a narrow network and a tenth of the images.
"""

import sys
from unittest.mock import patch

import numpy as np
from torch import nn

import airbench94
from studies.common import COLOURS, Study, first_images, in_cell, new_figure, run_study, save_both
from studies.flip import NARROW, FlipLoader

SCALES = {
    'paper': {
        'hyp': [],
        'images': None,  # of the training set: all
        'tests': None,  # of the test set: all
        'target': 0.94,
        'first': 12,  # epochs
        'rounds': 6,
        'runs': 25,
    },
    'small': {
        'hyp': [*NARROW, 'opt.batch_size=100'],
        'images': 5000,
        'tests': 5000,
        'target': 0.6,
        'first': 4,
        'rounds': 3,
        'runs': 3,
    },
    'smoke': {
        'hyp': [*NARROW, 'opt.batch_size=50'],
        'images': 100,
        'tests': None,
        'target': 0.2,
        'first': 2,
        'rounds': 2,
        'runs': 1,
    },
}

# What is set where a feature is missing.
WITHOUT = {
    'whitening': [],
    'identity initialization': [],
    'bias scaler': ['opt.bias_scaler=1'],
    'Lookahead': ['opt.lookahead.decay=0'],
    'multi-crop TTA': ['net.tta_level=1'],
    'alternating flip': [],
}
FEATURES = list(WITHOUT)

# Epochs to 94%, where the paper's text has them (sections 3.2, 3.3, 3.6 and 5.1).
PUBLISHED = {
    ('final', 'none'): 9.9,
    ('final', 'identity initialization'): 12.8,
    ('baseline', 'none'): 21,
    ('baseline', 'identity initialization'): 18,
}


def variants():
    """All trainings: (start, the feature that is taken from the final or added to the other)."""
    found = [(start, 'none') for start in ('final', 'baseline')]
    for feature in FEATURES:
        found.append(('final', feature))
        if feature != 'whitening':
            found.append(('baseline', feature))
    return found


def features_of(start, feature):
    """The set of features that a training has."""
    if start == 'final':
        return set(FEATURES) - {feature}
    return {'whitening', feature} & set(FEATURES)


#### Training ######################################################################################


class PlainConv(airbench94.Conv):
    """A convolution that begins as PyTorch's do."""

    def reset_parameters(self):
        nn.Conv2d.reset_parameters(self)


def init_randomly(layer, images, eps):
    """Instead of init_whitening_conv: the first layer begins as PyTorch's do, too."""
    nn.init.kaiming_uniform_(layer.weight, a=5**0.5)


def train(cell, seed, place):
    """A network's accuracy, in [0, 1], with test-time augmentation."""
    settings = place.settings
    has = features_of(cell['start'], cell['feature'])
    changes = [change for name in FEATURES if name not in has for change in WITHOUT[name]]
    changes.append(f'opt.train_epochs={cell["epochs"]}')
    hyp = airbench94.override(airbench94.hyp, [*settings['hyp'], *changes])
    loader = place.training(hyp, settings['images'], FlipLoader)
    loader.flips = 'alternating' if 'alternating flip' in has else 'random'
    loader.replaced = False
    conv = airbench94.Conv if 'identity initialization' in has else PlainConv
    whiten = airbench94.init_whitening_conv if 'whitening' in has else init_randomly
    with patch.multiple(airbench94, Conv=conv, init_whitening_conv=whiten):
        options = {'device': loader.device, 'dtype': loader.dtype}
        net = airbench94.make_net(hyp, len(loader.classes), **options)
        net[0].weight.requires_grad = 'whitening' not in has  # it learns
        place.train(airbench94, loader, hyp, seed, net=net)
    tests = first_images(place.test_loader, settings['tests'])
    return {'tta_val_acc': airbench94.evaluate(net, tests, hyp['net']['tta_level'])}


#### The search ####################################################################################


def next_epochs(tried, target, first):
    """The epochs to try next. tried: {epochs: mean accuracy} so far."""
    if not tried:
        return first
    below = [epochs for epochs, accuracy in tried.items() if accuracy < target]
    above = [epochs for epochs, accuracy in tried.items() if accuracy >= target]
    if not above:
        return 2 * max(tried)
    if not below:
        return max(1, round(min(tried) / 2, 1))
    return round((max(below) * min(above)) ** 0.5, 1)


def plan(settings, records):
    """The networks of all rounds that are done, and of each variant's next one."""
    jobs = []
    for start, feature in variants():
        tried = {}
        for _ in range(settings['rounds']):
            epochs = next_epochs(tried, settings['target'], settings['first'])
            cell = {'start': start, 'feature': feature, 'epochs': epochs}
            jobs.extend((cell, seed) for seed in range(settings['runs']))
            made = [record['tta_val_acc'] for record in in_cell(records, **cell)]
            if epochs in tried or len(made) < settings['runs']:
                break
            tried[epochs] = np.mean(made)
    return jobs


def epochs_to(target, epochs, errors):
    """The epochs at which a line in logarithms, through these points, has the target's error.

    NaN if the errors do not fall, or the line would have to go on for more than twice the epochs.
    """
    slope, intercept = np.polyfit(np.log(epochs), np.log(errors), 1)
    if slope >= 0:
        return np.nan
    logarithm = (np.log(1 - target) - intercept) / slope
    if not np.log(min(epochs) / 2) <= logarithm <= np.log(2 * max(epochs)):
        return np.nan
    return np.exp(logarithm)


def resample(errors, rng):
    """Of {epochs: the errors of networks}: as many of them, drawn with replacement."""
    return {epochs: rng.choice(values, len(values)) for epochs, values in errors.items()}


def epochs_of(errors, target):
    """epochs_to of {epochs: the errors of networks}."""
    epochs = [epochs for epochs, values in errors.items() for _ in values]
    return epochs_to(target, epochs, np.concatenate(list(errors.values())))


def found_epochs(records, target, resamples=200):
    """{(start, feature): epochs to the target, then those of `resamples` bootstraps}.

    Of those for which two or more numbers of epochs have been tried.
    """
    rng = np.random.default_rng(0)
    found = {}
    for start, feature in variants():
        errors = {}
        for record in in_cell(records, start=start, feature=feature):
            errors.setdefault(record['cell']['epochs'], []).append(1 - record['tta_val_acc'])
        if len(errors) < 2:
            continue
        samples = [errors, *(resample(errors, rng) for _ in range(resamples))]
        found[start, feature] = np.array([epochs_of(sample, target) for sample in samples])
    return found


def value_and_interval(samples):
    """(the first sample, the ends of the 95% interval of all); NaN if the first is."""
    if np.isnan(samples[0]):
        return np.nan, np.nan, np.nan
    return samples[0], *np.nanpercentile(samples, [2.5, 97.5])


def savings(found, feature):
    """What a feature saves (the final recipe, the baseline), in epochs, each with its interval."""
    unknown = np.array([np.nan])
    final = found.get(('final', feature), unknown) - found.get(('final', 'none'), unknown)
    baseline = found.get(('baseline', 'none'), unknown) - found.get(('baseline', feature), unknown)
    return value_and_interval(final), value_and_interval(baseline)


#### Table and picture #############################################################################


def print_table(found, target):
    print(f'epochs to {100 * target:.0f}%, with the 95% interval')
    print('                         final recipe without   whitened baseline with')
    for feature in ['none', *FEATURES]:
        row = f'{feature:24}'
        for start in ('final', 'baseline'):
            cell = '     -'
            if (start, feature) in found:
                epochs, low, high = value_and_interval(found[start, feature])
                cell = f'{epochs:6.1f} ({low:.1f} to {high:.1f})'
            row += f'{cell:24}'
        print(row.rstrip())
    print('of the paper, to 94%:')
    for (start, feature), epochs in PUBLISHED.items():
        print(f'  {start}, {feature}: {epochs}')


def draw(found, target, stem):
    """Figure 4: the epochs that each feature saves, to both ends."""
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    places = np.arange(len(FEATURES))
    saved = np.array([savings(found, feature) for feature in FEATURES])
    for start, name in enumerate(('final recipe', 'whitened baseline')):
        values, low, high = saved[:, start].T
        at = places + 0.4 * (start - 0.5)
        axes.barh(at, values, 0.38, color=COLOURS[start], label=f'to the {name}')
        axes.hlines(at, low, high, color='black', linewidth=1)
    axes.set_yticks(places, FEATURES)
    axes.set_ylim(len(FEATURES) - 0.5, -0.5)
    axes.axvline(0, color='black', linewidth=0.8)
    axes.set_xlabel(f'epochs to {100 * target:.0f}% that a feature saves')
    axes.legend(frameon=False)
    save_both(figure, stem)


def show(config, records, folder):
    target = config['settings']['target']
    found = found_epochs(records, target)
    print_table(found, target)
    draw(found, target, folder / 'ablation')


STUDY = Study('ablation', __doc__, {'airbench94': SCALES}, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
