"""Many runs over torchrun's processes, ends of all kinds, and going on after them. Two gloo processes on the CPU."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import airbench94
from airbench94 import UserError, agree, join_ranks
from conftest import ONE_THREAD, ROOT, TINY, figures, load_log, run_script

HERE = ['--standalone', '--nproc_per_node=2']


@contextlib.contextmanager
def torchrun(*args, cwd, options=HERE):
    """The script under torchrun, which, if it is still there at the end, ends its processes and itself."""
    with subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', *options, ROOT / 'airbench94.py', *map(str, args)],
                          cwd=cwd, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def run_two(*args, cwd, options=HERE):
    """(exit code, output, errors) of the script in two processes."""
    with torchrun(*args, cwd=cwd, options=options) as process:
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err


def records(folder):
    return {path.name: path.read_text() for path in folder.glob('runs/*.json')}


def wait_for_records(folder, n):
    deadline = time.monotonic() + 120
    while len(records(folder)) < n and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(records(folder)) >= n


def kill_rank(rank, *torchruns):
    """Kill the process that one of the torchruns has made for a rank."""
    children = [Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text() for process in torchruns]
    (pid,) = [pid for pid in ' '.join(children).split()
              if f'RANK={rank}' in Path(f'/proc/{pid}/environ').read_text().split('\0')]
    os.kill(int(pid), signal.SIGKILL)


def finished(out):
    """The numbers of the runs whose ends were printed."""
    return [int(line.split()[1]) for line in out.splitlines() if line.startswith('|') and ' eval ' in line]


@pytest.fixture(scope='module')
def three_runs(tmp_path_factory, folder):
    """The log of three runs by two ranks, in a folder that did not exist, and what was printed."""
    path = tmp_path_factory.mktemp('two') / 'new' / 'log'
    code, out, err = run_two('--data', folder, '--seed', 5, '--runs', 3, '--resume', path, *TINY, cwd=path.parent.parent)
    assert code == 0, err
    return path, out


def test_one_process_and_two_make_the_same_runs(three_runs, tmp_path, folder):
    path, _ = three_runs
    done = run_script('--data', folder, '--seed', 5, '--runs', 3, '--resume', tmp_path / 'one', *TINY,
                      cwd=tmp_path, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    alone, both = load_log(tmp_path / 'one'), load_log(path)
    assert [*map(figures, alone['runs'])] == [*map(figures, both['runs'])] and [run['seed'] for run in both['runs']] == [5, 6, 7]
    assert (alone['ranks'], both['ranks']) == (1, 2)
    assert alone['summary'] == both['summary']


def test_ranks_print_whole_lines(three_runs):
    path, out = three_runs
    lines = out.splitlines()
    assert 'rank 0 of 2 prepares data and log; the others wait' in lines
    assert f'3 of 3 runs to make; log in {path}' in lines
    rows = [line for line in lines if line.startswith('|')]
    assert len({len(row) for row in rows}) == 1 and all(row.endswith('|') for row in rows)
    assert sorted(row.split()[1] for row in rows if ' eval ' in row) == ['0', '1', '2']
    assert sum('runs finished: 3, failed: 0' in line for line in lines) == 1


def test_a_killed_rank_ends_all_and_a_resumed_call_makes_only_what_is_missing(tmp_path, folder):
    path = tmp_path / 'log'
    with torchrun('--data', folder, '--runs', 100000, '--resume', path, *TINY, cwd=tmp_path) as process:
        wait_for_records(path, 3)
        kill_rank(1, process)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    before = records(path)
    assert 'interrupted; the finished runs are kept' in out     # rank 0's end is an orderly one
    assert load_log(path)['summary']['n'] >= 3

    wanted = max(int(name.removesuffix('.json')) for name in before) + 3    # two more, and what a rank was ahead
    code, out, err = run_two('--data', folder, '--runs', wanted, '--resume', path, *TINY, cwd=tmp_path)
    assert code == 0, err
    assert f'{wanted - len(before)} of {wanted} runs to make' in out
    assert sorted(finished(out)) == [run for run in range(wanted) if f'{run:05}.json' not in before]
    assert before.items() <= records(path).items()
    log = load_log(path)
    assert log['summary']['n'] == log['wanted'] == wanted and len(log['resumed']) == 1
    assert [run['seed'] for run in log['runs']] == list(range(wanted))


def check_restarted(path, out):
    """After one restart the log is whole, and no run was made twice; a killed rank may have had a row to print."""
    assert load_log(path)['summary']['n'] == 30 and len(load_log(path)['resumed']) == 1
    assert len(set(finished(out))) == len(finished(out)) >= 29


def test_torchrun_restarts_what_it_lost(tmp_path, folder):
    (tmp_path / 'log').mkdir()
    with torchrun('--data', folder, '--runs', 30, '--resume', tmp_path / 'log', *TINY, cwd=tmp_path,
                  options=[*HERE, '--max-restarts=1']) as process:
        wait_for_records(tmp_path / 'log', 2)
        kill_rank(0, process)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    check_restarted(tmp_path / 'log', out)


def test_two_nodes_make_the_runs_together_and_lose_a_rank(tmp_path, folder):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    options = ['--nnodes=2', '--nproc_per_node=1', '--rdzv-backend=c10d', f'--rdzv-endpoint=localhost:{port}',
               '--rdzv-id=nodes', '--max-restarts=1']
    call = ['--data', folder, '--runs', 30, '--resume', tmp_path / 'log', *TINY]
    with torchrun(*call, cwd=tmp_path, options=options) as a, torchrun(*call, cwd=tmp_path, options=options) as b:
        wait_for_records(tmp_path / 'log', 4)
        kill_rank(1, a, b)
        ends = [node.communicate(timeout=200) for node in (a, b)]
    assert [a.returncode, b.returncode] == [0, 0], ends
    check_restarted(tmp_path / 'log', ''.join(out for out, _ in ends))


def test_failed_runs_start_no_restart(tmp_path, folder):
    code, out, err = run_two('--data', folder, '--runs', 2, *TINY, 'opt.lr=1e9', 'opt.bias_scaler=1e9', cwd=tmp_path,
                             options=[*HERE, '--max-restarts=1'])
    assert code == 0, err
    (log,) = tmp_path.glob('logs/*')
    assert load_log(log)['summary']['failed'] == 2 and out.count('failed at step') == 2


def test_ctrl_c_keeps_the_finished_runs_of_all_ranks(tmp_path, folder):
    with torchrun('--data', folder, '--runs', 100000, '--resume', tmp_path / 'log', *TINY, cwd=tmp_path) as process:
        wait_for_records(tmp_path / 'log', 4)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and 'interrupted; the finished runs are kept' in out
    assert load_log(tmp_path / 'log')['summary']['n'] == len(load_log(tmp_path / 'log')['runs']) >= 4
    assert 'airbench94.py", line' not in err    # no traceback of a rank's


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_disturb_the_end(number, tmp_path, folder, monkeypatch, capsys):
    closed, close_log = [], airbench94.close_log

    def train(*args, **functions):
        os.kill(os.getpid(), number)
        time.sleep(60)      # a signal ends it

    def disturbed_close(*args):
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        closed.append(close_log(*args))
    monkeypatch.setattr(airbench94, 'train', train)
    monkeypatch.setattr(airbench94, 'close_log', disturbed_close)
    assert airbench94.main(['--data', str(folder), '--resume', str(tmp_path / 'log'), *TINY]) == 1
    assert closed and 'interrupted; the finished runs are kept' in capsys.readouterr().out
    assert load_log(tmp_path / 'log')['summary']['n'] == 0


def own_lines(err):
    return [line for line in err.splitlines() if line.startswith('airbench94.py: ')]


@pytest.mark.parametrize('change, complaint', [
    (['opt.lr=3'], 'the log there has another hyp.opt.lr'),
    (['--seed', '6'], 'the log there has another seed'),
    (['--compile'], 'the log there has another mode'),
    (['--data', 'digits', 'opt.batch_size=32', 'opt.train_epochs=1', 'aug.flip=True', 'net.tta_level=2'],
     'the log there has another data.path, data.train'),
])
def test_another_call_is_refused(change, complaint, three_runs, capsys, folder):
    path, _ = three_runs
    before = (path / 'log.json').read_bytes(), records(path)
    with pytest.raises(UserError, match=complaint) as error:
        airbench94.main(['--data', str(folder), '--seed', '5', '--runs', '3', '--resume', str(path), *TINY, *change])
    assert '\n' not in str(error.value) and str(path) in str(error.value) and capsys.readouterr().out == ''
    assert before == ((path / 'log.json').read_bytes(), records(path))


def test_another_script_is_refused(three_runs, tmp_path, folder):
    (tmp_path / 'airbench94.py').write_text((ROOT / 'airbench94.py').read_text() + '# changed\n')
    done = run_script('--data', folder, '--seed', 5, '--resume', three_runs[0], *TINY, cwd=tmp_path,
                      script=tmp_path / 'airbench94.py', env=ONE_THREAD)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == f'airbench94.py: --resume {three_runs[0]}: the log there has another source\n'


def test_nothing_is_missing_and_more_can_be_wanted(three_runs, tmp_path, capsys, folder):
    path = shutil.copytree(three_runs[0], tmp_path / 'log')
    before = records(path)
    call = ['--data', str(folder), '--seed', '5', '--resume', str(path), *TINY]
    assert airbench94.main(call) == 0      # without --runs it keeps the log's number
    assert '0 of 3 runs to make' in capsys.readouterr().out and records(path) == before
    assert airbench94.main(call + ['--runs', '4']) == 0
    assert '1 of 4 runs to make' in capsys.readouterr().out and before.items() <= records(path).items()
    assert load_log(path)['summary']['n'] == 4


@pytest.mark.parametrize('content', ['', '{', '[]', '[1, 2]', '{"a": 1}'])
def test_what_is_no_log_is_refused(content, tmp_path, folder):
    (tmp_path / 'log.json').write_text(content)
    with pytest.raises(UserError, match=f'--resume {tmp_path}: (its log.json is damaged|the log there has another)'):
        airbench94.main(['--data', str(folder), '--resume', str(tmp_path), *TINY])
    with pytest.raises(UserError, match='neither a log nor an empty folder'):
        airbench94.main(['--data', str(folder), '--resume', str(tmp_path / 'log.json'), *TINY])
    assert [path.name for path in tmp_path.iterdir()] == ['log.json']
    assert (tmp_path / 'log.json').read_text() == content


def test_a_log_that_was_cut_off_at_its_start_is_started_anew(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(airbench94, 'train', lambda *args, **functions: (None, {'seed': 0, 'tta_val_acc': 0.9, 'seconds': 1.0}))
    (tmp_path / 'log.tmp').write_text('{"scr')
    assert airbench94.main(['--data', str(folder), '--resume', str(tmp_path), *TINY]) == 0
    assert load_log(tmp_path)['summary']['n'] == 1 and len(records(tmp_path)) == 1


def test_mistakes_of_two_ranks_get_one_line(three_runs, tmp_path, folder):
    for args, complaint in ((['--runs', 0], '--runs must be at least 1'),
                            (['--data', folder, '--resume', three_runs[0], *TINY, 'opt.lr=3'], 'hyp.opt.lr')):
        start = time.monotonic()
        code, out, err = run_two(*args, cwd=tmp_path)
        assert code != 0 and time.monotonic() - start < 120
        (line,) = own_lines(err)
        assert complaint in line


def test_one_rank_looks_for_the_data(tmp_path):
    code, out, err = run_two('--runs', 2, *TINY, cwd=tmp_path)
    assert code == 0, err
    assert out.count('Fetching CIFAR-10 from') == out.count('THIS IS NOT CIFAR-10') == 1
    (log,) = tmp_path.glob('logs/*')
    assert load_log(log)['data']['path'] == 'digits' and load_log(log)['summary']['n'] == 2


def test_an_error_of_one_rank_alone_is_named(monkeypatch):
    def all_gather_object(values, value):
        values[:] = [value, (None, 'there is no such device here')]
    assert agree(0, 1, divmod, 7, 2) == [(3, 1)]
    monkeypatch.setattr(torch.distributed, 'all_gather_object', all_gather_object)
    with pytest.raises(UserError, match='^rank 1: there is no such device here$'):
        agree(0, 2, divmod, 7, 2)


def test_ranks_meet_under_a_new_prefix_and_wait_for_days(monkeypatch):
    calls, store, main_thread = {}, torch.distributed.HashStore(), threading.current_thread()
    store.set('name 1', 'of the process before')     # what a restart leaves behind

    def this_rank():
        return 1 if threading.current_thread() is main_thread else 0
    monkeypatch.setattr(torch.distributed, 'is_torchelastic_launched', lambda: True)
    monkeypatch.setattr(torch.distributed, 'rendezvous', lambda url, timeout: iter([(store, this_rank(), 2)]))
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *_, **call: calls.update({this_rank(): call}))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(join_ranks)
        time.sleep(0.5)
        assert not calls    # rank 0 waits for a rank 1 that is alive
        assert join_ranks() == (1, 2) and first.result() == (0, 2)
    assert all(timedelta(days=1) < call['timeout'] < timedelta(days=24) for call in calls.values())     # 32 bits of ms
    calls[0]['store'].set('key', 'value')
    assert calls[1]['store'].get('key') == b'value' and not store.check(['key'])


def test_without_torchrun_there_is_no_process_group():
    assert join_ranks() == (0, 1) and not torch.distributed.is_initialized()


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch):
    asked, current = [], []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: current.append(str(device)))
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device: asked.append(device) or torch.ones(shape))
    for rank in (None, '0', '5'):
        monkeypatch.delenv('LOCAL_RANK', raising=False)
        if rank:
            monkeypatch.setenv('LOCAL_RANK', rank)
        assert airbench94.pick_device()[0] == torch.device('cuda', int(rank or 0))
    assert asked == current == ['cuda:0', 'cuda:0', 'cuda:5'] and airbench94.pick_device('cuda:1')[0] == torch.device('cuda:1')
