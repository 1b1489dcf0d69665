"""studies/report.py against statistics that were computed by hand, the kept logs, and mistakes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from studies import report

KEPT = sorted((ROOT / 'logs').glob('*.json'))


def make_log(accuracies, seconds=4.0, target=0.94, **more):
    """A log.json's content as the scripts write it, as far as the report reads it."""
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
    content = {'hyp': {'target': target}, 'data': {'is_cifar10': True}, 'dtype': 'float16'}
    return content | {'runs': runs} | more


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
    """show(arguments...) -> what a report that succeeds prints."""

    def show(*args):
        assert report.main([str(arg) for arg in args]) == 0
        printed = capsys.readouterr()
        assert printed.err == ''
        return printed.out

    return show


@pytest.fixture
def refuse(capsys):
    """refuse(arguments...) -> the one line of a report that fails."""

    def refuse(*args):
        assert report.main([str(arg) for arg in args]) == 2
        line = capsys.readouterr().err
        assert line.startswith('report.py: ') and line.count('\n') == 1 and line.endswith('\n')
        return line

    return refuse


def row_of(text, name):
    """The cells of a log's row in the table, which are parted by two blanks or more."""
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [cell.strip() for cell in line.split('  ') if cell.strip()]


def test_one_log_has_the_statistics_of_a_hand_calculation(write, show):
    path = write(make_log([0.939, 0.940, 0.941, 0.942]))
    log = report.read_log(path)
    # std = sqrt(5e-6 / 3); its error of the mean is half of that; t = 0.0005 / 0.000645497, with 3
    # degrees of freedom, for which 3.182446 is the 97.5% quantile and P(T > 0.774597) = 0.2475.
    assert log.accuracies.std(ddof=1) == pytest.approx(0.001290994, abs=1e-9)
    interval, p_value = report.against_target(log)
    assert interval.low == pytest.approx(0.9405 - 3.182446 * 0.000645497, abs=1e-8)
    assert interval.high == pytest.approx(0.9405 + 3.182446 * 0.000645497, abs=1e-8)
    assert p_value == pytest.approx(0.2475, abs=5e-5)
    assert row_of(show(path), 'a ') == [
        'a', '4', '0', '94.05%', '0.13%', '93.84% to 94.26%', '0.248', '94.00%', '0.36', '4.00',
        'a GPU', 'float16',
    ]  # fmt: skip


def test_two_logs_are_compared_by_welch_as_by_hand(write, show):
    old = write(make_log([0.939, 0.940, 0.941, 0.942]), 'old.json')
    new = write(make_log([0.942, 0.945, 0.948], seconds=3.0), 'new.json')
    difference, interval, p_value = report.welch(report.read_log(old), report.read_log(new))
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
    assert 'digits: these are no figures of CIFAR-10' in show(digits)
    assert 'no figures' not in show(exact)


def test_another_device_is_no_comparison_of_seconds(write, show):
    here = write(make_log([0.94, 0.95]), 'here.json')
    content = make_log([0.94, 0.95])
    content['runs'][1]['device'] = 'another GPU'
    there = write(content, 'there.json')
    text = show(here, there)
    assert 'a GPU; another GPU' in row_of(text, 'there')
    assert 'device or dtype differ' in text


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


def test_a_folder_is_read_while_its_runs_go_on(write, show, refuse, tmp_path):
    folder = tmp_path / 'thousand'
    content = make_log([0.93, 0.94, 0.95])
    runs = content.pop('runs')
    write(content, 'thousand/config.json')
    assert 'no run that has ended' in refuse(folder)
    for number, run in enumerate(runs[:2]):
        write(run, f'thousand/runs/{number:05}.json')
    assert row_of(show(folder), 'thousand')[1:4] == ['2', '0', '93.50%']
    log = write(content | {'runs': runs[:2]}, 'thousand/log.json')
    assert row_of(show(log), 'thousand')[1] == '2'
    write(runs[2], 'thousand/runs/00002.json')
    assert row_of(show(folder), 'thousand')[1:4] == ['3', '0', '94.00%']
    write('{"seed": 3, ', 'thousand/runs/00003.json')
    assert '00003.json: is not JSON' in refuse(folder)


def test_a_folder_may_have_a_log_alone(write, show, tmp_path):
    write(make_log([0.93, 0.95]), 'alone/log.json')
    assert row_of(show(tmp_path / 'alone'), 'alone')[1:4] == ['2', '0', '94.00%']


@pytest.mark.parametrize('path', KEPT, ids=lambda path: path.stem)
def test_kept_logs_are_read_and_have_the_statistics_that_they_state(path):
    log = report.read_log(path)
    summary = json.loads(path.read_text())['summary']
    assert len(log.accuracies) == summary['n'] and log.failed == summary['failed']
    assert log.accuracies.mean() == pytest.approx(summary['mean'])
    assert log.pflop > 0 and log.device
    assert log.dtype == ('float16' if path.stem.endswith('h200') else 'float32')
    if summary['n'] > 1:
        interval, p_value = report.against_target(log)
        assert log.accuracies.std(ddof=1) == pytest.approx(summary['std'])
        assert [interval.low, interval.high] == pytest.approx(summary['ci95'])
        assert p_value == pytest.approx(summary['p_value'])


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
        ('[1, 2]', 'is not a log'),
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
def test_what_is_no_log_gets_one_line(write, refuse, content, complaint):
    path = write(content)
    line = refuse(path)
    assert str(path) in line and complaint in line


def test_mistakes_of_the_call_get_one_line(write, refuse, tmp_path):
    path = write(make_log([0.93, 0.95]))
    assert 'LOG' in refuse()
    assert '--plott' in refuse(path, '--plott', 'x.png')
    assert 'No such file' in refuse(tmp_path / 'nowhere')
    assert 'holds no log.json' in refuse(tmp_path)
    for name in ('plot', 'plot.xyz', ''):
        assert 'end it in .png or .svg' in refuse(path, '--plot', name)
    for name in ('nowhere/plot.png', 'a.json/plot.png', 'folder.png'):
        (tmp_path / 'folder.png').mkdir(exist_ok=True)
        assert 'cannot be written' in refuse(path, '--plot', tmp_path / name)
    assert not list(tmp_path.glob('*.tmp'))


def test_a_plot_of_failed_runs_alone_is_refused(write, refuse, tmp_path):
    content = make_log([0.93])
    fail(content['runs'][0], 'no worker is left')
    assert 'nothing to draw' in refuse(write(content), '--plot', tmp_path / 'plot.png')


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


def test_the_command_needs_matplotlib_for_plots_alone(write, tmp_path):
    hidden = write('raise ImportError', 'hidden/matplotlib.py').parent
    path = write(make_log([0.93, 0.95]))
    done = subprocess.run(
        [sys.executable, '-m', 'studies.report', str(path), '--plot', str(tmp_path / 'plot.png')],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(hidden)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and '94.00%' in done.stdout
    assert done.stderr == 'report.py: a picture needs matplotlib: pip install matplotlib\n'
