"""What the logs of the scripts say, a row each, and whether two of them differ.

    python -m studies.report logs/thousand                # a folder that --out has named
    python -m studies.report old.json new.json            # also: is new better, and is it faster?
    python -m studies.report logs/* --plot accuracies.png

A LOG is a log.json, or the folder of a log, whose runs may still be going on. All figures are
computed anew from the log's runs. Accuracies are those with test-time augmentation; failed runs
have none, and are only counted.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from studies.common import Parser, UserError, exit_code, new_figure, save_figure


@dataclass
class Log:
    """What is read from a log. The arrays have a value for each run that finished."""

    name: str
    accuracies: np.ndarray  # the runs' tta_val_acc, in [0, 1]
    seconds: np.ndarray  # on the scripts' clock, which stands still during validation
    pflop: float  # 1e15 operations of a run on all its ranks, by torch's counter
    failed: int  # runs
    target: float  # accuracy in [0, 1], from hyp
    device: str
    dtype: str
    is_cifar10: bool

    def lacks(self):
        """Why there can be no t-test, or None if there can."""
        if len(self.accuracies) == 0:
            return 'no run finished'
        if len(self.accuracies) == 1:
            return 'one run proves nothing'
        if len(set(self.accuracies)) == 1:
            return 'all runs are equal'
        return None


def read_json(file):
    """The JSON object in `file`, as a dict. Raises UserError if it holds something else."""
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        message = f'{file}: {error.strerror}; give a log.json, or the folder of a log'
        raise UserError(message) from error
    except ValueError as error:
        raise UserError(f'{file}: is not JSON; give a log.json, or the folder of a log') from error
    if not isinstance(content, dict):
        raise UserError(f'{file}: is not a log of these scripts; give another file')
    return content


def read_content(path):
    """The content of a log.json, or of a folder what it will have. Raises UserError.

    The runs in the folder come first, as log.json is not rewritten while more of them are made.
    """
    if not path.is_dir():
        return read_json(path)
    config = path / 'config.json'
    runs = sorted((path / 'runs').glob('*.json'))
    if config.exists() and runs:
        return read_json(config) | {'runs': [read_json(file) for file in runs]}
    if (path / 'log.json').exists():
        return read_json(path / 'log.json')
    raise UserError(
        f'{path}: holds no log.json and no run that has ended; give the folder of a log'
    )


def read_log(path):
    """The Log in a file or folder. Raises UserError if that is not one, or has no runs."""
    content = read_content(path)
    if content.get('runs') == []:
        raise UserError(f'{path}: has no runs; give a log that has some')
    place = path.resolve()
    if place.name == 'log.json':
        place = place.parent
    try:
        runs = content['runs']
        finished = [run for run in runs if not run.get('failed')]
        # Newer logs have PFLOP and device with each run. Older ones have them once, and the device
        # also of each call that resumed the log.
        pflop = content.get('pflop') or content.get('pflop_per_run') or np.nan
        calls = [content, *content.get('resumed', []), *runs]
        devices = {call['device'] for call in calls if 'device' in call}
        log = Log(
            name=place.name.removesuffix('.json'),
            accuracies=np.array([float(run['tta_val_acc']) for run in finished]),
            seconds=np.array([float(run['seconds']) for run in finished]),
            pflop=float(np.mean([run.get('pflop', pflop) for run in finished or runs])),
            failed=len(runs) - len(finished),
            target=float(content['hyp']['target']),
            device='; '.join(sorted(devices)),
            dtype=str(content['dtype']),
            is_cifar10=content['data'].get('is_cifar10', True),  # the oldest logs do not say it
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'{path}: is not a log of these scripts, or damaged; give another'
        ) from error
    are_shares = (log.accuracies >= 0) & (log.accuracies <= 1)  # which NaN is not
    if not are_shares.all() or not (log.seconds > 0).all():
        raise UserError(f'{path}: has impossible accuracies or seconds; give another log')
    return log


def against_target(log):
    """(95% interval of the mean, p of the one-sided t-test that it is above the target)."""
    interval = stats.ttest_1samp(log.accuracies, log.target).confidence_interval(0.95)
    test = stats.ttest_1samp(log.accuracies, log.target, alternative='greater')
    return interval, float(test.pvalue)


def welch(first, second):
    """(second's mean minus first's, its 95% interval, two-sided p), by Welch's t-test."""
    test = stats.ttest_ind(second.accuracies, first.accuracies, equal_var=False)
    difference = float(second.accuracies.mean() - first.accuracies.mean())
    return difference, test.confidence_interval(0.95), float(test.pvalue)


def percent(share):
    return f'{100 * share:.2f}%'


def table_row(log):
    """{column: text} of a log."""
    row = {'log': log.name, 'n': str(len(log.accuracies)), 'failed': str(log.failed)}
    row |= {'mean': '-', 'std': '-', '95% interval of the mean': log.lacks(), 'p': '-'}
    row |= {'target': percent(log.target), 'PFLOP': '-', 'seconds': '-'}
    if len(log.accuracies) > 0:
        row['mean'] = percent(log.accuracies.mean())
        row['seconds'] = f'{log.seconds.mean():.2f}'
    if len(log.accuracies) > 1:
        row['std'] = percent(log.accuracies.std(ddof=1))
    if not log.lacks():
        interval, p_value = against_target(log)
        row['95% interval of the mean'] = f'{percent(interval.low)} to {percent(interval.high)}'
        row['p'] = f'{p_value:.3g}'
    if not np.isnan(log.pflop):
        row['PFLOP'] = f'{log.pflop:.3g}'
    return row | {'device': log.device, 'dtype': log.dtype}


def print_table(logs):
    rows = [table_row(log) for log in logs]
    rows.insert(0, {name: name for name in rows[0]})
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    for row in rows:
        cells = [text.ljust(widths[name]) for name, text in row.items()]
        print('  '.join(cells).rstrip())
    print(
        '\nAccuracies are with TTA; p is that of the one-sided t-test that their mean is above the'
    )
    print('target; PFLOP and seconds are those of a run, in the mean.')
    for log in logs:
        if not log.is_cifar10:
            print(f'{log.name}: these are no figures of CIFAR-10')


def print_comparison(first, second):
    print(f'\n{second.name} against {first.name}:')
    lacks = first.lacks() or second.lacks()
    if lacks:
        print(f'no test of the difference: {lacks}')
    else:
        difference, interval, p_value = welch(first, second)
        print(f'mean accuracy {100 * difference:+.2f} percentage points, ', end='')
        print(f'95% interval {100 * interval.low:+.2f} to {100 * interval.high:+.2f}, ', end='')
        print(f"two-sided p = {p_value:.3g} (Welch's t-test)")
    if len(first.seconds) > 0 and len(second.seconds) > 0:
        print(f'{second.seconds.mean() / first.seconds.mean():.3f} times the seconds a run')
    if (first.device, first.dtype) != (second.device, second.dtype):
        print('device or dtype differ, so the seconds do not compare what was run')


def draw(logs, file):
    """Write a histogram of the accuracies of each log's finished runs. Raises UserError."""
    figure = new_figure(8, 4 + 0.25 * len(logs))  # the legend has a line for each log
    logs = [log for log in logs if len(log.accuracies) > 0]
    if not logs:
        raise UserError(f'--plot {file}: no run finished, so there is nothing to draw')

    axes = figure.subplots()
    bins = np.histogram_bin_edges(100 * np.concatenate([log.accuracies for log in logs]), bins=30)
    for number, log in enumerate(logs):
        n = len(log.accuracies)
        mean = log.accuracies.mean()
        style = {'color': f'C{number}', 'label': f'n={n}, mean {percent(mean)}: {log.name}'}
        shares = np.full(n, 1 / n)  # so that logs of 25 and of 1000 runs compare
        axes.hist(100 * log.accuracies, bins, weights=shares, alpha=0.4, **style)
        axes.axvline(100 * mean, color=style['color'], linewidth=2)
    for target in sorted({log.target for log in logs}):
        axes.axvline(100 * target, color='black', linestyle=':', label=f'target {percent(target)}')
    axes.set_xlabel('accuracy with TTA, in % (solid line: mean of the runs)')
    axes.set_ylabel("share of a log's runs")
    figure.legend(loc='outside upper left')
    save_figure(figure, file)


def parse_args(argv):
    """The call's arguments. Raises UserError for a wrong call."""
    parser = Parser('python -m studies.report', __doc__)
    parser.add_argument('logs', nargs='+', metavar='LOG', help='a log.json, or the folder of a log')
    parser.add_argument('--plot', metavar='FILE', help='draw a histogram: .png, .svg or .pdf')
    return parser.parse_args(argv)


def report(argv):
    args = parse_args(argv)
    logs = [read_log(Path(path)) for path in args.logs]
    print_table(logs)
    if len(logs) == 2:
        print_comparison(*logs)
    if args.plot is not None:
        draw(logs, Path(args.plot))


def main(argv=None):
    return exit_code('report.py', report, argv)


if __name__ == '__main__':
    sys.exit(main())
