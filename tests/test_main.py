"""The recipes' own mains, as a user calls them who has copied one file into an empty folder."""

import importlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NOBODY, ONE_THREAD, ROOT

import swap94

ALONE = {name: value for name, value in ONE_THREAD.items() if name != 'PYTHONPATH'}
# Edits that a user could make: the digits train narrow networks for an epoch.
NARROW = """    settings['net']['widths'] = {'block1': 8, 'block2': 16, 'block3': 16}
    return settings
"""
QUICK = f"    settings['opt']['train_epochs'] = 1\n{NARROW}"
QUICK_SWAP = f"""    settings['phase1']['train_epochs'] = 1
    settings['phase2'] |= {{'train_epochs': 1, 'workers': 2, 'shards': 1}}
{NARROW}"""


# After this, the statistics of BatchNorm are not finite, while losses and weights are.
BROKEN = """def evaluate(net, *args, **options):
    for name, value in net.named_buffers():
        if name.endswith('norm.running_mean'):
            value.fill_(math.nan)
    return 0.1"""


def copy_alone(recipe, folder):
    """Copy a recipe into an empty folder, edited to be quick on the digits."""
    script = Path(shutil.copy(ROOT / recipe, folder))
    edit(script, '    return settings\n', QUICK_SWAP if recipe == 'swap94.py' else QUICK)
    return script


def edit(script, old, new):
    source = script.read_text()
    assert source.count(old) == 1
    script.write_text(source.replace(old, new))


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


@pytest.mark.parametrize(
    ('variables', 'line'),
    [
        ('WORLD_SIZE=2 RANK=0', 'WORLD_SIZE is set, but not MASTER_ADDR, MASTER_PORT; start the '),
        ('WORLD_SIZE=two', 'WORLD_SIZE=two in the environment: must be a number'),
    ],
)
def test_incomplete_variables_of_a_launcher_are_one_line(variables, line, tmp_path):
    script = copy_alone('swap94.py', tmp_path)
    environment = dict(variable.split('=') for variable in variables.split())
    done = run(script, '--data', 'digits', **environment)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith(f'swap94.py: {line}') and done.stderr.count('\n') == 1


def test_the_rank_on_a_machine_may_be_empty_but_must_be_a_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', bool(1).__bool__)
    monkeypatch.setattr(torch.cuda, 'set_device', str)
    for text, gpu in (('', 0), ('3', 3)):
        monkeypatch.setenv('LOCAL_RANK', text)
        assert swap94.pick_device()[0] == torch.device('cuda', gpu)
    monkeypatch.setenv('LOCAL_RANK', 'x')
    with pytest.raises(ValueError, match='LOCAL_RANK=x in the environment: must be a number'):
        swap94.pick_device()


def test_a_set_of_your_own_is_for_the_lab(folder, tmp_path):
    script = copy_alone('airbench94.py', tmp_path)
    before = sorted(folder.iterdir())
    done = run(script, '--data', folder)
    line = (
        f'airbench94.py: --data {folder}: for your own set, use python -m lab run airbench94.py\n'
    )
    assert (done.returncode, done.stderr) == (2, line)
    assert sorted(folder.iterdir()) == before


def run_in_shell(command, folder, **environment):
    """Run a line of bash. {python} in it is this Python."""
    return subprocess.run(
        ['bash', '-c', command.format(python=f"'{sys.executable}'")],
        cwd=folder,
        env=ALONE | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize(
    'command',
    [
        '{python} airbench94.py --data digits 2>&-',
        '{python} -OO airbench94.py --data digits >&-',
        '{python} airbench94.py --data digits > /dev/full',
        'set -o pipefail; {python} airbench94.py --data digits --runs 3 2>&1 | head -n 3',
    ],
)
def test_whatever_becomes_of_its_output_a_recipe_trains(command, tmp_path):
    script = copy_alone('airbench94.py', tmp_path)
    done = run_in_shell(command, tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    wanted = 3 if '--runs 3' in command else 1
    assert len(load_log(script)['runs']) == wanted
    if wanted == 3:
        assert len(done.stdout.splitlines()) == 3


def test_swap_goes_on_when_nobody_reads_it_any_more(tmp_path):
    copy_alone('swap94.py', tmp_path)
    command = 'set -o pipefail; {python} swap94.py --data digits --runs 2 | head -n 4'
    done = run_in_shell(command, tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert len(done.stdout.splitlines()) == 4
    (file,) = tmp_path.glob('logs/*.json')
    assert [record['seed'] for record in json.loads(file.read_text())['runs']] == [0, 1]
    assert not list(tmp_path.glob('logs/unfinished/*'))


def test_a_terminal_may_lack_letters(tmp_path):
    """Here those of the device's name, which is also in the script."""
    script = copy_alone('airbench94.py', tmp_path)
    edit(script, "return f'{platform.machine()}", "return f'猫 {platform.machine()}")
    ascii_only = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    done = run(script, '--data', 'digits', PYTHONIOENCODING='cp1252', **ascii_only)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith(r'\u732b ')
    log = load_log(script)
    assert log['device'].startswith('猫 ') and log['source'] == script.read_text()


def test_ctrl_c_ends_a_recipe_in_one_line(tmp_path):
    script = copy_alone('airbench94.py', tmp_path)
    command = [sys.executable, script.name, '--data', 'digits', '--runs', '1000']
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen(command, cwd=tmp_path, env=ALONE, **pipes) as process:
        while '| 0 |' not in ' '.join(process.stdout.readline().split()):
            pass
        while 'eval' not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, 'airbench94.py: interrupted\n')
    assert len(load_log(script)['runs']) >= 1


@pytest.mark.parametrize('recipe', ['airbench94.py', 'records/record94.py', 'swap94.py'])
def test_a_network_that_is_not_finite_is_a_failed_run(recipe, tmp_path):
    """Training ends with finite losses and weights, and the statistics are not finite."""
    script = copy_alone(recipe, tmp_path)
    source = script.read_text()
    start = source.index('def evaluate(')
    end = source.index('\n\n\n', start)
    script.write_text(source[:start] + BROKEN + source[end:])
    done = run(script, '--data', 'digits')
    assert done.returncode == 0 and 'all runs failed' in done.stdout
    (file,) = tmp_path.glob('logs/*.json')
    (record,) = json.loads(file.read_text())['runs']
    assert record['failed'].endswith('norm.running_mean is not finite')


def test_a_log_that_cannot_be_written_any_more_stops_no_run(tmp_path):
    """As if the folder were replaced while the first run is trained."""
    script = copy_alone('records/record94.py', tmp_path)
    after = "        log['runs'].append(record)\n"
    edit(script, after, f"{after}        os.rmdir('logs')\n        Path('logs').touch()\n")
    done = run(script, '--data', 'digits')
    assert done.returncode == 2 and 'n=1, 0 failed' in done.stdout and 'log in' not in done.stdout
    assert 'record94.py: the log was not written: ' in done.stderr


@pytest.mark.parametrize('recipe', ['airbench94.py', 'swap94.py'])
def test_where_no_log_can_be_written_nothing_is_trained(recipe, tmp_path):
    script = copy_alone(recipe, tmp_path)
    (script.parent / 'logs').write_text('a file, where the folder should be')
    done = run(script, '--data', 'digits')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith(f'{script.name}: no log can be written: [Errno 17] File exists')
    assert done.stderr.endswith('; go to a folder where you can write\n')


@pytest.mark.parametrize(
    'name', ['airbench94', 'airbench95', 'airbench96', 'records.record94', 'records.record95']
)
def test_digits_hyp_is_a_copy_for_few_images(name):
    recipe = importlib.import_module(name)
    hyp = recipe.digits_hyp()
    assert hyp['opt']['batch_size'] == 64 and not hyp['aug']['flip']
    hyp['net']['widths']['block1'] = 1
    assert recipe.hyp['net']['widths']['block1'] > 1 and recipe.hyp['aug']['flip']
