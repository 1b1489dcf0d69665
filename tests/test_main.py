"""The recipes' own mains, as a user calls them who has copied one file into an empty folder."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NOBODY, ONE_THREAD, ROOT

ALONE = {name: value for name, value in ONE_THREAD.items() if name != 'PYTHONPATH'}
# An edit that a user could make: the digits train a narrow network for an epoch.
QUICK = """    settings['opt']['train_epochs'] = 1
    settings['net']['widths'] = {'block1': 8, 'block2': 16, 'block3': 16}
    return settings
"""


def copy_alone(recipe, folder):
    """Copy a recipe into an empty folder, edited to be quick on the digits."""
    source = (ROOT / recipe).read_text()
    assert source.count('    return settings\n') == 1
    script = folder / Path(recipe).name
    script.write_text(source.replace('    return settings\n', QUICK))
    return script


def run(script, *args, **environment):
    return subprocess.run(
        [sys.executable, script.name, *args],
        cwd=script.parent,
        env=ALONE | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def load_log(script):
    """The log, which must be the only file that the call has left in logs/."""
    [file] = (script.parent / 'logs').iterdir()
    assert file.name.startswith(f'{script.stem}-') and file.suffix == '.json'
    return json.loads(file.read_text())


def cells(line):
    return [cell.strip() for cell in line.strip('|').split('|')]


@pytest.mark.parametrize('recipe', ['airbench94.py', 'records/record94.py'])
def test_a_recipe_alone_trains_prints_and_writes_its_log(recipe, tmp_path):
    script = copy_alone(recipe, tmp_path)
    done = run(script, '--data', 'digits', '--runs', '2', '--seed', '5')
    assert done.returncode == 0 and done.stderr == ''
    about, *rows, summary, where = done.stdout.splitlines()
    assert about.endswith(', eager; data: digits')
    assert [cells(row)[:2] for row in rows] == [
        ['run', 'epoch'], ['0', '1'], ['0', 'eval'], ['1', '1'], ['1', 'eval'],
    ]  # fmt: skip

    log = load_log(script)
    accuracies = [record['tta_val_acc'] for record in log['runs']]
    mean, std = sum(accuracies) / 2, abs(accuracies[0] - accuracies[1]) / 2**0.5
    expected = f'n=2, 0 failed: mean accuracy with TTA {mean:.4f}, std {std:.4f}, '
    assert summary.startswith(expected) and where.startswith('log in ')
    assert [f'{accuracy:.4f}' for accuracy in accuracies] == [cells(rows[i])[5] for i in (2, 4)]
    assert [record['seed'] for record in log['runs']] == [5, 6]
    assert log['source'] == script.read_text() and log['script'] == script.name
    assert (log['data'], log['mode']) == ({'path': 'digits', 'is_cifar10': False}, 'eager')
    assert log['hyp']['net']['widths']['block1'] == 8 and log['hyp']['opt']['batch_size'] == 64
    assert min(len(log[name]) for name in ('device', 'dtype', 'python', 'torch', 'argv')) > 0
    assert sorted(path.name for path in script.parent.iterdir()) == sorted(['logs', script.name])


def test_without_cifar10_it_trains_on_digits_and_says_so_loudly(tmp_path):
    script = copy_alone('airbench94.py', tmp_path)
    done = run(script, '--runs', '1', CIFAR10_URL=NOBODY)
    assert done.returncode == 0
    failure, blank, notice, what, *_ = done.stdout.splitlines()
    assert failure.startswith(f'CIFAR-10 from {NOBODY} failed: ') and blank == ''
    assert notice.startswith('*** THIS IS NOT CIFAR-10: CIFAR-10 could not be downloaded; put ')
    assert what == "*** Training on scikit-learn's handwritten digits instead."
    assert load_log(script)['data'] == {'path': 'digits', 'is_cifar10': False}


@pytest.mark.parametrize(
    ('args', 'line'),
    [
        (['--data', 'digits', '--compile'], '--compile needs kernels/ next to '),
        (['--data', 'nowhere'], '--data nowhere: there is no such folder'),
        (['--data', ''], '--data : there is no such folder'),
        (['--seed', str(2**32)], '--runs must be at least 1, and --seed from 0 to 4294967295'),
        (['--runs', '0'], '--runs must be at least 1, and --seed from 0 to 4294967295'),
        (['--seed', '-1'], '--runs must be at least 1, and --seed from 0 to 4294967295'),
    ],
)
def test_a_mistake_is_one_line(args, line, tmp_path):
    script = tmp_path / 'airbench94.py'
    script.write_text((ROOT / 'airbench94.py').read_text())
    done = run(script, *args)
    assert done.returncode != 0 and 'Traceback' not in done.stderr
    *usage, last = done.stderr.splitlines()
    assert line in last and all(text.startswith(('usage:', ' ')) for text in usage)
    assert [path.name for path in tmp_path.iterdir()] == [script.name]


def test_a_set_of_your_own_is_for_the_lab(folder, tmp_path):
    script = copy_alone('airbench94.py', tmp_path)
    before = sorted(folder.iterdir())
    done = run(script, '--data', folder)
    line = (
        f'airbench94.py: --data {folder}: for your own set, use python -m lab run airbench94.py\n'
    )
    assert (done.returncode, done.stderr) == (2, line)
    assert sorted(folder.iterdir()) == before


def test_without_stderr_a_recipe_trains(tmp_path):
    script = copy_alone('airbench94.py', tmp_path)
    command = f"'{sys.executable}' {script.name} --data digits 2>&-"
    done = subprocess.run(
        ['bash', '-c', command],
        cwd=tmp_path,
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and 'n=1, 0 failed' in done.stdout


def test_a_log_that_cannot_be_written_stops_no_run(tmp_path):
    script = copy_alone('records/record94.py', tmp_path)
    (script.parent / 'logs').write_text('a file, where the folder should be')
    done = run(script, '--data', 'digits')
    assert done.returncode == 2 and 'n=1, 0 failed' in done.stdout and 'log in' not in done.stdout
    assert 'the log was not written: ' in done.stderr


@pytest.mark.parametrize('name', ['airbench94', 'airbench95', 'airbench96', 'records.record94'])
def test_digits_hyp_is_a_copy_for_few_images(name):
    recipe = importlib.import_module(name)
    hyp = recipe.digits_hyp()
    assert hyp['opt']['batch_size'] == 64 and not hyp['aug']['flip']
    hyp['net']['widths']['block1'] = 1
    assert recipe.hyp['net']['widths']['block1'] > 1 and recipe.hyp['aug']['flip']
