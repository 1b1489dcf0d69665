"""`lab report` and the summary, against hand calculations, the kept logs, and mistakes."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refuse

import airbench94
from lab import runs, summary
from lab.summary import print_summary, read_log, summarize

KEPT = sorted((ROOT / 'logs').glob('*.json'))


def make_log(accuracies, seconds=4.0, target=0.94, **more):
    """What the report reads of a log.json."""
    runs = [
        {
            'seed': seed,
            'tta_val_acc': accuracy,
            'seconds': seconds,
            'device': 'a GPU',
            'pflop': 0.36,
        }
        for seed, accuracy in enumerate(accuracies)
    ]
    content = {'hyp': {'target': target}, 'seed': 0, 'data': {'is_cifar10': True}}
    return content | {'dtype': 'float16', 'runs': runs} | more


def fail(run, reason):
    run['tta_val_acc'] = None
    run['failed'] = reason


@pytest.fixture
def write(tmp_path):
    """write(content, name) -> the path of a file with it."""

    def write(content, name='a.json'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def show(capsys):
    """show(arguments...) -> what a report prints."""

    def show(*args):
        assert call('report', *args) == 0
        printed = capsys.readouterr()
        assert printed.err == ''
        return printed.out

    return show


def row_of(text, name):
    """The cells of a log's row in the table, separated by two spaces or more."""
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [cell.strip() for cell in line.split('  ') if cell.strip()]


def test_one_log_has_the_statistics_of_a_hand_calculation(write, show):
    path = write(make_log([0.939, 0.940, 0.941, 0.942]))
    log = read_log(path)
    # std = sqrt(5e-6 / 3); its error of the mean is half of that; t = 0.0005 / 0.000645497, with 3
    # degrees of freedom, for which 3.182446 is the 97.5% quantile and P(T > 0.774597) = 0.2475.
    assert log.accuracies.std(ddof=1) == pytest.approx(0.001290994, abs=1e-9)
    (low, high), p_value = summary.interval_and_p(log.accuracies, log.target)
    assert low == pytest.approx(0.9405 - 3.182446 * 0.000645497, abs=1e-8)
    assert high == pytest.approx(0.9405 + 3.182446 * 0.000645497, abs=1e-8)
    assert p_value == pytest.approx(0.2475, abs=5e-5)
    assert row_of(show(path), 'a ') == [
        'a', '4', '0', '94.05%', '0.13%', '93.84% to 94.26%', '0.248', '94.00%', '0.36', '4.00',
        'a GPU', 'float16',
    ]  # fmt: skip


def test_two_logs_are_compared_by_welch_as_by_hand(write, show):
    old = write(make_log([0.939, 0.940, 0.941, 0.942]), 'old.json')
    new = write(make_log([0.942, 0.945, 0.948], seconds=3.0), 'new.json')
    difference, interval, p_value = summary.welch(read_log(old), read_log(new))
    # The variances of the means are 5e-6 / 12 and 9e-6 / 3, so t = 0.0045 / 0.001848423 = 2.434508;
    # degrees of freedom by Welch and Satterthwaite: 3.416667^2 / (0.416667^2 / 3 + 3^2 / 2) =
    # 2.561199. Integrating that t distribution's density gives p, and 3.514279 for 97.5%.
    width = 3.514279 * 0.001848423
    assert difference == pytest.approx(0.0045)
    assert p_value == pytest.approx(0.107597, abs=1e-6)
    assert interval.low == pytest.approx(0.0045 - width, abs=1e-8)
    assert interval.high == pytest.approx(0.0045 + width, abs=1e-8)
    text = show(old, new)
    assert 'new against old:\nmean accuracy +0.45 percentage points' in text
    assert "95% interval -0.20 to +1.10, two-sided p = 0.108 (Welch's t-test)" in text
    assert '0.750 times the seconds a run' in text
    assert 'differ' not in text


def test_what_cannot_be_tested_is_said(write, show):
    one = write(make_log([0.94]), 'one.json')
    equal = write(make_log([0.94, 0.94]), 'equal.json')
    assert 'one run proves nothing' in row_of(show(one), 'one')
    assert 'all runs are equal' in row_of(show(equal), 'equal')
    assert 'no test of the difference: one run proves nothing' in show(one, equal)
    assert 'no test of the difference: all runs are equal' in show(equal, one)
    assert '1.000 times the seconds' in show(one, one)
    assert 'against' not in show(one, one, equal)


def test_other_data_is_named(write, show):
    digits = write(make_log([0.94], data={'path': 'digits', 'is_cifar10': False}), 'digits.json')
    exact = write(make_log([0.94]), 'exact.json')
    assert 'digits: this is not a CIFAR-10 result' in show(digits)
    assert 'not a CIFAR-10' not in show(exact)


def test_another_device_is_no_comparison_of_seconds(write, show):
    here = write(make_log([0.94, 0.95]), 'here.json')
    content = make_log([0.94, 0.95])
    content['runs'][1]['device'] = 'another GPU'
    there = write(content, 'there.json')
    text = show(here, there)
    assert 'a GPU; another GPU' in row_of(text, 'there')
    assert 'device, dtype, mode or kernels differ' in text


@pytest.mark.parametrize('reason', [{'step': 7, 'reason': 'the loss is nan'}, 'no worker is left'])
def test_failed_runs_are_counted_and_left_out(write, show, reason):
    content = make_log([0.93, 0.94, 0.95])
    fail(content['runs'][1], reason)
    assert row_of(show(write(content)), 'a ')[1:4] == ['2', '1', '94.00%']
    for run in content['runs']:
        fail(run, reason)
    path = write(content)
    row = row_of(show(path), 'a ')
    assert row[1:4] == ['0', '3', '-'] and 'no run finished' in row
    assert 'no test of the difference: no run finished' in show(path, path)


def test_a_folder_is_read_while_its_runs_go_on(write, show, tmp_path):
    folder = tmp_path / 'thousand'
    content = make_log([0.93, 0.94, 0.95])
    runs = content.pop('runs')
    write(content, 'thousand/config.json')
    assert 'no finished run' in refuse('report', folder)
    for number, run in enumerate(runs[:2]):
        write(run, f'thousand/runs/{number:05}.json')
    assert row_of(show(folder), 'thousand')[1:4] == ['2', '0', '93.50%']
    log = write(content | {'runs': runs[:2]}, 'thousand/log.json')
    assert row_of(show(log), 'thousand')[1] == '2'
    write(runs[2], 'thousand/runs/00002.json')
    assert row_of(show(folder), 'thousand')[1:4] == ['3', '0', '94.00%']
    write('{"seed": 3, ', 'thousand/runs/00003.json')
    assert '00003.json: is not JSON' in refuse('report', folder)
    write(runs[1], 'thousand/runs/00003.json')
    line = refuse('report', folder)
    assert line.endswith('00003.json: has the seed of another run, 1; lab run makes the run again')


def test_a_log_that_was_changed_is_refused(show, tmp_path):
    """Also a log that a recipe's own main has written."""
    path = tmp_path / 'a.json'
    runs.write_json(path, make_log([0.94, 0.95]))
    assert airbench94.write_log(tmp_path / 'b.json', make_log([0.93, 0.95]))
    for name, mean in (('a', '94.50%'), ('b', '94.00%')):
        path = tmp_path / f'{name}.json'
        assert row_of(show(path), f'{name} ')[3] == mean
        path.write_text(path.read_text().replace('0.95', '0.96'))
        line = refuse('report', path)
        assert line.startswith(f'{path}: is damaged, or was edited: it has another checksum; ')


def test_a_folder_may_have_a_log_alone(write, show, tmp_path):
    write(make_log([0.93, 0.95]), 'alone/log.json')
    assert row_of(show(tmp_path / 'alone'), 'alone')[1:4] == ['2', '0', '94.00%']


@pytest.mark.parametrize('path', KEPT, ids=lambda path: path.stem)
def test_kept_logs_are_read_and_have_the_statistics_that_they_state(path):
    log = read_log(path)
    content = json.loads(path.read_text())
    dtypes = {'h200': 'float16', 'bfloat16': 'bfloat16'}
    assert log.dtype == dtypes.get(path.stem.split('-')[-1], 'float32')
    assert log.device
    if 'summary' not in content:  # a recipe's own log
        assert len(log.accuracies) == len(content['runs'])
        return
    stated = content['summary']
    assert len(log.accuracies) == stated['n'] and log.failed == stated['failed']
    assert log.accuracies.mean() == pytest.approx(stated['mean'])
    assert log.pflop > 0
    if stated['n'] > 1:
        interval, p_value = summary.interval_and_p(log.accuracies, log.target)
        assert log.accuracies.std(ddof=1) == pytest.approx(stated['std'])
        assert interval == pytest.approx(stated['ci95'])
        assert p_value == pytest.approx(stated['p_value'])


def test_all_kept_logs_fit_one_table(show):
    lines = show(*KEPT).splitlines()
    assert KEPT and [line.split()[0] for line in lines[1 : 1 + len(KEPT)]] == [
        path.stem for path in KEPT
    ]


def test_logs_readme_names_every_kept_file():
    readme = (ROOT / 'logs' / 'README.md').read_text()
    for path in (ROOT / 'logs').iterdir():
        assert path.is_dir() or path.name == 'README.md' or f']({path.name})' in readme, path.name


@pytest.mark.parametrize(
    ('content', 'complaint'),
    [
        ('{"runs": [', 'is not JSON'),
        (b'\xff\xfe\x00'.decode('latin-1'), 'is not JSON'),
        ('[1, 2]', 'holds no dict'),
        ('{"name": "a package"}', 'is not a log'),
        ({'runs': {'0': 1}}, 'is not a log'),
        (make_log([]), 'has no runs'),
        (make_log(['high']), 'is not a log'),
        (make_log([None]), 'is not a log'),
        (make_log([94.0]), 'impossible'),
        (make_log([float('nan')]), 'impossible'),
        (make_log([0.94], hyp={}), 'is not a log'),
        (make_log([0.94], runs=[{'seed': 0}]), 'is not a log'),
    ],
)
def test_what_is_no_log_gets_one_line(write, content, complaint):
    path = write(content)
    line = refuse('report', path)
    assert str(path) in line and complaint in line


def test_mistakes_of_the_call_get_one_line(write, tmp_path):
    path = write(make_log([0.93, 0.95]))
    assert 'LOG' in refuse('report')
    assert '--plott' in refuse('report', path, '--plott', 'x.png')
    assert 'No such file' in refuse('report', tmp_path / 'nowhere')
    assert 'holds no log.json' in refuse('report', tmp_path)
    for name in ('plot', 'plot.xyz', ''):
        assert 'use .png or .svg' in refuse('report', path, '--plot', name)
    for name in ('nowhere/plot.png', 'a.json/plot.png', 'folder.png'):
        (tmp_path / 'folder.png').mkdir(exist_ok=True)
        assert 'cannot be written' in refuse('report', path, '--plot', tmp_path / name)
    assert not list(tmp_path.glob('*.tmp'))


def test_a_plot_of_failed_runs_alone_is_refused(write, tmp_path):
    content = make_log([0.93])
    fail(content['runs'][0], 'no worker is left')
    assert 'nothing to draw' in refuse('report', write(content), '--plot', tmp_path / 'plot.png')


@pytest.mark.parametrize(
    ('suffix', 'magic'), [('.png', b'\x89PNG'), ('.PDF', b'%PDF'), ('.svg', b'<?xml')]
)
def test_a_plot_is_a_picture(write, show, tmp_path, suffix, magic):
    accuracies = np.random.default_rng(0).normal(0.94, 0.001, 50)
    many = write(make_log(accuracies), 'many.json')
    one = write(make_log([0.94], target=0.95), 'one.json')
    plot = tmp_path / f'plot{suffix}'
    plot.write_text('an older plot')
    assert f'plot in {plot}' in show(many, one, '--plot', plot)
    assert plot.read_bytes().startswith(magic) and plot.stat().st_size > 4000
    assert {path.name for path in tmp_path.iterdir()} == {'many.json', 'one.json', plot.name}


def test_the_same_plot_is_the_same_svg(write, show, tmp_path):
    path = write(make_log([0.93, 0.95]))
    for name in ('first.svg', 'second.svg'):
        show(path, '--plot', tmp_path / name)
    assert (tmp_path / 'first.svg').read_bytes() == (tmp_path / 'second.svg').read_bytes()


def test_only_a_plot_needs_matplotlib(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    path = write(make_log([0.93, 0.95]))
    line = refuse('report', path, '--plot', tmp_path / 'plot.png')
    assert line == 'a picture needs matplotlib: pip install matplotlib'
    assert '94.00%' in capsys.readouterr().out


def test_a_plot_does_not_need_the_backend_of_a_notebook(monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
    summary.new_figure(4, 4)
    assert 'MPLBACKEND' not in os.environ  # which matplotlib reads when it is imported


def test_everything_in_logs_can_be_given(show):
    """As the shell expands logs/*."""
    paths = sorted((ROOT / 'logs').iterdir())
    text = show(*paths)
    for path in paths:
        is_log = path.suffix == '.json'
        assert (f'\n{path.stem} ' if is_log else f'skipped {path}: ') in text


def test_a_recipes_own_log_is_read(write, show):
    """Its main has the device once, and counts no operations."""
    content = make_log([0.93, 0.95], device='a laptop')
    content['data'] = {'path': 'digits', 'is_cifar10': False}
    for run in content['runs']:
        del run['device'], run['pflop']
    text = show(write(content))
    assert row_of(text, 'a ')[6:] == ['0.5', '94.00%', '-', '4.00', 'a laptop', 'float16']
    assert 'a: this is not a CIFAR-10 result' in text


def test_among_several_what_is_no_log_is_skipped_by_name(write, show, tmp_path):
    log = write(make_log([0.93, 0.95]), 'folder/log.json')
    others = [write('# README', 'README.md'), write('{"a": 1}', 'other.json'), tmp_path / 'empty']
    others[-1].mkdir()
    others += [write(make_log([]), 'no-runs.json'), write(make_log([94.0]), 'impossible.json')]
    text = show(*others, log)
    assert all(f'skipped {path}: ' in text for path in others)
    assert row_of(text, 'folder')[1:4] == ['2', '0', '94.00%'] and 'against' not in text
    assert refuse('report', *others).startswith('there is no log among these')
    assert 'nowhere.json: No such file' in refuse('report', log, tmp_path / 'nowhere.json')


#### The summary of a command ######################################################################


def test_summary_against_known_statistics():
    records = make_log([0.939, 0.940, 0.941, 0.942])['runs']
    failed = {'failed': 'the loss is nan at step 3', 'tta_val_acc': None}
    found = summarize([*records, failed], target=0.94, chance=0.1)
    assert (found['n'], found['failed'], found['target'], found['chance']) == (4, 1, 0.94, 0.1)
    assert found['mean'] == pytest.approx(0.9405)
    assert found['std'] == pytest.approx(0.001290994, rel=1e-6)  # as by hand above
    assert found['p_value'] == pytest.approx(0.2475, abs=5e-4)
    width = 3.182446 * 0.000645497
    assert found['ci95'] == pytest.approx([0.9405 - width, 0.9405 + width])
    assert summarize(records[:1], 0.94, 0.1)['p_value'] is None
    assert summarize([records[0], records[0]], 0.94, 0.1)['p_value'] is None
    assert summarize([], 0.94, 0.1)['mean'] is None


@pytest.fixture
def printed_summary(capsys):
    """printed_summary(accuracies, ...) -> what a command prints at its end."""

    def printed_summary(accuracies, is_cifar10=True, pflop=0.36, chance=0.1, tests=10000):
        records = make_log(accuracies)['runs']
        records = [record | {'pflop': pflop} for record in records]
        data = {'test': tests, 'path': 'mine', 'is_cifar10': is_cifar10}
        print_summary(summarize(records, 0.94, chance), records, data)
        return capsys.readouterr().out

    return printed_summary


@pytest.mark.parametrize(
    ('accuracy', 'chance', 'tests', 'is_said'),
    [
        (0.1094, 0.1, 10000, True),  # p = 0.00104
        (0.1095, 0.1, 10000, False),  # p = 0.00093
        (0.9, 0.9, 10000, True),  # always the class of 90% of the images
        (0.95, 0.9, 10000, False),
        (1.0, 0.5, 9, False),  # 0.5**9 = 0.002: too few to tell
        (0.5, 0.5, 9, False),
        (0.5, 0.5, 10, True),  # 0.5**10 = 0.00098: just enough
        (1.0, 0.5, 10, False),
        (1.0, 1.0, 1000, False),  # a single class
    ],
)
def test_an_accuracy_that_may_be_chance_is_said(accuracy, chance, tests, is_said, printed_summary):
    line = f'not significantly better than always answering the commonest class, {chance:.4f}\n'
    for accuracies in ([accuracy], [accuracy] * 5):
        out = printed_summary(accuracies, chance=chance, tests=tests)
        assert (line in out) == is_said


def test_the_commonest_class_is_that_of_the_labels():
    labels = torch.tensor([3, 1, 3, 3, 0])
    assert summary.commonest_share(labels) == 0.6


def test_what_a_summary_says(printed_summary):
    out = printed_summary([0.94])
    assert 'one run proves nothing' in out and 'not a CIFAR-10 result' not in out
    assert '4.00 seconds and 0.36 PFLOP a run' in out
    assert '\n4.00 seconds a run' in printed_summary([0.94], pflop=None)
    assert 'all runs are equal' in printed_summary([0.94, 0.94])
    assert 'the data is mine' in printed_summary([0.94], is_cifar10=False)
    assert printed_summary([]) == 'runs finished: 0, failed: 0\n'
