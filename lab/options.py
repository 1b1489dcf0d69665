"""KEY=VALUE on the command line: changes to any recipe's hyperparameters."""

import copy
import difflib
import math

from lab.errors import UserError

# Outside of these, a value ends in a traceback or silently trains something else. The keys are the
# last names of the hyperparameters. Everything else may be any finite number.
RANGES = {
    'train_epochs': (1e-3, 1e6),
    'batch_size': (2, 1e9),  # BatchNorm needs two values
    'lr': (1e-9, 1e9),
    'lr_biases': (1e-9, 1e9),
    'lr_head': (1e-9, 1e9),
    'momentum': (0, 0.999),
    'filter_momentum': (0, 0.999),
    'newton_schulz': (0, 99),
    'weight_decay': (0, 1e9),
    'bias_scaler': (1e-9, 1e9),
    'label_smoothing': (0, 1),
    'whiten_bias_epochs': (0, 1e9),
    'start': (0, 1e9),
    'peak_at': (0, 1),
    'end': (0, 1e9),
    'every': (1, 1e9),
    'decay': (0, 1),
    'power': (0, 1e9),
    'size': (16, 32),
    'until': (0, 1),
    'from': (0, 1),
    'keep': (0, 1),
    'tau': (0, 1),
    'shards': (1, 1e9),
    'workers': (0, 1e9),
    'ranks_per_worker': (1, 1e9),
    'images': (1, 1e9),
    'translate': (0, 31),
    'cutout': (0, 31),
    'block1': (1, 8192),
    'block2': (1, 8192),
    'block3': (1, 8192),
    'depth': (2, 99),
    'batchnorm_momentum': (0, 1),
    'batchnorm_eps': (1e-30, 1e9),  # torch refuses 0
    'scaling_factor': (0, 1e9),
    'whiten_kernel': (1, 9),
    'whiten_images': (1, 1e9),
    'whiten_eps': (0, 1e9),
    'tta_level': (0, 2),
    'tta_margin': (0, 1e9),
    'target': (0, 1),
}


def flat(tree, prefix=''):
    """{'opt.lr': 11.5, ...} from nested dicts."""
    values = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            values |= flat(value, f'{prefix}{name}.')
        else:
            values[f'{prefix}{name}'] = value
    return values


def nearest_keys(word, hyp):
    return ', '.join(difflib.get_close_matches(word, flat(hyp), cutoff=0))


def parse_value(text, default):
    """`text` as a value of the same type as `default`. Raises ValueError."""
    if not isinstance(default, bool):
        return type(default)(text)
    if text.lower() not in ('true', 'false'):
        raise ValueError
    return text.lower() == 'true'


def check_range(assignment, name, value):
    """Raise UserError if the number `value` cannot work as the hyperparameter `name`."""
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if not math.isfinite(value):
        raise UserError(f'{assignment}: must be a finite number')
    if not low <= value <= high:
        raise UserError(f'{assignment}: must be from {low:g} to {high:g}')


def override(hyp, assignments):
    """A copy of `hyp` with each KEY=VALUE of `assignments` set. Raises UserError for a bad one."""
    hyp = copy.deepcopy(hyp)
    for assignment in assignments:
        key, _, text = assignment.partition('=')
        if key not in flat(hyp):
            raise UserError(f'{key}: hyp has no such key; the nearest are {nearest_keys(key, hyp)}')
        *path, name = key.split('.')
        group = hyp
        for part in path:
            group = group[part]
        default = group[name]
        if not isinstance(default, (bool, int, float, str)):
            raise UserError(f'{assignment}: {key} is no number or text; edit hyp in the recipe')
        try:
            value = parse_value(text, default)
        except ValueError as error:
            example = f'{type(default).__name__}, like {default}'
            raise UserError(f'{assignment}: must be of type {example}') from error
        if not isinstance(value, (bool, str)):
            check_range(assignment, name, value)
        group[name] = value
    return hyp
