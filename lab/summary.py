"""What the runs of a log say: their mean, its interval, and whether two logs differ."""

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from lab.errors import UserError
from lab.runs import read_json, read_record

#### The summary of one log ########################################################################


def interval_and_p(accuracies, target):
    """(95% interval of the mean, p of the one-sided t-test that the mean is above the target)."""
    interval = stats.ttest_1samp(accuracies, target).confidence_interval(0.95)
    test = stats.ttest_1samp(accuracies, target, alternative='greater')
    return [float(interval.low), float(interval.high)], float(test.pvalue)


def commonest_share(labels):
    """The accuracy of always answering the commonest class. labels: int64 (N,)."""
    return labels.bincount().max().item() / len(labels)


def is_no_better(accuracy, chance, tests):
    """Whether an accuracy on `tests` images may be chance, by an exact binomial test.

    False if the images are so few that even an accuracy of 1 might be chance.
    """

    def may_be_chance(correct):
        return stats.binomtest(correct, tests, chance, alternative='greater').pvalue > 0.001

    return may_be_chance(round(accuracy * tests)) and not may_be_chance(tests)


def summarize(records, target, chance):
    """The summary in log.json. p_value is for the one-sided test that the mean is above target.

    chance: the commonest_share of the test labels.
    """
    accuracies = [record['tta_val_acc'] for record in records if not record.get('failed')]
    summary = {'n': len(accuracies), 'failed': len(records) - len(accuracies), 'target': target}
    summary['chance'] = chance
    summary |= {'mean': None, 'std': None, 'ci95': None, 'p_value': None}
    if accuracies:
        summary['mean'] = float(np.mean(accuracies))
    if len(accuracies) > 1:
        summary['std'] = float(np.std(accuracies, ddof=1))
    if len(set(accuracies)) > 1:
        summary['ci95'], summary['p_value'] = interval_and_p(accuracies, target)
    return summary


def print_summary(summary, records, data):
    """Print what `summarize` found. data: what config.json says about the images."""
    print('runs finished: {n}, failed: {failed}'.format(**summary))
    if summary['n'] == 0:
        return
    line = 'mean accuracy with TTA {mean:.4f}, target {target}: '
    if summary['ci95']:
        line += 'std {std:.4f}, 95% interval of the mean {ci95[0]:.4f} to {ci95[1]:.4f}, '
        line += 'one-sided p = {p_value:.2g}'
    elif summary['n'] == 1:
        line += 'one run proves nothing'
    else:
        line += 'all runs are equal'
    print(line.format(**summary))
    if is_no_better(summary['mean'], summary['chance'], data['test']):
        guess = 'always answering the commonest class'
        print(f'this mean is not significantly better than {guess}, {summary["chance"]:.4f}')
    finished = [record for record in records if not record.get('failed')]
    costs = [f'{np.mean([record["seconds"] for record in finished]):.2f} seconds']
    pflop = [record.get('pflop') for record in finished]
    if None not in pflop:
        costs.append(f'{np.mean(pflop):.3g} PFLOP')
    print(f'{" and ".join(costs)} a run')
    if not data['is_cifar10']:
        print(f'this is not a CIFAR-10 result: the data is {data["path"]}')


def print_phases(records):
    """Print the SWAP paper's Table 1: accuracies before and after averaging, and what they cost.

    The costs are sums since the start of a run. Other recipes' records have no phases.
    """
    finished = [r for r in records if not r.get('failed') and r.get('phases') and 'phase1' in r]
    if not finished:
        return
    workers = [worker for record in finished for worker in record['workers']]
    of_phase = {
        'phase 1': [record['phase1'] for record in finished],
        'phase 2, each worker': [worker for worker in workers if 'failed' not in worker],
        'averaging': finished,
    }
    print('                                                       on the slowest rank:')
    columns = '    n  val_acc      std    seconds      PFLOP  all-reduces        MB   PFLOP on all'
    print(f'{"after":20} {columns}')
    totals = {}
    for phase, (name, rows) in zip(('phase1', 'phase2', 'phase3'), of_phase.items()):
        if phase not in finished[0]['phases']:
            continue
        accuracies = [row['val_acc'] for row in rows]
        std = f'{np.std(accuracies, ddof=1):.4f}' if len(accuracies) > 1 else '-'
        for key in finished[0]['phases'][phase]:
            mean = np.mean([record['phases'][phase][key] for record in finished])
            totals[key] = totals.get(key, 0) + mean
        print(f'{name:20} {len(accuracies):5} {np.mean(accuracies):8.4f} {std:>8}', end=' ')
        print('{seconds:10.2f} {pflop:10.3g} {all_reduces:12.0f}'.format(**totals), end=' ')
        print('{megabytes:9.1f} {pflop_of_all:14.3g}'.format(**totals))


#### Reading logs ##################################################################################


class NoLogError(UserError):
    """A file or folder that is something else than a log, or a damaged one."""


@dataclass
class Log:
    """What we read from a log. The arrays have a value for each run that finished."""

    name: str
    accuracies: np.ndarray  # with test-time augmentation, from 0 to 1
    seconds: np.ndarray  # on the recipe's clock, which stops during validation
    pflop: float  # a run's, on all its ranks together; NaN if unknown
    failed: int  # how many runs
    target: float  # accuracy from 0 to 1, from hyp
    device: str
    dtype: str
    mode: str  # eager or compiled
    kernels: str  # Triton's or torch's
    is_cifar10: bool

    def conditions(self):
        """What must be the same in two logs for their seconds to compare."""
        return self.device, self.dtype, self.mode, self.kernels

    def lacks(self):
        """Why a t-test makes no sense, or None if it does."""
        if len(self.accuracies) == 0:
            return 'no run finished'
        if len(self.accuracies) == 1:
            return 'one run proves nothing'
        if len(set(self.accuracies)) == 1:
            return 'all runs are equal'
        return None


def read_file(file):
    """The dict in a JSON file. Raises UserError, or NoLogError if it holds something else."""
    try:
        return read_json(file)
    except OSError as error:
        message = f'{file}: {error.strerror}; give a log.json, or the folder of a log'
        raise UserError(message) from error
    except ValueError as error:
        raise NoLogError(f'{file}: {error}; give a log.json, or the folder of a log') from error


def read_content(path):
    """What is in a log.json, or what a folder's log.json would hold now. Raises UserError.

    In a folder we read the runs' own files, because log.json is only written at the end.
    """
    if not path.is_dir():
        return read_file(path)
    config = path / 'config.json'
    files = sorted((path / 'runs').glob('*.json'))
    if config.exists() and files:
        content = read_file(config)
        seed = content.get('seed')
        if type(seed) is not int:
            raise NoLogError(f'{config}: has no seed; give the folder of another log')
        return content | {'runs': [read_run(file, seed) for file in files]}
    if (path / 'log.json').exists():
        return read_file(path / 'log.json')
    raise NoLogError(f'{path}: holds no log.json and no finished run; give the folder of a log')


def read_run(file, seed):
    """The record in a file of the folder `runs`. Raises NoLogError; `lab run` would mend it."""
    try:
        return read_record(file, seed)
    except (OSError, ValueError) as error:
        raise NoLogError(f'{file}: {error}; lab run makes the run again') from error


def mean_pflop(content, runs):
    """PFLOP per run, or NaN. Older logs have it once for all runs."""
    of_all = content.get('pflop') or content.get('pflop_per_run')
    pflop = [run.get('pflop') or of_all for run in runs]
    return float(np.mean(pflop)) if pflop and None not in pflop else math.nan


def log_name(path):
    """What we call a log: its file's name, or that of its folder."""
    place = path.resolve()
    if place.name == 'log.json':
        place = place.parent
    return place.name.removesuffix('.json')


def read_log(path):
    """The Log in a file or folder. Raises UserError if it is not a log, or has no runs."""
    content = read_content(path)
    if content.get('runs') == []:
        raise NoLogError(f'{path}: has no runs; give a log that has some')
    try:
        runs = content['runs']
        finished = [run for run in runs if not run.get('failed')]
        # The device is in each run's record. Recipes' own logs have it once, and so have old logs,
        # which also have it for each call that resumed them.
        calls = [content, *content.get('resumed', []), *runs]
        devices = {call['device'] for call in calls if 'device' in call}
        log = Log(
            name=log_name(path),
            accuracies=np.array([float(run['tta_val_acc']) for run in finished]),
            seconds=np.array([float(run['seconds']) for run in finished]),
            pflop=mean_pflop(content, finished or runs),
            failed=len(runs) - len(finished),
            target=float(content['hyp']['target']),
            device='; '.join(sorted(devices)),
            dtype=str(content['dtype']),
            mode=content.get('mode', 'eager'),
            kernels='; '.join(sorted({run.get('kernels', 'torch') for run in runs})),
            is_cifar10=content['data'].get('is_cifar10', True),  # the oldest logs do not say it
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NoLogError(f'{path}: is not a log, or is damaged; give another one') from error
    is_share = (log.accuracies >= 0) & (log.accuracies <= 1)  # false for NaN
    if not is_share.all() or not (log.seconds > 0).all():
        raise NoLogError(f'{path}: has impossible accuracies or seconds; give another log')
    return log


def read_logs(paths):
    """The Logs in some paths. With several paths, those that hold something else are skipped."""
    logs = []
    for path in paths:
        try:
            logs.append(read_log(path))
        except NoLogError as error:
            if len(paths) == 1:
                raise
            print(f'skipped {str(error).partition(";")[0]}')
    if not logs:
        raise UserError('there is no log among these; give a log.json, or the folder of a log')
    return logs


#### The report ####################################################################################


def welch(first, second):
    """(second's mean minus first's, its 95% interval, two-sided p), from Welch's t-test."""
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
        (low, high), p_value = interval_and_p(log.accuracies, log.target)
        row['95% interval of the mean'] = f'{percent(low)} to {percent(high)}'
        row['p'] = f'{p_value:.3g}'
    if not math.isnan(log.pflop):
        row['PFLOP'] = f'{log.pflop:.3g}'
    return row | {'device': log.device, 'dtype': log.dtype}


def print_table(logs):
    rows = [table_row(log) for log in logs]
    rows.insert(0, {name: name for name in rows[0]})
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    for row in rows:
        cells = [text.ljust(widths[name]) for name, text in row.items()]
        print('  '.join(cells).rstrip())
    print('\nAccuracies are with TTA. p is for the one-sided t-test that the mean is above the')
    print('target. PFLOP and seconds are means per run.')
    for log in logs:
        if not log.is_cifar10:
            print(f'{log.name}: this is not a CIFAR-10 result')


def print_comparison(first, second):
    print(f'\n{second.name} against {first.name}:')
    lacks = first.lacks() or second.lacks()
    if lacks:
        print(f'no test of the difference: {lacks}')
    else:
        difference, interval, p_value = welch(first, second)
        ends = f'95% interval {100 * interval.low:+.2f} to {100 * interval.high:+.2f}'
        print(f'mean accuracy {100 * difference:+.2f} percentage points, {ends}, ', end='')
        print(f"two-sided p = {p_value:.3g} (Welch's t-test)")
    if len(first.seconds) > 0 and len(second.seconds) > 0:
        ratio = second.seconds.mean() / first.seconds.mean()
        print(f'{ratio:.3f} times the seconds a run, if the machine did nothing else')
    if first.conditions() != second.conditions():
        print('device, dtype, mode or kernels differ, so the seconds say nothing about the recipes')


def report(paths, plot=None):
    """Print a table with a row for each log, and, for two logs, whether they differ."""
    logs = read_logs(paths)
    print_table(logs)
    if len(logs) == 2:
        print_comparison(*logs)
    if plot is not None:
        draw(logs, plot)


#### Pictures ######################################################################################


def new_figure(width, height):
    """A matplotlib figure, in inches, that opens no window. Raises UserError without matplotlib."""
    os.environ.pop('MPLBACKEND', None)  # a notebook's, which need not be installed here
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('a picture needs matplotlib: pip install matplotlib') from error
    return Figure(figsize=(width, height), layout='constrained')


def save_figure(figure, file):
    """Write a figure in the format that the file's name says. Raises UserError.

    The same figure gives the same SVG, so that a kept picture changes only if its data does.
    """
    from matplotlib import rc_context

    kind = file.suffix.lower().removeprefix('.')
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f'--plot {file}: matplotlib cannot write that; use .png or .svg')
    undated = {'metadata': {'Date': None}} if kind == 'svg' else {}
    temporary = file.with_name(f'{file.name}.{os.getpid()}.tmp')
    try:
        with rc_context({'svg.hashsalt': 'lab'}):
            figure.savefig(temporary, format=kind, dpi=150, **undated)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # .pgf needs LaTeX, and raises RuntimeError
        message = ' '.join(str(error).split())
        raise UserError(f'--plot {file}: cannot be written: {message}') from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    print(f'\nplot in {file}')


def draw(logs, file):
    """Write a histogram of each log's accuracies. Raises UserError."""
    file = Path(file)
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
        shares = np.full(n, 1 / n)  # so that 25 runs compare with 1000
        axes.hist(100 * log.accuracies, bins, weights=shares, alpha=0.4, **style)
        axes.axvline(100 * mean, color=style['color'], linewidth=2)
    for target in sorted({log.target for log in logs}):
        axes.axvline(100 * target, color='black', linestyle=':', label=f'target {percent(target)}')
    axes.set_xlabel('accuracy with TTA, in % (solid line: mean of the runs)')
    axes.set_ylabel("share of a log's runs")
    figure.legend(loc='outside upper left')
    save_figure(figure, file)
