"""Test error against operations: published recipes, and this repository's logs (Figure 3).

    python -m studies.frontier logs/airbench*-h200.json logs/record94-cpu.json --out frontier

Writes frontier.svg and frontier.png, and prints a table with the same points. A LOG is one that
`python -m lab report` reads; its point is the mean of its runs. The line is fitted to the three
recipes of Jordan 2024, by least squares in logarithms. A recipe below it makes more of its
operations than they do.
"""

import sys
from pathlib import Path

import numpy as np

from lab.errors import Parser, UserError, report_errors
from lab.summary import read_log
from studies.show import COLOURS, new_figure, print_table, save_both

# (name, accuracy with TTA in percent, PFLOP) of CIFAR-10 trainings.
PAPER = [  # Jordan 2024, abstract
    ('airbench94', 94.01, 0.36),
    ('airbench95', 95.01, 1.4),
    ('airbench96', 96.05, 7.2),
]
OTHERS = [  # README of github.com/KellerJordan/cifar10-airbench, 2025
    ('airbench94_spectral', 94.05, 0.29),
    ('airbench96_faster', 96.00, 3.1),
    ('newer airbench96', 96.03, 4.9),
    ('standard ResNet-18', 96.0, 32.3),
]


def fit_line(points):
    """(slope, intercept) of log10(error in percent) against log10(PFLOP)."""
    _, accuracies, pflop = zip(*points)
    return np.polyfit(np.log10(pflop), np.log10(100 - np.array(accuracies)), 1)


def error_on_line(line, pflop):
    """The error in percent that the line has at some PFLOP."""
    return 10 ** np.polyval(line, np.log10(pflop))


def points_of(logs):
    """The logs as points like those above, with n in their names. Raises UserError."""
    points = []
    for log in logs:
        if len(log.accuracies) == 0 or np.isnan(log.pflop):
            raise UserError(f'{log.name}: has no accuracy or no PFLOP; leave it out')
        if not log.is_cifar10:
            raise UserError(f'{log.name}: is not a log of CIFAR-10; leave it out')
        name = f'{log.name}, n={len(log.accuracies)}'
        points.append((name, 100 * log.accuracies.mean(), log.pflop))
    return points


def print_points(groups, line):
    rows, number = [], 0
    for title, points in groups.items():
        rows.append([title, '', '', '', ''])
        for name, accuracy, pflop in points:
            number += 1
            ratio = (100 - accuracy) / error_on_line(line, pflop)
            row = [f'  {name}', str(number), f'{accuracy:.2f}%', f'{pflop:.3g}', f'{ratio:.3f}']
            rows.append(row)
    print_table(['', 'number', 'accuracy', 'PFLOP', 'error / error on the line'], rows)
    print(f'\nthe line: error = {10 ** line[1]:.2f}% * PFLOP^{line[0]:.3f}')


def draw_points(groups, line, stem):
    """Draw the points with their numbers, and a list of their names."""
    figure = new_figure(10, 5.5)
    axes = figure.subplots()
    x = np.geomspace(0.1, 40, 50)
    axes.plot(x, error_on_line(line, x), color='grey', linewidth=1, label="the paper's line")
    number = 0
    for (title, points), colour, marker in zip(groups.items(), COLOURS, 'so^'):
        names, accuracies, pflop = zip(*points)
        errors = 100 - np.array(accuracies)
        numbers = range(number + 1, number + len(points) + 1)
        number += len(points)
        listed = '\n'.join(f'{i}  {name}' for i, name in zip(numbers, names))
        label = f'{title}\n{listed}'
        axes.scatter(pflop, errors, color=colour, marker=marker, label=label, zorder=2)
        # Ours are next to those that they come from, so their numbers go to the other side.
        offset = (0, -20) if title == OURS else (0, 8)
        for i, place in zip(numbers, zip(pflop, errors)):
            options = {'textcoords': 'offset points', 'ha': 'center', 'color': colour}
            axes.annotate(str(i), place, offset, **options)
    axes.set(xscale='log', yscale='log', xlabel='PFLOP of a run', ylabel='test error, with TTA (%)')
    axes.set(xlim=(0.06, 120), ylim=(3, 8))
    ticks = [3, 4, 5, 6, 7, 8]
    axes.set_yticks(ticks, ticks)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.minorticks_off()
    axes.legend(loc='center left', bbox_to_anchor=(1, 0.5))
    save_both(figure, stem)


OURS = 'measured here'


def frontier(argv):
    parser = Parser('python -m studies.frontier', __doc__)
    parser.add_argument('logs', nargs='*', metavar='LOG', help='a log.json, or the folder of a log')
    parser.add_argument('--out', default='frontier', help='name of the pictures, without suffix')
    args = parser.parse_args(argv)
    groups = {'published: Jordan 2024': PAPER, 'published since': OTHERS}
    if args.logs:
        groups[OURS] = points_of([read_log(Path(path)) for path in args.logs])
    line = fit_line(PAPER)
    print_points(groups, line)
    draw_points(groups, line, Path(args.out))
    return 0


def main(argv=None):
    return report_errors('studies.frontier', frontier, argv)


if __name__ == '__main__':
    sys.exit(main())
