"""How many epochs each feature of airbench94 saves (Jordan 2024, Figure 4 and section 5.1).

    python -m studies.ablation                              # half an hour on two CPU cores
    python -m studies.ablation --scale medium               # the same time, for three features
    torchrun --nproc_per_node=8 -m studies.ablation --scale paper --out logs/ablation --data cifar10
    python -m studies.ablation --show --out logs/ablation   # the table and the picture again

How many epochs does it take to reach the target? We search for that number for the final recipe
without a feature, and for the whitened baseline with it: we double the epochs while the mean of a
few networks is below the target, halve them while it is above, and then, if there are rounds left,
try the geometric mean of the two numbers that enclose it. The result comes from a straight line, in
logarithms, through the errors at all numbers of epochs that we tried; its interval comes from a
bootstrap over the networks. The baseline has whitening and no other feature, so whitening itself is
only removed from the final recipe.

--scale paper has the paper's target, 94%, and 25 networks at each number of epochs: about 14 * 6 *
25 trainings of at least 0.4 PFLOP, or two A100-hours. The others have narrow networks and targets
of their own: --scale small with a tenth of the images; and --scale medium with a quarter of images
and widths, which removes three features from the final recipe and tries two numbers of epochs.
"""

import sys
from operator import itemgetter

import numpy as np
import torch
from torch import nn

import airbench94
from lab.networks import tta_level
from lab.options import override
from studies.common import Study, first_images, in_cell, run_study
from studies.flip import NARROW, FlipLoader
from studies.show import COLOURS, new_figure, print_table, save_both

# Where a training starts from, and what happens to the feature there.
STARTS = {'final': 'final recipe', 'baseline': 'whitened baseline'}
CHANGES = {'final': 'without it', 'baseline': 'with it'}

# What we set where a feature is missing.
WITHOUT = {
    'whitening': [],
    'identity initialization': [],
    'bias scaler': ['opt.bias_scaler=1'],
    'Lookahead': ['opt.lookahead.decay=0'],
    'multi-crop TTA': ['net.tta_level=1'],
    'alternating flip': [],
}
FEATURES = list(WITHOUT)

QUARTER = ['net.widths.block1=16', 'net.widths.block2=64', 'net.widths.block3=64']

PAPER = {
    'starts': list(STARTS),
    'features': FEATURES,
    'hyp': [],
    'images': None,  # of the training set: all
    'tests': None,  # of the test set: all
    'target': 0.94,
    'first': 12,  # epochs
    'rounds': 6,
    'runs': 25,
}
MEDIUM = PAPER | {
    'starts': ['final'],
    'features': ['Lookahead', 'multi-crop TTA', 'alternating flip'],
    'hyp': [*QUARTER, 'opt.batch_size=250'],
    'images': 12_500,
    'target': 0.8,
    'first': 6,
    'rounds': 2,
    'runs': 6,
}
SMALL = PAPER | {
    'hyp': [*NARROW, 'opt.batch_size=100'],
    'images': 5000,
    'tests': 5000,
    'target': 0.6,
    'first': 4,
    'rounds': 3,
    'runs': 3,
}
SCALES = {'paper': PAPER, 'medium': MEDIUM, 'small': SMALL}

# Epochs to 94%, where the paper's text says so (sections 3.2, 3.3, 3.6 and 5.1).
PUBLISHED = {
    ('final', 'none'): 9.9,
    ('final', 'identity initialization'): 12.8,
    ('baseline', 'none'): 21,
    ('baseline', 'identity initialization'): 18,
}


def variants(settings):
    """All trainings: (start, the feature that is removed from the final recipe, or added)."""
    found = [(start, 'none') for start in settings['starts']]
    for feature in settings['features']:
        for start in settings['starts']:
            if (start, feature) != ('baseline', 'whitening'):
                found.append((start, feature))
    return found


def features_of(start, feature):
    """The features that a training has, as a set."""
    if start == 'final':
        return set(FEATURES) - {feature}
    return {'whitening', feature} & set(FEATURES)


#### What to train #################################################################################


def init_randomly(layer, images, eps):
    """Instead of init_whitening_conv: the first layer starts like PyTorch's, too."""
    nn.init.kaiming_uniform_(layer.weight, a=5**0.5)


def forget_identity(net, seed):
    """Let all convolutions of airbench94's network start like PyTorch's, which draw from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in net.modules():
            if isinstance(module, airbench94.Conv):
                shape = module.in_channels, module.out_channels, module.kernel_size
                start = nn.Conv2d(*shape, bias=module.bias is not None)
                module.load_state_dict(start.state_dict())


def maker_of(has):
    """A make_net for networks with the features in the set `has`."""

    def make_net(hyp, num_classes, *, seed, **options):
        net = airbench94.make_net(hyp, num_classes, seed=seed, **options)
        if 'identity initialization' not in has:
            forget_identity(net, seed)
        net[0].weight.requires_grad = 'whitening' not in has  # then it learns
        return net

    return make_net


def train(cell, seed, place):
    """A network's accuracy, in [0, 1], with test-time augmentation."""
    settings = place.settings
    has = features_of(cell['start'], cell['feature'])
    changes = [change for name in FEATURES if name not in has for change in WITHOUT[name]]
    changes.append(f'opt.train_epochs={cell["epochs"]}')
    hyp = override(airbench94.hyp, [*settings['hyp'], *changes])
    flips = 'alternating' if 'alternating flip' in has else 'random'
    loader = place.training_loader(hyp['opt']['batch_size'], hyp['aug'], FlipLoader, flips=flips)
    functions = {'make_net': maker_of(has)}
    if 'whitening' not in has:
        functions['init_whitening_conv'] = init_randomly
    net = place.train(airbench94, loader, hyp, seed, **functions)
    tests = first_images(place.test_loader, settings['tests'])
    return {'tta_val_acc': airbench94.evaluate(net, tests, tta_level(hyp))}


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
    """The networks of all rounds that are done, and of each variant's next one, seed by seed."""
    jobs = []
    for start, feature in variants(settings):
        tried = {}
        for _ in range(settings['rounds']):
            epochs = next_epochs(tried, settings['target'], settings['first'])
            cell = {'start': start, 'feature': feature, 'epochs': epochs}
            jobs.extend((cell, seed) for seed in range(settings['runs']))
            made = [record['tta_val_acc'] for record in in_cell(records, **cell)]
            if epochs in tried or len(made) < settings['runs']:
                break
            tried[epochs] = np.mean(made)
    return sorted(jobs, key=itemgetter(1))


def epochs_to(target, epochs, errors):
    """Where a line through these points, in logarithms, has the target's error.

    NaN if the errors do not fall, or if that is at less than half or more than twice the epochs.
    """
    slope, intercept = np.polyfit(np.log(epochs), np.log(errors), 1)
    if slope >= 0:
        return np.nan
    logarithm = (np.log(1 - target) - intercept) / slope
    if not np.log(min(epochs) / 2) <= logarithm <= np.log(2 * max(epochs)):
        return np.nan
    return np.exp(logarithm)


def resample(errors, rng):
    """{epochs: the errors of networks}, with as many of them drawn with replacement."""
    return {epochs: rng.choice(values, len(values)) for epochs, values in errors.items()}


def epochs_of(errors, target):
    """`epochs_to` for {epochs: the errors of networks}."""
    epochs = [epochs for epochs, values in errors.items() for _ in values]
    return epochs_to(target, epochs, np.concatenate(list(errors.values())))


def found_epochs(records, settings, resamples=200):
    """{(start, feature): an array with the epochs to the target, and with each bootstrap's}.

    It has those for which at least two numbers of epochs were tried. All variants have the same
    bootstraps: where they tried the same epochs, their networks of the same seeds.
    """
    found = {}
    for start, feature in variants(settings):
        errors = {}
        for record in in_cell(records, start=start, feature=feature):
            errors.setdefault(record['cell']['epochs'], []).append(1 - record['tta_val_acc'])
        if len(errors) < 2:
            continue
        errors = dict(sorted(errors.items()))
        rng = np.random.default_rng(0)
        samples = [errors, *(resample(errors, rng) for _ in range(resamples))]
        found[start, feature] = np.array(
            [epochs_of(sample, settings['target']) for sample in samples]
        )
    return found


def value_and_interval(samples):
    """(the first sample, the ends of the 95% interval of all), or NaNs if the first is NaN."""
    if np.isnan(samples[0]):
        return np.nan, np.nan, np.nan
    return samples[0], *np.nanpercentile(samples, [2.5, 97.5])


def savings(found, feature):
    """The epochs that a feature saves each of STARTS, with their intervals."""
    unknown = np.array([np.nan])
    final = found.get(('final', feature), unknown) - found.get(('final', 'none'), unknown)
    baseline = found.get(('baseline', 'none'), unknown) - found.get(('baseline', feature), unknown)
    return {'final': value_and_interval(final), 'baseline': value_and_interval(baseline)}


#### What to show ##################################################################################


def epochs_text(interval):
    return '{:.1f} ({:.1f} to {:.1f})'.format(*interval)


def print_epochs(found, settings):
    starts, target = settings['starts'], settings['target']
    print(f'epochs to {100 * target:.0f}%, with the 95% interval; of the paper, to 94%')
    rows = []
    for feature in ['none', *settings['features']]:
        row = [feature]
        for start in starts:
            epochs, saved = '-', '-'
            if (start, feature) in found:
                epochs = epochs_text(value_and_interval(found[start, feature]))
                if feature != 'none':
                    saved = epochs_text(savings(found, feature)[start])
            row += [epochs, saved, str(PUBLISHED.get((start, feature), '-'))]
        rows.append(row)
    titles = ['feature']
    for start in starts:
        titles += [f'{STARTS[start]} {CHANGES[start]}', 'saves', 'paper']
    print_table(titles, rows)


def draw_savings(found, settings, stem):
    """Figure 4: the epochs that each feature saves, here and where the paper's text says so."""
    starts, features = settings['starts'], settings['features']
    published = {key: np.array([epochs]) for key, epochs in PUBLISHED.items()}
    panels = [('here', found, 100 * settings['target'])]
    if any(feature in features for _, feature in published):
        panels.append(('paper', published, 94))
    figure = new_figure(9, 1.5 + 0.5 * len(features))
    ratios = (2, 1)[: len(panels)]
    [row] = figure.subplots(1, len(panels), sharey=True, width_ratios=ratios, squeeze=False)
    places = np.arange(len(features))
    for axes, (title, epochs, percent) in zip(row, panels):
        saved = [savings(epochs, feature) for feature in features]
        for i, start in enumerate(starts):
            values, low, high = np.array([of_feature[start] for of_feature in saved]).T
            at = places + 0.4 * (i - (len(starts) - 1) / 2)
            axes.barh(at, values, 0.38, color=COLOURS[i], label=f'to the {STARTS[start]}')
            axes.hlines(at, low, high, color='black', linewidth=1)
        axes.axvline(0, color='black', linewidth=0.8)
        axes.set(title=title, xlabel=f'epochs to {percent:.0f}%\nthat a feature saves')
    row[0].set_yticks(places, features)
    row[0].set_ylim(len(features) - 0.5, -0.5)
    figure.legend(*row[0].get_legend_handles_labels(), loc='outside upper center', ncols=2)
    save_both(figure, stem)


def show(config, records, folder):
    settings = config['settings']
    found = found_epochs(records, settings)
    print_epochs(found, settings)
    draw_savings(found, settings, folder / 'ablation')


STUDY = Study('ablation', __doc__, {'airbench94': SCALES}, plan, train, show)

if __name__ == '__main__':
    sys.exit(run_study(STUDY))
