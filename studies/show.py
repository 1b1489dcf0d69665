"""What the studies show with: means and p-values, tables and pictures."""

import numpy as np
import scipy.stats

from lab import summary

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
COLOURS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']


def new_figure(width, height):
    """A matplotlib figure, in inches, whose labels can be read at half of its size."""
    figure = summary.new_figure(width, height)
    from matplotlib import rcParams  # now, since new_figure says it in one line if it is missing

    rcParams.update({'font.size': 12, 'legend.frameon': False})
    return figure


def save_both(figure, stem):
    """Write a figure as stem.svg and stem.png."""
    for suffix in ('svg', 'png'):
        summary.save_figure(figure, stem.with_name(f'{stem.name}.{suffix}'))


def print_table(titles, rows):
    """Print rows of texts below their titles. The first column is at the left of its width."""
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        texts = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print('  '.join([first.ljust(widths[0]), *texts]).rstrip())


def mean_and_interval(values):
    """(mean, half the width of its 95% interval from Student's t, or NaN for one value)."""
    values = np.array(values)
    if len(values) < 2:
        return values.mean(), np.nan
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return values.mean(), half


def mean_text(values, form):
    """The mean of some values, with its 95% interval if there are several."""
    mean, half = mean_and_interval(values)
    if np.isnan(half):
        return f'{mean:{form}}'
    return f'{mean:{form}} +-{half:{form.removeprefix("+")}}'


def paired_p(larger, smaller):
    """One-sided p that `larger` has the larger mean, from a paired t-test.

    Both are in the same order; `smaller` may be a number. NaN for one pair, and 0 or 1 if all
    differences are equal.
    """
    differences = np.subtract(larger, smaller)
    if len(differences) < 2:
        return np.nan
    if np.allclose(differences, differences[0]):
        return float(differences[0] <= 0)
    return scipy.stats.ttest_1samp(differences, 0, alternative='greater').pvalue
