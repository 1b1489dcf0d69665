"""`lab check`: a part that fails does not stop the others, and what is wrong is found."""

import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import call, make_loaders, refuse
from torch.autograd import DeviceType

import airbench94
from kernels.flip_crop import triton
from lab import check
from lab.check import AIRBENCH, PARTS, RECORD, CheckError, Part
from lab.options import override

CPU = torch.device('cpu')
needs_triton = pytest.mark.skipif(triton is None, reason='needs Triton')


#### Parts that go wrong ###########################################################################

WRITE = 'import json, sys; open(sys.argv[1], "w").write(json.dumps({}))'
HANG = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']).pid, flush=True)
time.sleep(100)
"""
GARBAGE = r"""
import sys
sys.stdout.buffer.write(b'\xff\x00\x1b[31m | a pipe |\n\n')
open(sys.argv[1], 'w').write('{"line": ')
"""


def fake(name, code, limit=60.0):
    """A part that runs some Python, without torch."""
    return Part(name, [sys.executable, '-c', code], limit)


def passing(name, line='fine', figures=None):
    return fake(name, WRITE.format({'line': line, 'figures': figures or {}}))


class Checked:
    """What some parts came to: the report, the file, and what was printed."""

    def __init__(self, parts, folder, capsys, data=''):
        self.file = folder / 'deeper' / 'report.json'
        self.report = check.run_parts(parts, data, self.file, folder)
        check.print_report(self.report)
        self.out, self.err = capsys.readouterr()
        self.rows = {row['part']: row for row in self.report['parts']}


def is_running(pid):
    """Whether a process runs. One that has ended may still be listed, as a zombie."""
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except OSError:
        return False
    return state != 'Z'


def test_a_part_that_goes_wrong_does_not_stop_the_others(tmp_path, capsys):
    parts = [
        fake('hangs', HANG, limit=1),
        fake('fails', WRITE.format({'failed': 'ValueError: of two | lines\nat least'})),
        fake('crashes', 'import os; print("so far", flush=True); os.abort()'),
        fake('prints garbage', GARBAGE),
        Part('is skipped', None, 0),
        passing('passes', figures={'n': 3}),
    ]
    checked = Checked(parts, tmp_path, capsys)
    rows = checked.rows
    assert {name: row['status'] for name, row in rows.items()} == {
        'hangs': 'failed',
        'fails': 'failed',
        'crashes': 'failed',
        'prints garbage': 'failed',
        'is skipped': 'skipped',
        'passes': 'passed',
    }
    pid = rows['hangs']['output'].strip()
    assert rows['hangs']['result'] == f'took longer than 1 s; its last line: {pid}'
    assert 1 <= rows['hangs']['seconds'] < 20
    assert not is_running(pid)  # what a part has started ends with it
    assert rows['fails']['result'] == 'ValueError: of two / lines at least'
    assert rows['crashes']['result'] == 'was ended by SIGABRT; its last line: so far'
    assert rows['prints garbage']['result'].startswith('left no result (exit code 0)')
    assert rows['is skipped']['result'] == 'needs a GPU'
    assert rows['passes']['figures'] == {'n': 3}
    assert check.exit_code(checked.report) == 1


def test_the_table_and_the_file_say_the_same(tmp_path, capsys):
    parts = [passing('one', 'all | of it'), fake('two', 'raise SystemExit(3)')]
    checked = Checked(parts, tmp_path, capsys)
    written = json.loads(checked.file.read_text())
    assert written['parts'] == checked.report['parts']
    header, line, *rows, empty, failed = checked.out.splitlines()
    assert (header, line, empty) == ('| part | result | seconds |', '|---|---|---|', '')
    cells = [row.strip('| ').split(' | ') for row in rows]
    for (name, result, seconds), row in zip(cells, written['parts']):
        mark = 'FAILED: ' if row['status'] == 'failed' else ''
        assert name == row['part']
        assert result == mark + row['result']
        assert seconds == f'{row["seconds"]:.0f}'
    assert failed == 'failed: two: left no result (exit code 3)'
    assert 'one: at most 60 s' in checked.err and 'two: failed after' in checked.err


def test_the_exit_code_is_0_if_nothing_failed(tmp_path, capsys):
    checked = Checked([passing('one'), Part('two', None, 0)], tmp_path, capsys)
    assert check.exit_code(checked.report) == 0


def test_ctrl_c_ends_it_with_the_table_so_far(tmp_path, capsys, monkeypatch):
    processes = []

    def interrupt(process, name, limit):
        if name == 'one':
            return process.wait()
        processes.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(check, 'wait', interrupt)
    parts = [passing('one'), fake('two', HANG), passing('three')]
    checked = Checked(parts, tmp_path, capsys)
    assert [row['status'] for row in checked.report['parts']] == ['passed', 'interrupted']
    assert '| one | fine |' in checked.out and '| two | interrupted |' in checked.out
    assert json.loads(checked.file.read_text())['parts'] == checked.report['parts']
    assert check.exit_code(checked.report) == 130
    assert processes[0].returncode is not None


def test_time_that_a_part_has_left_goes_to_the_next(tmp_path, capsys):
    parts = [fake('one', 'import time; time.sleep(100)', limit=1), passing('two'), passing('three')]
    checked = Checked(parts, tmp_path, capsys)
    limits = [row['limit'] for row in checked.report['parts']]
    assert limits[:2] == [1, 60]
    assert limits[2] == pytest.approx(120 - checked.rows['two']['seconds'])


@pytest.mark.parametrize(
    ('first', 'data', 'expected'),
    [
        (passing('data', figures={'path': 'cifar10'}), '', 'cifar10'),
        (fake('data', 'raise SystemExit(3)'), '', 'digits'),
        (fake('data', 'raise SystemExit(3)'), 'mine', 'mine'),
    ],
)
def test_later_parts_take_the_images_that_were_found(first, data, expected, tmp_path, capsys):
    tell = 'import json, sys; json.dump({"line": sys.argv[2]}, open(sys.argv[1], "w"))'
    checked = Checked([first, fake('runs', tell)], tmp_path, capsys, data)
    assert checked.rows['runs']['result'] == expected


#### The command ###################################################################################


def test_all_limits_together_are_what_the_help_says(tmp_path):
    for is_gpu, most in ((True, 600), (False, 300)):
        parts = check.make_parts(is_gpu, tmp_path)
        assert [part.name for part in parts] == list(PARTS)
        assert sum(part.limit for part in parts) <= most
        interpreted = [part.name for part in parts if 'TRITON_INTERPRET' in part.environment]
        assert interpreted == ([] if is_gpu else ['kernels'])
    missing = [part.name for part in parts if part.command is None]
    assert missing == ['compile airbench94', 'compile record94', 'benchmarks']


def test_the_command_runs_parts_and_says_where_the_report_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', bool)  # False
    chosen = {name: PARTS[name] for name in ('machine', 'data', 'benchmarks')}
    monkeypatch.setattr(check, 'PARTS', chosen)
    monkeypatch.chdir(tmp_path)
    assert call('check') == 0
    out = capsys.readouterr().out
    (file,) = (tmp_path / 'logs').iterdir()
    assert out.endswith(f'figures, and what the parts printed: logs/{file.name}\n')
    machine, data, benchmarks = json.loads(file.read_text())['parts']
    assert machine['figures']['torch'] == torch.__version__
    assert f'torch {torch.__version__}' in machine['result']
    assert data['result'] == 'digits: 1437 training and 360 test images'
    assert benchmarks['result'] == 'needs a GPU'


def test_mistakes_get_one_line(tmp_path):
    assert refuse('check', '--data', 'nowhere') == '--data nowhere: there is no such folder'
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='file'):
        call('check', '--out', tmp_path / 'file' / 'report.json')


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (CheckError('it is off'), 'it is off'),
        (ValueError('two\nlines'), 'ValueError: two lines'),
        (KeyError('x'), "KeyError: 'x'"),
    ],
)
def test_an_error_becomes_the_result(error, expected, tmp_path, monkeypatch, capsys):
    def fail(data):
        raise error

    monkeypatch.setattr(check, 'PARTS', {'fails': (fail, 1, 1)})
    assert check.run_alone('fails', tmp_path / 'result.json', '') == 1
    assert check.read_result(tmp_path / 'result.json')['failed'] == expected
    assert 'Traceback' in capsys.readouterr().err  # for the report's file


#### Kernels #######################################################################################


@needs_triton
def test_the_kernels_are_compared_with_plain_torch():
    line, units = check.check_kernels('')
    assert 'flip_crop gives the bits of augment' in line
    assert units.keys() == {'lookahead', 'mean'}
    assert max(units.values()) <= 1


def augment_without_flip(images, index, flip, *args, **options):
    return airbench94.augment(images, index, torch.zeros_like(flip), *args, **options)


@needs_triton
def test_a_kernel_that_differs_is_found(monkeypatch):
    recipe = SimpleNamespace(
        augment=augment_without_flip,
        CIFAR_MEAN=airbench94.CIFAR_MEAN,
        CIFAR_STD=airbench94.CIFAR_STD,
    )
    with pytest.raises(CheckError, match=r'flip_crop is .* units off augment in float16'):
        check.check_flip_crop(recipe, check.pick_gpu())


def test_units_in_the_last_place():
    one = torch.tensor([1.0, -1.0], dtype=torch.float16)
    eps = torch.finfo(torch.float16).eps
    assert check.units_apart(one, one, one) == 0
    assert check.units_apart(one + eps, one, one) == 1
    assert check.units_apart(one + 3 * eps, one, one) == 3


#### The same training twice #######################################################################


@pytest.mark.parametrize('file', [AIRBENCH, RECORD])
def test_graphed_steps_are_the_eager_ones(file):
    line, figures = check.compare_graphs(file, '')
    limit = 1e-6 if torch.cuda.is_available() else 1e-9
    assert max(figures['losses'], figures['weights']) <= limit
    assert figures['variants'] == 2
    assert 'against eager steps, float64' in line


def with_stale_inputs(train_step):
    """A step that goes on with the images of its first call."""
    first = []

    def step(net, optimizer, inputs, *args):
        if not first:
            first.append(inputs.clone())
        return train_step(net, optimizer, first[0], *args)

    return step


def capture_once(function):
    """A capture whose replay does nothing more."""
    return partial(list, function())


@pytest.mark.parametrize(
    'wrong',
    [{'capture': check.call_again, 'wrap_step': with_stale_inputs}, {'capture': capture_once}],
    ids=['stale inputs', 'no replay'],
)
def test_graphed_steps_that_are_wrong_are_found(wrong, monkeypatch):
    monkeypatch.setattr(check, 'pick_gpu', partial(torch.device, 'cpu'))
    with pytest.raises(CheckError, match=r'largest relative differences: .*allowed'):
        check.compare_graphs(AIRBENCH, '', **wrong)


def test_differences_are_relative_and_the_largest_is_named():
    reference = [1.0, 2.0], {'a': torch.ones(4), 'b': torch.full((4,), 10.0)}
    training = [1.0, 2.2], {'a': torch.full((4,), 1.5), 'b': torch.full((4,), 11.0)}
    figures = check.compare(training, reference)
    assert figures == {'losses': pytest.approx(0.1), 'weights': 0.5, 'tensor': 'a'}
    assert 'weights 0.5 (a)' in check.judge(figures, {'losses': 0.2, 'weights': 0.5})
    for limits in ({'losses': 0.05, 'weights': 1}, {'losses': 1, 'weights': 0.4}):
        with pytest.raises(CheckError):
            check.judge(figures, limits)
    with pytest.raises(CheckError):
        check.judge(figures | {'losses': float('nan')}, {'losses': 0.2, 'weights': 0.5})


#### Profile #######################################################################################


def test_a_profile_takes_ten_steps_after_ten_timed_ones(narrow):
    hyp = override(narrow, ['opt.train_epochs=1'])
    loaders = check.random_loaders(airbench94, hyp, 23, CPU, torch.float32)
    start = time.perf_counter()
    watched = check.profile_training(airbench94, loaders, hyp, {})
    assert watched.calls == 23
    assert 0 < 10 * watched.seconds() < time.perf_counter() - start
    operators = {operator.key: operator for operator in watched.profiler.key_averages()}
    assert operators['aten::cross_entropy_loss'].count == 10
    shares = check.most_expensive(watched)
    assert len(shares) == 5
    assert 0 < sum(shares.values()) <= 1


def test_kernels_and_launches_are_counted_per_step():
    def event(name, device_type, microseconds=7.0, is_user_annotation=False):
        time_range = SimpleNamespace(elapsed_us=partial(float, microseconds))
        return SimpleNamespace(
            name=name,
            device_type=device_type,
            time_range=time_range,
            is_user_annotation=is_user_annotation,
        )

    events = [
        *[event('cudaLaunchKernel', DeviceType.CPU)] * 20,
        *[event('cuLaunchKernelEx', DeviceType.CPU)] * 10,
        *[event('cudaGraphLaunch', DeviceType.CPU)] * 10,
        *[event('cudaMemcpyAsync', DeviceType.CPU)] * 10,
        *[event('conv', DeviceType.CUDA, 1000)] * 50,
        *[event('Memcpy DtoD (Device -> Device)', DeviceType.CUDA, 500)] * 10,
        event('Optimizer.step#SGD.step', DeviceType.CUDA, 9e6, is_user_annotation=True),
    ]
    watched = SimpleNamespace(
        profiler=SimpleNamespace(events=partial(list, events)), seconds=partial(float, 0.008)
    )
    assert check.figures_on_gpu(watched) == {
        'wall_ms': 8.0,
        'gpu_ms': 5.5,
        'kernels': 5.0,
        'launches': 4.0,
    }


#### Runs ##########################################################################################


def test_runs_are_made_until_the_time_is_up(narrow, monkeypatch):
    hyp = override(narrow, ['opt.train_epochs=1'])
    records = check.make_runs(airbench94, make_loaders(), hyp, {}, wanted=2)
    assert [record['seed'] for record in records] == [0, 1]
    monkeypatch.setattr(time, 'perf_counter', partial(next, itertools.count(0, 15)))
    assert len(check.make_runs(airbench94, make_loaders(), hyp, {}, wanted=3)) == 1


def test_a_run_that_diverges_is_found():
    def train(*loaders_hyp_and_seed):
        return None, {'failed': 'the loss is nan at step 3'}

    with pytest.raises(CheckError, match='run 0 failed: the loss is nan at step 3'):
        check.make_runs(SimpleNamespace(train=train), make_loaders(), {}, {}, wanted=2)


@pytest.mark.parametrize(('accuracy', 'is_enough'), [(0.5, False), (0.96, True)])
def test_a_low_accuracy_is_found(accuracy, is_enough, monkeypatch):
    def train(train_loader, test_loader, hyp, seed, **faster):
        return None, {'seed': seed, 'tta_val_acc': accuracy, 'seconds': 2.0}

    monkeypatch.setattr(airbench94, 'train', train)
    monkeypatch.setattr(check, 'pick_device', partial(torch.device, 'cpu'))
    if is_enough:
        line, figures = check.check_runs(AIRBENCH, 'digits')
        assert 'eager: 96.00% in 2.00 s (n=1)' in line
        assert figures['eager']['mean'] == accuracy
    else:
        with pytest.raises(CheckError, match=r'50\.00% .* expected at least 85%'):
            check.check_runs(AIRBENCH, 'digits')
