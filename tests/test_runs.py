"""Runs that processes share through one folder, ends of all kinds, and going on after them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ONE_THREAD,
    ROOT,
    TINY,
    call,
    figures,
    load_log,
    made_up_split,
    refuse,
    save_set,
)

import airbench94
from airbench94 import UserError, report_errors

SCRIPT = ROOT / 'airbench94.py'
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
RUNS = 6


@contextlib.contextmanager
def running(*args, cwd, launcher=()):
    """The script in a process of its own, which ends with the context if not before."""
    command = [sys.executable, *launcher, SCRIPT, *map(str, args)]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen(command, cwd=cwd, env=ONE_THREAD, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


def records(folder):
    return {path.name: path.read_text() for path in folder.glob('runs/*.json')}


def wait_for_records(folder, n):
    deadline = time.monotonic() + 120
    while len(records(folder)) < n and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(records(folder)) >= n


def finished(out):
    """The numbers of the runs whose ends were printed."""
    rows = [line.split() for line in out.splitlines() if line.startswith('|') and ' eval ' in line]
    return [int(row[1]) for row in rows]


def summary_of(out):
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('runs finished: '))
    return lines[start:]


class Shared:
    """The log of a few runs by two processes that were started at once, and what they printed."""

    def __init__(self, path, data):
        self.folder = path / 'new' / 'log'
        self.args = ['--data', data, '--seed', 5, '--out', self.folder, *TINY]
        args = ['--runs', RUNS, *self.args]
        with running(*args, cwd=path) as one, running(*args, cwd=path) as two:
            outputs = [process.communicate(timeout=200) for process in (one, two)]
        assert (one.returncode, two.returncode) == (0, 0), outputs
        assert [err for _, err in outputs] == ['', '']
        self.outs = [out for out, _ in outputs]

    def copy(self, folder):
        """(a copy of the log, the arguments that go on with it)."""
        shutil.copytree(self.folder, folder)
        args = [folder if arg == self.folder else arg for arg in self.args]
        return folder, args


@pytest.fixture(scope='module')
def shared(tmp_path_factory, folder):
    return Shared(tmp_path_factory.mktemp('shared'), folder)


@pytest.fixture
def quick(monkeypatch):
    """Trainings that take no time: a list of their seeds."""
    trained = []

    def train(train_loader, test_loader, hyp, seed, on_epoch, **functions):
        trained.append(seed)
        record = {'seed': seed, 'val_acc': 0.9, 'tta_val_acc': 0.9 + 0.001 * seed, 'seconds': 1.0}
        return torch.nn.Linear(2, 2), record | {'pflop': 0.36, 'epochs': []}

    monkeypatch.setattr(airbench94, 'train', train)
    return trained


#### Two processes #################################################################################


def test_two_processes_make_each_run_once(shared):
    made = [finished(out) for out in shared.outs]
    assert sorted(made[0] + made[1]) == list(range(RUNS))
    summaries = [summary_of(out) for out in shared.outs if 'runs finished: ' in out]
    assert summaries and all(summary == summaries[0] for summary in summaries)
    assert summaries[0][0] == f'runs finished: {RUNS}, failed: 0'
    for out in shared.outs:
        assert 'runs finished: ' in out or 'other processes ' in out


def test_one_process_makes_the_same_runs_as_two(shared, tmp_path, folder):
    alone = ['--data', folder, '--seed', 5, '--runs', RUNS, '--out', tmp_path / 'log', *TINY]
    assert call(*alone) == 0
    by_one, by_two = load_log(tmp_path / 'log'), load_log(shared.folder)
    assert list(map(figures, by_one['runs'])) == list(map(figures, by_two['runs']))
    assert [run['seed'] for run in by_two['runs']] == list(range(5, 5 + RUNS))
    assert by_one['summary'] == by_two['summary']


def in_threads(n, function):
    """Call function() in n threads at the same moment; returns what they raised."""
    errors = []
    barrier = threading.Barrier(n)

    def run():
        barrier.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_a_folder_can_be_opened_at_the_same_moment(tmp_path):
    config = {'hyp': {'opt': {'lr': 1.0}}, 'seed': 0}
    for attempt in range(20):
        folder = tmp_path / str(attempt) / 'log'

        def open_log(folder=folder):
            airbench94.open_log(folder, config)

        assert in_threads(4, open_log) == []
        assert json.loads((folder / 'config.json').read_text()) == config


def test_damaged_records_can_be_found_at_the_same_moment(tmp_path):
    (tmp_path / 'runs').mkdir()

    def read_records():
        assert airbench94.read_records(tmp_path, seed=0) == {}

    for _ in range(10):
        for run in range(20):
            airbench94.run_file(tmp_path, run).write_text('{')
        assert in_threads(4, read_records) == []
        assert records(tmp_path) == {}


def test_no_run_is_made_twice_at_the_same_moment(tmp_path, monkeypatch):
    made = []

    def make_run(run, folder, *rest):
        made.append(run)
        airbench94.write_json(airbench94.run_file(folder, run), {})

    def make_runs():
        airbench94.make_runs(100, tmp_path, {}, (), {}, {}, False)

    monkeypatch.setattr(airbench94, 'make_run', make_run)
    airbench94.open_log(tmp_path, {})
    assert in_threads(4, make_runs) == []
    assert sorted(made) == list(range(100))
    assert in_threads(4, make_runs) == []
    assert len(made) == 100


#### Going on ######################################################################################


def test_what_is_there_stays_and_more_can_be_wanted(shared, tmp_path, quick, capsys):
    log, args = shared.copy(tmp_path / 'log')
    before = records(log)
    assert call('--runs', RUNS, *args) == 0
    out = capsys.readouterr().out
    assert f'0 of {RUNS} runs to make' in out and '|' not in out
    assert summary_of(out) == summary_of(''.join(shared.outs))[: len(summary_of(out))]
    assert quick == [] and records(log) == before
    assert call('--runs', RUNS + 2, *args) == 0
    assert f'2 of {RUNS + 2} runs to make' in capsys.readouterr().out
    assert quick == [5 + RUNS, 6 + RUNS] and before.items() <= records(log).items()
    assert load_log(log)['summary']['n'] == RUNS + 2


def test_a_killed_process_costs_its_run(tmp_path, folder, capsys):
    args = ['--data', folder, '--out', tmp_path / 'log', *TINY]
    with running('--runs', 100000, *args, cwd=tmp_path) as process:
        wait_for_records(tmp_path / 'log', 2)
        process.kill()
        out = process.communicate()[0]
    before = records(tmp_path / 'log')
    assert '|' in out and not (tmp_path / 'log' / 'log.json').exists()
    wanted = len(before) + 2
    assert call('--runs', wanted, *args) == 0
    out = capsys.readouterr().out
    assert f'2 of {wanted} runs to make' in out
    assert finished(out) == [wanted - 2, wanted - 1]
    assert before.items() <= records(tmp_path / 'log').items()
    assert load_log(tmp_path / 'log')['summary']['n'] == wanted
    assert [run['seed'] for run in load_log(tmp_path / 'log')['runs']] == list(range(wanted))


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path, folder):
    args = ['--data', folder, '--runs', 1000000000, '--out', 'log', *TINY]  # starts at once
    with running(*args, cwd=tmp_path) as process:
        wait_for_records(tmp_path / 'log', 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, 'airbench94.py: interrupted\n')
    assert '1000000000 of 1000000000 runs to make' in out
    assert 'to go on, run the same command with --out log\n' in out
    log = load_log(tmp_path / 'log')
    assert log['summary']['n'] == len(log['runs']) == len(records(tmp_path / 'log')) >= 2
    assert f'runs finished: {len(log["runs"])}, failed: 0' in out


def kill_rank(rank, torchrun):
    """Kill the process that torchrun has made for a rank."""
    children = Path(f'/proc/{torchrun.pid}/task/{torchrun.pid}/children').read_text().split()
    for pid in children:
        if f'RANK={rank}' in Path(f'/proc/{pid}/environ').read_text().split('\0'):
            os.kill(int(pid), signal.SIGKILL)
            return
    raise AssertionError(f'there is no rank {rank}')


def test_torchrun_shares_runs_and_restarts_what_it_lost(tmp_path, folder):
    runs = 24
    args = ['--data', folder, '--runs', runs, '--out', tmp_path / 'log', *TINY]
    launcher = [*TORCHRUN, '--max-restarts=1']
    with running(*args, cwd=tmp_path, launcher=launcher) as process:
        wait_for_records(tmp_path / 'log', 3)
        kill_rank(0, process)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    log = load_log(tmp_path / 'log')
    assert [run['seed'] for run in log['runs']] == list(range(runs))
    # No run was made twice, but what each process had printed and not yet written.
    assert set(finished(out)) == set(range(runs)) and len(finished(out)) <= runs + 2
    rows = [line for line in out.splitlines() if line.startswith('|')]
    assert len({len(row) for row in rows}) == 1  # whole lines
    assert out.count(f' of {runs} runs to make') == 2  # once in each start


#### What cannot be read or written ################################################################


def test_what_is_no_whole_record_is_named_and_made_again(shared, tmp_path, capsys):
    log, args = shared.copy(tmp_path / 'log')
    before = records(log)
    record = json.loads(before['00003.json'])
    damaged = {
        '00000.json': '',
        '00001.json': '{}',
        '00002.json': before['00002.json'][:300],
        '00003.json': json.dumps(record | {'seed': 99}),
        '00004.json': '{"seed": 9}',
        '00005 copy.json': before['00005.json'],
        'notes.json': '[1, 2]',
    }
    for name, content in damaged.items():
        (log / 'runs' / name).write_text(content)
    assert call('--runs', RUNS, *args) == 0
    out = capsys.readouterr().out
    said, _, rest = out.partition(f'5 of {RUNS} runs to make')
    assert all(f'runs/{name}: no whole record of this log' in said for name in damaged)
    assert finished(rest) == [0, 1, 2, 3, 4]
    for name, text in records(log).items():
        assert figures(json.loads(text)) == figures(json.loads(before[name]))
    for name, content in damaged.items():  # nothing is thrown away
        kept = log / 'runs' / name.replace('.json', '.damaged')
        assert kept.read_text() == content
    assert load_log(log)['summary'] == load_log(shared.folder)['summary']


@pytest.mark.parametrize('content', ['', '{', '[1, 2]', '"config"'])
def test_a_damaged_config_is_refused(content, shared, tmp_path, quick):
    log, args = shared.copy(tmp_path / 'log')
    (log / 'config.json').write_text(content)
    line = refuse(*args)
    assert line == f'{log / "config.json"}: damaged, or not written by these scripts'
    assert (log / 'config.json').read_text() == content and quick == []


@pytest.mark.parametrize('name', ['00001.json', '00001.pt', 'log.json'])
def test_a_full_disk_takes_no_result(name, tmp_path, folder, quick, monkeypatch, capsys):
    replace = os.replace

    def replace_others(source, target):
        if Path(target).name == name:
            raise OSError(28, 'No space left on device')
        replace(source, target)

    def main():
        return call('--data', folder, '--runs', 3, '--save', '--out', tmp_path / 'log', *TINY)

    monkeypatch.setattr(os, 'replace', replace_others)
    monkeypatch.setattr(sys, 'argv', ['airbench94.py'])
    assert report_errors(main) == 2
    out, err = capsys.readouterr()
    assert err.startswith('airbench94.py: ') and err.count('\n') == 1
    assert f'{name} cannot be written: [Errno 28] No space left on device' in err
    if name == 'log.json':
        assert finished(out) == [0, 1, 2] and 'runs finished: 3, failed: 0' in out
    else:
        assert finished(out) == [0, 1]  # the result is printed, though it cannot be written
        assert 'runs finished: 1, failed: 0' in out
        assert f'--out {tmp_path / "log"}' in out
        assert load_log(tmp_path / 'log')['summary']['n'] == 1
    assert not list(tmp_path.rglob('*.tmp'))

    monkeypatch.undo()
    monkeypatch.setattr(airbench94, 'train', train_again(quick))
    assert main() == 0
    assert load_log(tmp_path / 'log')['summary']['n'] == 3


def train_again(quick):
    def train(train_loader, test_loader, hyp, seed, on_epoch, **functions):
        quick.append(seed)
        record = {'seed': seed, 'val_acc': 0.9, 'tta_val_acc': 0.9, 'pflop': 0.36}
        return torch.nn.Linear(2, 2), record | {'seconds': 1.0, 'epochs': []}

    return train


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    folder = tmp_path / 'taken'
    folder.mkdir()
    with pytest.raises(UserError, match=f'^{folder} cannot be written: '):
        airbench94.write_json(folder, {})
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_in_the_middle_keeps_the_finished_runs(tmp_path, folder, monkeypatch, capsys):
    def train(train_loader, test_loader, hyp, seed, on_epoch, **functions):
        if seed == 2:
            raise ZeroDivisionError
        record = {'seed': seed, 'val_acc': 0.9, 'tta_val_acc': 0.9, 'pflop': 0.36}
        return None, record | {'seconds': 1.0, 'epochs': []}

    monkeypatch.setattr(airbench94, 'train', train)
    with pytest.raises(ZeroDivisionError):
        call('--data', folder, '--runs', 5, '--out', tmp_path / 'log', *TINY)
    assert 'runs finished: 2, failed: 0' in capsys.readouterr().out
    assert load_log(tmp_path / 'log')['summary']['n'] == 2


#### Another call ##################################################################################


@pytest.fixture(scope='module')
def other_data(tmp_path_factory):
    """A set with other images, but the form and the classes of `folder`."""
    path = tmp_path_factory.mktemp('other')
    return save_set(path, made_up_split(200, seed=3), made_up_split(60, seed=4))


@pytest.mark.parametrize(
    ('change', 'values'),
    [
        (['opt.lr=3'], 'hyp.opt.lr is 11.5 there, and 3.0 here'),
        (['aug.flip=false'], 'hyp.aug.flip is True there, and False here'),
        (['--seed', 6], 'seed is 5 there, and 6 here'),
        (['--dtype', 'bfloat16'], 'dtype is float32 there, and bfloat16 here'),
        (['--compile'], 'mode is eager there, and compiled here'),
    ],
)
def test_another_call_is_refused(change, values, shared, quick):
    before = records(shared.folder), (shared.folder / 'log.json').read_bytes()
    line = refuse(*shared.args, *change)
    assert line == f'--out {shared.folder}: {values}; choose another folder'
    assert before == (records(shared.folder), (shared.folder / 'log.json').read_bytes())
    assert quick == []


def test_other_data_is_refused(shared, other_data):
    there = json.loads((shared.folder / 'config.json').read_text())['data']['sha256']
    line = refuse(*shared.args, '--data', other_data)
    assert line.startswith(f'--out {shared.folder}: data.sha256 is {there} there, and ')


def test_the_same_data_may_have_another_path(shared, tmp_path, folder, quick, monkeypatch):
    _, args = shared.copy(tmp_path / 'log')
    shutil.copytree(folder, tmp_path / 'copy')
    monkeypatch.chdir(folder.parent)
    for path in (f'{folder}/', folder.name, f'./{folder.name}', tmp_path / 'copy'):
        assert call('--runs', RUNS, *args, '--data', path) == 0
    assert quick == []


def test_another_script_is_refused(shared, tmp_path, quick, monkeypatch):
    changed = tmp_path / 'airbench94.py'
    changed.write_text(SCRIPT.read_text() + '# changed\n')
    monkeypatch.setattr(airbench94, '__file__', str(changed))
    line = refuse(*shared.args)
    assert line == f'--out {shared.folder}: source is another; choose another folder'
    assert quick == []


def test_a_folder_of_something_else_is_refused(tmp_path, folder, quick):
    (tmp_path / 'thesis.tex').touch()
    line = refuse('--data', folder, '--out', tmp_path, *TINY)
    assert line.startswith(f'--out {tmp_path}: holds thesis.tex, and no log')
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex'] and quick == []


def test_a_log_that_was_killed_at_its_start_is_started_anew(tmp_path, folder, quick):
    (tmp_path / 'config.lock').touch()
    (tmp_path / 'config.json.host.1.tmp').write_text('{"scr')
    assert call('--data', folder, '--out', tmp_path, *TINY) == 0
    assert load_log(tmp_path)['summary']['n'] == 1
