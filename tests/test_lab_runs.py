"""Runs that processes share through one folder, and what is left after an end of any kind."""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ONE_THREAD, ROOT, TINY, call, figures, load_log, random_set, refuse, save_set
from hypothesis import given, settings
from hypothesis import strategies as st

import airbench94
from lab import runs
from lab.errors import UserError, report_errors

RECIPE = ROOT / 'airbench94.py'
RUN = ['run', RECIPE]
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
WANTED = 10


@contextlib.contextmanager
def running(*args, cwd, launcher=(), **environment):
    """`python -m lab run` in a process of its own, which ends with the context if not before."""
    command = [sys.executable, *launcher, '-m', 'lab', 'run', *map(str, args)]
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    env = ONE_THREAD | {'PYTHONPATH': str(ROOT)} | environment
    with subprocess.Popen(command, cwd=cwd, env=env, **options) as process:
        try:
            yield process
        finally:
            process.terminate()


def records(folder):
    return {path.name: path.read_text() for path in folder.glob('runs/*.json')}


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def wait_for_records(folder, n):
    def are_there():
        return len(records(folder)) >= n

    wait_for(are_there)


def finished(out):
    """The numbers of the runs whose results were printed."""
    rows = [line.split() for line in out.splitlines() if line.startswith('|')]
    return [int(row[1]) for row in rows if row[3] == 'eval']


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def kill_rank(rank, torchrun):
    """Kill the process that torchrun started for a rank."""
    children = Path(f'/proc/{torchrun.pid}/task/{torchrun.pid}/children').read_text().split()
    for pid in children:
        if f'RANK={rank}' in Path(f'/proc/{pid}/environ').read_text().split('\0'):
            os.kill(int(pid), signal.SIGKILL)
            return
    raise AssertionError(f'there is no rank {rank}')


class Shared:
    """The log of runs that two ranks shared, of which one was killed, and what they printed."""

    def __init__(self, path, data):
        self.folder = path / 'new' / 'log'
        self.args = [RECIPE, '--data', data, '--seed', 5, '--out', self.folder, *TINY]
        launcher = [*TORCHRUN, '--max-restarts=1']
        with running('--runs', WANTED, *self.args, cwd=path, launcher=launcher) as process:
            wait_for_records(self.folder, 5)  # by now, a slow rank 0 has printed its start, too
            kill_rank(0, process)
            self.out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err

    def copy(self, folder):
        """(a copy of the log, the arguments that go on with it)."""
        shutil.copytree(self.folder, folder)
        args = [folder if arg == self.folder else arg for arg in self.args]
        return folder, args


@pytest.fixture(scope='module')
def shared(tmp_path_factory, folder):
    return Shared(tmp_path_factory.mktemp('shared'), folder)


def train_quickly(trained, errors=None):
    """A `train` that takes no time and appends its seed to `trained`. errors: {seed: exception}."""

    def train(train_loader, test_loader, hyp, seed, on_epoch, **faster):
        if errors and seed in errors:
            raise errors[seed]
        trained.append(seed)
        on_epoch({'epoch': 1, 'val_acc': 0.9})
        record = {'seed': seed, 'val_acc': 0.9, 'tta_val_acc': 0.9 + 0.001 * seed}
        return torch.nn.Linear(2, 2), record | {'seconds': 1.0, 'epochs': []}

    return train


@pytest.fixture
def quick(monkeypatch):
    """Trainings that take no time: a list of their seeds."""
    trained = []
    monkeypatch.setattr(airbench94, 'train', train_quickly(trained))
    return trained


#### Two processes #################################################################################


def test_torchrun_shares_runs_and_restarts_what_it_lost(shared):
    printed = finished(shared.out)
    # Those that were killed may not have printed the run that they wrote last.
    assert len(printed) == len(set(printed)) >= WANTED - 2
    assert load_log(shared.folder)['summary']['n'] == len(records(shared.folder)) == WANTED
    assert f'runs finished: {WANTED}, failed: 0' in shared.out
    assert shared.out.count(f' of {WANTED} runs left') == 2  # once in each start
    rows = [line for line in shared.out.splitlines() if line.startswith('|')]
    assert len({len(row) for row in rows}) == 1  # whole lines


def test_one_process_makes_the_same_runs_as_two(shared, tmp_path, folder):
    alone = ['--data', folder, '--seed', 5, '--runs', WANTED, '--out', tmp_path / 'log', *TINY]
    assert call(*RUN, *alone) == 0
    by_one, by_two = load_log(tmp_path / 'log'), load_log(shared.folder)
    assert list(map(figures, by_one['runs'])) == list(map(figures, by_two['runs']))
    assert [run['seed'] for run in by_two['runs']] == list(range(5, 5 + WANTED))
    assert by_one['summary'] == by_two['summary']


def test_the_last_runs_may_be_those_of_another_process(tmp_path, folder, quick, capsys):
    """The other process is this one, and holds the lock of run 1."""
    args = [*RUN, '--data', folder, '--out', tmp_path / 'log', *TINY]
    assert call(*args) == 0
    with runs.FileLock(tmp_path / 'log' / 'locks' / '00001.lock'):
        assert call(*args, '--runs', 3) == 0
    out = capsys.readouterr().out
    assert 'other processes are making the last runs; ' in out
    assert f'if runs are still missing then, delete {tmp_path / "log" / "locks"}\n' in out
    assert quick == [0, 2]
    assert call(*args, '--runs', 3) == 0
    assert quick == [0, 2, 1] and load_log(tmp_path / 'log')['summary']['n'] == 3


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
            runs.open_log(folder, config)

        assert in_threads(4, open_log) == []
        assert runs.read_json(folder / 'config.json') == config


def test_damaged_records_can_be_found_at_the_same_moment(tmp_path):
    (tmp_path / 'runs').mkdir()

    def read_records():
        assert runs.read_records(tmp_path, seed=0) == {}

    for _ in range(10):
        for run in range(20):
            runs.run_file(tmp_path, run).write_text('{')
        assert in_threads(4, read_records) == []
        assert records(tmp_path) == {}


def test_no_run_is_made_twice_at_the_same_moment(tmp_path):
    made = []

    def make_run(run):
        made.append(run)
        runs.write_json(runs.run_file(tmp_path, run), {})

    def make_runs():
        runs.make_runs(tmp_path, 100, make_run)

    runs.open_log(tmp_path, {})
    assert in_threads(4, make_runs) == []
    assert sorted(made) == list(range(100))
    assert in_threads(4, make_runs) == []
    assert len(made) == 100


#### Going on ######################################################################################


def test_finished_runs_stay_and_more_can_be_added(shared, tmp_path, quick, capsys):
    log, args = shared.copy(tmp_path / 'log')
    before = records(log)
    assert call('run', '--runs', WANTED, *args) == 0
    out = capsys.readouterr().out
    assert f'0 of {WANTED} runs left' in out and '|' not in out
    assert f'runs finished: {WANTED}, failed: 0' in out
    assert quick == [] and records(log) == before
    assert call('run', '--runs', WANTED + 2, *args) == 0
    assert f'2 of {WANTED + 2} runs left' in capsys.readouterr().out
    assert quick == [5 + WANTED, 6 + WANTED] and before.items() <= records(log).items()
    assert load_log(log)['summary']['n'] == WANTED + 2


def test_a_killed_process_loses_only_its_current_run(tmp_path, folder, capsys):
    args = [RECIPE, '--data', folder, '--out', tmp_path / 'log', *TINY]
    with running('--runs', 100000, *args, cwd=tmp_path) as process:
        wait_for_records(tmp_path / 'log', 2)
        process.kill()
        out = process.communicate()[0]
    before = records(tmp_path / 'log')
    assert '|' in out and not (tmp_path / 'log' / 'log.json').exists()
    wanted = len(before) + 2
    assert call('run', '--runs', wanted, *args) == 0
    out = capsys.readouterr().out
    assert f'2 of {wanted} runs left' in out
    assert finished(out) == [wanted - 2, wanted - 1]
    assert before.items() <= records(tmp_path / 'log').items()
    assert load_log(tmp_path / 'log')['summary']['n'] == wanted
    assert [run['seed'] for run in load_log(tmp_path / 'log')['runs']] == list(range(wanted))


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(airbench94, 'train', train_quickly([], {2: KeyboardInterrupt}))
    args = ['--data', folder, '--runs', 10**9, '--out', tmp_path / 'log', *TINY]  # starts at once
    assert report_errors('lab', call, *RUN, *args) == 130
    out, err = capsys.readouterr()
    assert err == 'lab: interrupted\n'
    assert '1000000000 of 1000000000 runs left' in out
    assert f'to go on, run the same command with --out {tmp_path / "log"}\n' in out
    assert 'runs finished: 2, failed: 0' in out
    assert load_log(tmp_path / 'log')['summary']['n'] == len(records(tmp_path / 'log')) == 2


#### What cannot be printed, read or written #######################################################


def test_a_closed_pipe_loses_no_run(tmp_path, folder):
    """The reader goes after the last epoch's row, like `head`. There is no stderr either."""
    args = [RECIPE, '--data', folder, '--runs', 3, '--save', '--out', 'log', *TINY]
    command = ' '.join(f"'{arg}'" for arg in [sys.executable, '-m', 'lab', 'run', *args])
    line = f'set -o pipefail; {command} 2>&- | head -n 5'
    env = ONE_THREAD | {'PYTHONPATH': str(ROOT)}
    options = {'cwd': tmp_path, 'env': env, 'capture_output': True, 'text': True}
    done = subprocess.run(['bash', '-c', line], timeout=200, **options)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines()[-1].split()[:4] == ['|', '0', '|', '1']
    names = {path.name for path in (tmp_path / 'log' / 'runs').iterdir()}
    assert names == {f'0000{run}.{kind}' for run in range(3) for kind in ('json', 'pt')}
    assert load_log(tmp_path / 'log')['summary']['n'] == 3


class Closing(io.StringIO):
    """A stdout that raises an error as soon as it would print a line with `text`."""

    def __init__(self, text, error):
        super().__init__()
        self.text = text
        self.error = error
        self.failed = False

    def write(self, line):
        self.failed = self.failed or self.text in line
        if self.failed:
            raise self.error
        return super().write(line)


GONE = BrokenPipeError(32, 'Broken pipe')
FULL = OSError(28, 'No space left on device')
CANNOT_PRINT = 'lab: nothing can be printed any more: [Errno 28] No space left on device\n'


@pytest.mark.parametrize('text', ['runs left', ' 1 |', 'eval', 'runs finished'])
@pytest.mark.parametrize(('error', 'code', 'err'), [(GONE, 0, ''), (FULL, 2, CANNOT_PRINT)])
def test_a_failed_print_stops_no_run(
    text, error, code, err, tmp_path, folder, quick, monkeypatch, capsys
):
    """Before the first epoch's row, with it, with a result, or with the summary."""
    args = [*RUN, '--data', folder, '--runs', 3, '--save', '--out', tmp_path / 'log', *TINY]
    stdout = Closing(text, error)
    monkeypatch.setattr(sys, 'stdout', stdout)
    assert report_errors('lab', call, *args) == code
    assert sys.stdout is stdout and capsys.readouterr().err == err
    assert quick == [0, 1, 2] and load_log(tmp_path / 'log')['summary']['n'] == 3
    assert all((tmp_path / 'log' / 'runs' / f'0000{run}.pt').exists() for run in range(3))


def test_a_failed_print_ends_no_other_process_of_torchrun(
    tmp_path, folder, quick, monkeypatch, capsys
):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(sys, 'stdout', Closing('eval', FULL))
    args = [*RUN, '--data', folder, '--out', tmp_path / 'log', *TINY]
    assert report_errors('lab', call, *args) == 0
    assert capsys.readouterr().err == CANNOT_PRINT


def test_a_record_that_is_not_whole_is_named_and_made_again(shared, tmp_path, capsys):
    log, args = shared.copy(tmp_path / 'log')
    before = records(log)
    record = json.loads(before['00003.json'])
    not_whole = 'is not the whole record of a run'
    changed = 'is damaged, or was edited: it has another checksum'
    damaged = {  # and what is said about it
        '00000.json': ('', 'is not JSON'),
        '00001.json': ('{"seed": 6, "seconds": 1, "tta_val_acc": NaN}', not_whole),
        '00002.json': (before['00002.json'][:300], 'is not JSON'),
        '00003.json': (json.dumps(record | {'seed': 99}), changed),
        '00004.json': ('{"seed": 9, "seconds": 1, "tta_val_acc": "x"}', not_whole),
        '00005 copy.json': (before['00005.json'], 'has the seed of another run, 10'),
        'notes.json': ('[1, 2]', 'holds no dict'),
    }
    for name, (content, _) in damaged.items():
        (log / 'runs' / name).write_text(content)
    assert call('run', '--runs', WANTED, *args) == 0
    out = capsys.readouterr().out
    said, _, rest = out.partition(f'5 of {WANTED} runs left')
    assert all(f'runs/{name}: {why}; now ' in said for name, (_, why) in damaged.items())
    assert finished(rest) == [0, 1, 2, 3, 4]
    for name, text in records(log).items():
        assert figures(json.loads(text)) == figures(json.loads(before[name]))
    for name, (content, _) in damaged.items():  # nothing is thrown away
        kept = log / 'runs' / name.replace('.json', '.damaged')
        assert kept.read_text() == content
    assert load_log(log)['summary'] == load_log(shared.folder)['summary']


@pytest.mark.parametrize(
    ('damage', 'complaint'),
    [
        (('"seed": 5', '"seed": 4'), 'is damaged, or was edited: it has another checksum'),
        (('{', ''), 'is not JSON'),
        (('{', '['), 'is not JSON'),
    ],
)
def test_a_damaged_config_is_refused(damage, complaint, shared, tmp_path, quick):
    log, args = shared.copy(tmp_path / 'log')
    content = (log / 'config.json').read_text().replace(*damage, 1)
    (log / 'config.json').write_text(content)
    line = refuse('run', *args)
    assert line == f'{log / "config.json"}: {complaint}; choose another folder'
    assert (log / 'config.json').read_text() == content and quick == []


@pytest.mark.parametrize('name', ['00001.json', '00001.pt', 'log.json'])
def test_a_full_disk_takes_no_result(name, tmp_path, folder, quick, monkeypatch, capsys):
    replace = os.replace

    def replace_others(source, target):
        if Path(target).name == name:
            raise OSError(28, 'No space left on device')
        replace(source, target)

    args = [*RUN, '--data', folder, '--runs', 3, '--save', '--out', tmp_path / 'log', *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', replace_others)
        assert report_errors('lab', call, *args) == 2
    out, err = capsys.readouterr()
    assert err.startswith('lab: ') and err.count('\n') == 1
    assert f'{name} cannot be written: [Errno 28] No space left on device' in err
    if name == 'log.json':
        assert finished(out) == [0, 1, 2] and 'runs finished: 3, failed: 0' in out
    else:
        assert finished(out) == [0, 1]  # the result is printed, though it cannot be written
        assert 'runs finished: 1, failed: 0' in out
        assert f'--out {tmp_path / "log"}' in out
        assert load_log(tmp_path / 'log')['summary']['n'] == 1
    assert not list(tmp_path.rglob('*.tmp'))
    assert call(*args) == 0
    assert load_log(tmp_path / 'log')['summary']['n'] == 3


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    folder = tmp_path / 'taken'
    folder.mkdir()
    with pytest.raises(UserError, match=f'^{folder} cannot be written: '):
        runs.write_json(folder, {})
    with pytest.raises(UserError, match='cannot be written as JSON: '):
        runs.write_json(tmp_path / 'new', {'loss': float('nan')})
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_in_the_middle_keeps_the_finished_runs(tmp_path, folder, monkeypatch, capsys):
    monkeypatch.setattr(airbench94, 'train', train_quickly([], {2: ZeroDivisionError}))
    with pytest.raises(ZeroDivisionError):
        call(*RUN, '--data', folder, '--runs', 5, '--out', tmp_path / 'log', *TINY)
    assert 'runs finished: 2, failed: 0' in capsys.readouterr().out
    assert load_log(tmp_path / 'log')['summary']['n'] == 2


CONFIG = {'script': 'a.py', 'hyp': {'opt': {'lr': 11.5}}, 'seed': 5, 'data': {'path': 'cifar10'}}
RECORD = {'seed': 7, 'tta_val_acc': 0.94, 'seconds': 2.5, 'epochs': [{'epoch': 1, 'val_acc': 0.9}]}


@st.composite
def damaged(draw, content):
    """Bytes that were cut off somewhere, or of which one has changed."""
    place = draw(st.integers(0, len(content) - 1))
    if draw(st.booleans()):
        return content[:place]
    byte = bytes([content[place] ^ draw(st.integers(1, 255))])
    return content[:place] + byte + content[place + 1 :]


@pytest.fixture(scope='module')
def small_log(tmp_path_factory):
    folder = tmp_path_factory.mktemp('small')
    runs.open_log(folder, CONFIG)
    runs.write_json(runs.run_file(folder, 2), RECORD)
    return folder


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_record_is_made_again_or_right(data, small_log):
    file = runs.run_file(small_log, 2)
    content = file.read_bytes()
    changed = data.draw(damaged(content))
    try:
        file.write_bytes(changed)
        found = runs.read_records(small_log, seed=5)
        if found == {}:
            assert file.with_suffix('.damaged').read_bytes() == changed
        else:  # a checksum whose own name is damaged stays as it is
            assert found[2] | RECORD == found[2]
    finally:
        file.write_bytes(content)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_config_is_refused_or_right(data, small_log):
    file = small_log / 'config.json'
    content = file.read_bytes()
    try:
        file.write_bytes(data.draw(damaged(content)))
        try:
            runs.open_log(small_log, CONFIG)
        except UserError as error:
            assert str(error).startswith((f'{file}: ', f'--out {small_log}: '))
            assert '\n' not in str(error)
        else:
            assert runs.read_json(file) == CONFIG
    finally:
        file.write_bytes(content)


#### Locks #########################################################################################


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP, 524])
@pytest.mark.parametrize('name', ['config.lock', '00000.lock', 'call.lock'])
def test_a_file_system_without_locks_is_named(number, name, tmp_path, folder, quick, monkeypatch):
    flock = fcntl.flock

    def flock_others(file, operation):
        if os.readlink(f'/proc/self/fd/{file}').endswith(f'/{name}'):
            raise OSError(number, os.strerror(number))
        flock(file, operation)

    monkeypatch.setattr(fcntl, 'flock', flock_others)
    monkeypatch.chdir(tmp_path)
    command = ['run', *SWAP] if name == 'call.lock' else [*RUN, '--out', 'log', *TINY]
    line = refuse(*command, '--data', folder)
    assert f'{name}: cannot be locked: [Errno {number}] ' in line
    assert line.endswith('; choose a folder where you may write, on a file system that has locks')
    assert quick == []


def test_a_lock_that_another_machine_has_left_is_named(tmp_path, folder, quick, monkeypatch):
    """The other machine is this process."""
    monkeypatch.setattr(runs, 'PATIENCE', 0.1)
    args = [*RUN, '--data', folder, '--out', tmp_path / 'log', *TINY]
    lock = tmp_path / 'log' / 'config.lock'
    lock.parent.mkdir()
    with runs.locked(lock):
        line = refuse(*args)
    assert line.endswith(f'another command is at work there; if there is none, delete {lock}')
    assert quick == []


#### Another command ###############################################################################


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
def test_other_settings_are_refused(change, values, shared, quick):
    before = records(shared.folder), (shared.folder / 'log.json').read_bytes()
    line = refuse('run', *shared.args, *change)
    assert line == f'--out {shared.folder}: {values}; choose another folder'
    assert before == (records(shared.folder), (shared.folder / 'log.json').read_bytes())
    assert quick == []


def test_other_data_is_refused(shared, tmp_path):
    other = save_set(tmp_path / 'set', random_set(200, seed=3), random_set(60, seed=4))
    there = json.loads((shared.folder / 'config.json').read_text())['data']['sha256']
    line = refuse('run', *shared.args, '--data', other)
    assert line.startswith(f'--out {shared.folder}: data.sha256 is {there} there, and ')


def test_the_same_data_may_have_another_path(shared, tmp_path, folder, quick, monkeypatch):
    _, args = shared.copy(tmp_path / 'log')
    shutil.copytree(folder, tmp_path / 'copy')
    monkeypatch.chdir(folder.parent)
    for path in (f'{folder}/', folder.name, f'./{folder.name}', tmp_path / 'copy'):
        assert call('run', '--runs', WANTED, *args, '--data', path) == 0
    assert quick == []


def test_an_edited_recipe_is_refused(shared, tmp_path, quick):
    source = RECIPE.read_text()
    edited = tmp_path / 'airbench94.py'
    edited.write_text(source.replace('torch.manual_seed(seed)', 'torch.manual_seed(1 + seed)'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'airbench94', airbench94)  # restored afterwards
        line = refuse('run', edited, *shared.args[1:])
    number = 1 + source[: source.index('torch.manual_seed(seed)')].count('\n')
    assert line.startswith(f'--out {shared.folder}: line {number} of source is "torch.manual_seed(')
    assert ' there, and "torch.manual_seed(1 + seed) ' in line and quick == []


def test_a_folder_of_something_else_is_refused(tmp_path, folder, quick):
    (tmp_path / 'thesis.tex').touch()
    line = refuse(*RUN, '--data', folder, '--out', tmp_path, *TINY)
    assert line.startswith(f'--out {tmp_path}: holds thesis.tex, and no log')
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex'] and quick == []


def test_a_log_that_was_killed_at_its_start_is_started_again(tmp_path, folder, quick):
    (tmp_path / 'config.lock').touch()
    (tmp_path / 'config.json.host.1.tmp').write_text('{"scr')
    assert call(*RUN, '--data', folder, '--out', tmp_path, *TINY) == 0
    assert load_log(tmp_path)['summary']['n'] == 1


#### Runs that all ranks make together #############################################################

SWAP = [
    ROOT / 'swap94.py', '--device', 'cpu', '--out', 'log', '--runs', 2, '--save',
    'net.widths.block1=8', 'net.widths.block2=8', 'net.widths.block3=8',
    'phase1.batch_size=32', 'phase1.shards=2', 'phase1.train_epochs=1',
    'phase2.workers=2', 'phase2.batch_size=32', 'phase2.train_epochs=1',
    'statistics.batch_size=32',
]  # fmt: skip


def test_all_ranks_make_each_run_together(tmp_path, folder, capsys, monkeypatch):
    with running(*SWAP, '--data', folder, cwd=tmp_path, launcher=TORCHRUN) as process:
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert finished(out) == [0, 1] and 'runs finished: 2, failed: 0' in out
    assert out.count('2 of 2 runs left') == 1
    assert 'phase 2, each worker     4 ' in out
    together = load_log(tmp_path / 'log')
    assert [run['ranks'] for run in together['runs']] == [2, 2]
    phases = together['runs'][0]['phases']
    assert list(phases) == ['phase1', 'phase2', 'phase3']
    assert phases['phase1']['all_reduces'] > 0 and phases['phase1']['seconds'] > 0
    names = {path.name for path in (tmp_path / 'log' / 'runs').iterdir()}
    assert names == {'00000.json', '00000.pt', '00001.json', '00001.pt'}
    assert list((tmp_path / 'log' / 'checkpoints').iterdir()) == []

    monkeypatch.chdir(tmp_path)  # a single process makes the same runs, and nothing twice
    (tmp_path / 'log' / 'checkpoints' / '00001').mkdir()  # left by a command that was killed
    (tmp_path / 'log' / 'checkpoints' / '00001' / 'phase1.pt').touch()
    assert call('run', *SWAP, '--data', folder) == 0
    assert '0 of 2 runs left' in capsys.readouterr().out
    assert list((tmp_path / 'log' / 'checkpoints').iterdir()) == []
    assert call('run', *SWAP, '--data', folder, '--out', 'alone') == 0
    alone = load_log(tmp_path / 'alone')
    accuracies = [[run['tta_val_acc'] for run in log['runs']] for log in (together, alone)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=2 / 60)  # to rounding
    assert call('run', SWAP[0], '--load', 'log/runs/00001.pt', '--data', folder) == 0
    with runs.FileLock(tmp_path / 'log' / 'call.lock'):
        line = refuse('run', *SWAP, '--data', folder)
    assert line.startswith('--out log: another command is at work there; if there is none, ')


def test_ranks_that_disagree_get_one_line(folder, monkeypatch):
    def gather(value):
        """As on rank 0, if rank 1 has another seed."""
        return [value, value | {'seed': 1}] if isinstance(value, dict) else [value, value]

    def is_first_process():
        return False

    monkeypatch.setattr(runs, 'gather', gather)
    line = refuse('run', *SWAP, '--data', folder)
    assert line == 'the ranks must agree: seed is 1 on rank 1, and 0 on rank 0'
    monkeypatch.setattr(runs, 'is_first_process', is_first_process)
    with pytest.raises(SystemExit, match='2'):  # without a line
        call('run', *SWAP, '--data', folder)


@pytest.mark.parametrize(
    ('variables', 'line'),
    [
        ('WORLD_SIZE=2 RANK=0', 'WORLD_SIZE is set, but not MASTER_ADDR, MASTER_PORT; start the '),
        ('WORLD_SIZE=2 RANK= MASTER_ADDR=h MASTER_PORT=1', 'WORLD_SIZE is set, but not RANK; '),
        ('WORLD_SIZE=2 RANK=2 MASTER_ADDR=h MASTER_PORT=1', 'RANK=2 in the environment: must be b'),
        (
            'WORLD_SIZE=2 RANK=one MASTER_ADDR=h MASTER_PORT=1',
            'RANK=one in the environment: must be a number',
        ),
        ('WORLD_SIZE=two', 'WORLD_SIZE=two in the environment: must be a number'),
        ('WORLD_SIZE=-1', 'WORLD_SIZE=-1 in the environment: must be a number'),
        ('WORLD_SIZE=2 RANK=0 MASTER_ADDR=h MASTER_PORT=x', 'MASTER_PORT=x in the environment: '),
        ('WORLD_SIZE=2 RANK=0 MASTER_ADDR=h MASTER_PORT=99999', 'port must have value from 0 to '),
    ],
)
def test_incomplete_variables_of_a_launcher_get_one_line(variables, line, folder, monkeypatch):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split('='))
    assert refuse('run', *SWAP, '--data', folder).startswith(line)


def test_empty_variables_of_a_launcher_mean_one_process(
    tmp_path, folder, quick, monkeypatch, capsys
):
    for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')
    assert call(*RUN, '--data', folder, '--out', tmp_path / 'empty', *TINY) == 0
    monkeypatch.setenv('RANK', '1')  # a launcher's rest: still the only process, which prints
    assert call(*RUN, '--data', folder, '--out', tmp_path / 'rest', *TINY) == 0
    assert finished(capsys.readouterr().out) == [0, 0]


@pytest.mark.parametrize(('rank', 'whom'), [(0, 'the 1 others'), (1, 'rank 0, and then for all ')])
def test_a_rank_that_waits_says_for_whom_and_where(rank, whom, tmp_path, folder):
    port = str(free_port())
    place = {'RANK': str(rank), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    with running(*SWAP, '--data', folder, cwd=tmp_path, WORLD_SIZE='2', **place) as process:
        line = process.stdout.readline()
    assert line.startswith(f'rank {rank} of 2 waits for {whom}')
    assert line.endswith(f' at 127.0.0.1:{port}\n')
