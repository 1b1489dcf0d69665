"""swap94.py: workers and their average, by one, two and four processes, and after lost ranks."""

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import scipy
import torch
from conftest import ONE_THREAD, ROOT, SERVER, load_log, made_up_split, refuse, save_set
from torch._dynamo.utils import counters
from torch.testing import assert_close

import airbench94
import swap94
from swap94 import Team, UserError, check_settings, override, recompute_statistics, worker_seed

record94 = import_module('records.94')
TINY_NET = [
    'net.widths.block1=4', 'net.widths.block2=8', 'net.widths.block3=16', 'net.whiten_kernel=1',
]  # fmt: skip
SMALL = [
    *TINY_NET, 'net.tta_level=1', 'phase1.batch_size=32', 'phase1.shards=4',
    'phase1.train_epochs=2', 'phase1.tau=1', 'phase1.growth.size=16', 'phase1.growth.until=0.45',
    'phase1.selection.from=0.4', 'phase1.selection.keep=0.75', 'phase2.workers=4',
    'phase2.batch_size=16', 'phase2.train_epochs=1.5', 'phase2.selection.from=0',
    'phase2.selection.keep=0.75', 'phase2.average.every=2', 'phase2.average.decay=0.5',
    'statistics.images=75', 'statistics.batch_size=20',  # three batches
]  # fmt: skip
LONG = [*SMALL, 'phase1.train_epochs=8', 'phase2.train_epochs=3']  # to be killed in
TEAMS = ['phase2.workers=2', 'phase2.ranks_per_worker=2', 'phase2.shards=2']
PHASE_1 = ['--runs', '2', '--seed', '5', '--method', 'large-batch', *SMALL]
CALLS = {  # name: (dtype, arguments of main), for one, two and four processes
    'workers': ('float64', SMALL),
    'teams': ('float64', ['--curve', *SMALL, *TEAMS]),
    'phase 1': ('float64', [*PHASE_1, 'phase1.train_epochs=1.5']),
}


@contextlib.contextmanager
def torchrun(*command, cwd, options=('--nproc_per_node=2',)):
    """The command in each of torchrun's processes, all of which end with the context."""
    run = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--no-python', *options]
    environment = ONE_THREAD | {'PYTHONPATH': str(ROOT)}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    command = [*run, *map(str, command)]
    with subprocess.Popen(command, cwd=cwd, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


def finish(process, seconds=200):
    """(exit code, output, errors)"""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def script(*args):
    return [sys.executable, ROOT / 'swap94.py', '--device', 'cpu', *args]


def has_rank(pid, rank):
    environment = Path(f'/proc/{pid}/environ').read_text()
    return f'RANK={rank}' in environment.split('\0')


def kill_rank(rank, process):
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    (pid,) = [pid for pid in children if has_rank(pid, rank)]
    os.kill(int(pid), signal.SIGKILL)


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def weights_of(log, run=0):
    return torch.load(log / 'runs' / f'{run:05}.pt', weights_only=True)['weights']


def record_of(log, run=0):
    return json.loads((log / 'runs' / f'{run:05}.json').read_text())


def differing(ours, theirs):
    """Names of the tensors that are not the same to the bit."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def floats(weights):
    """Without BatchNorm's counts of batches, which mean nothing here."""
    return {name: value for name, value in weights.items() if value.is_floating_point()}


def parameters(net, weights=None):
    weights = weights or net.state_dict()
    return {name: weights[name] for name, _ in net.named_parameters()}


def calls_into(path, folder, calls):
    """The calls with a log for each in `path`."""
    found = []
    for name, (kind, args) in calls.items():
        found.append([kind, '--data', str(folder), '--save', '--out', str(path / name), *args])
    return found


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Half as many images as the other tests' folder has."""
    path = tmp_path_factory.mktemp('half')
    return save_set(path, made_up_split(100, seed=0), made_up_split(40, seed=1))


@pytest.fixture(scope='module')
def by_one(tmp_path_factory, folder):
    """A folder with a log for each of CALLS, made by this process."""
    path = tmp_path_factory.mktemp('one')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap94, 'pick_dtype', lambda name, device: torch.float64)
        for _, *args in calls_into(path, folder, CALLS):
            assert swap94.main(['--device', 'cpu', *args]) == 0
    return path


def run_rank(rank, ranks, port, calls, log):
    """What torchrun has one of its processes do, for several calls of main."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # A process joins the ranks once.
    everyone = swap94.join_ranks(torch.device('cpu'))
    swap94.join_ranks = lambda device: everyone
    swap94.dist.destroy_process_group = lambda: None
    with open(log, 'w') as file, redirect_stdout(file), redirect_stderr(file):
        for kind, *args in calls:
            swap94.pick_dtype = lambda name, device, kind=kind: getattr(torch, kind)
            if swap94.main(['--device', 'cpu', *args]) != 0:
                sys.exit(1)


def by_many(path, folder, ranks, calls):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    calls = calls_into(path, folder, calls)
    processes = []
    for rank in range(ranks):
        args = (rank, ranks, port, calls, path / f'{rank}.log')
        processes.append(SERVER.Process(target=run_rank, args=args, daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(200)
    logs = [(path / f'{rank}.log').read_text() for rank in range(ranks)]
    assert [process.exitcode for process in processes] == [0] * ranks, logs
    return path


@pytest.fixture(scope='module')
def by_two(tmp_path_factory, folder):
    """Like by_one, by two processes; 'long' is the run that others are killed in."""
    calls = CALLS | {'long': ('float32', LONG)}
    return by_many(tmp_path_factory.mktemp('two'), folder, 2, calls)


@pytest.fixture(scope='module')
def by_four(tmp_path_factory, folder):
    return by_many(tmp_path_factory.mktemp('four'), folder, 4, CALLS)


@pytest.fixture(params=['by_two', 'by_four'])
def by_ranks(request):
    return request.getfixturevalue(request.param)


def load(data, aug=airbench94.hyp['aug'], dtype=torch.float32):
    options = {'device': 'cpu', 'dtype': dtype}
    return [swap94.CifarLoader(data, train, 32, aug, **options) for train in (True, False)]


@pytest.fixture
def fit(folder, tmp_path):
    """fit(*settings, seed=0, **options) -> (net, record, the workers' last models), here."""

    def fit(*settings, seed=0, **options):
        path = tmp_path / f'fit {len(list(tmp_path.iterdir()))}'
        path.mkdir()
        hyp = override(swap94.hyp, [*SMALL, *settings])
        net, record = swap94.train(*load(folder), hyp, seed, checkpoints=path, **options)
        files = [path / f'w{n}.pt' for n in range(len(record['workers']))]
        return net, record, [torch.load(file, weights_only=True) for file in files]

    return fit


def mean_of(models, name):
    return torch.stack([model['weights'][name].double() for model in models]).mean(0)


def assert_mean(weights, net, models):
    for name, _ in net.named_parameters():
        assert_close(weights[name].double(), mean_of(models, name), rtol=1e-5, atol=1e-6)


#### Any number of ranks makes the same network ####


@pytest.mark.parametrize('name', CALLS)
def test_one_process_two_and_four_make_the_same_network(name, by_one, by_ranks):
    assert record_of(by_one / name)['joint']['step'] == (4 if name == 'phase 1' else 5)
    for run in range(len(load_log(by_one / name)['runs'])):
        ours = floats(weights_of(by_one / name, run))
        theirs = floats(weights_of(by_ranks / name, run))
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_eight_processes_make_the_network_of_one(tmp_path, folder, monkeypatch):
    """The defaults, narrowed: each rank has one of the eight shards, and then a worker."""
    small = ['phase1.batch_size=40', 'phase1.train_epochs=3', 'phase2.batch_size=10']
    small += ['phase2.train_epochs=1', 'statistics.images=80', 'statistics.batch_size=10']
    calls = {'defaults': ('float64', [*TINY_NET, *small])}
    (tmp_path / 'eight').mkdir()
    by_eight = by_many(tmp_path / 'eight', folder, 8, calls)
    monkeypatch.setattr(swap94, 'pick_dtype', lambda name, device: torch.float64)
    ((_, *args),) = calls_into(tmp_path, folder, calls)
    assert swap94.main(['--device', 'cpu', *args]) == 0
    ours, theirs = tmp_path / 'defaults', by_eight / 'defaults'
    assert_close(floats(weights_of(ours)), floats(weights_of(theirs)), rtol=1e-9, atol=1e-9)
    assert of_no_clock(record_of(ours)) == of_no_clock(record_of(theirs))
    assert (record_of(theirs)['ranks'], len(record_of(theirs)['workers'])) == (8, 8)


def of_no_clock(record):
    """What of a run's record depends on neither clock nor number of ranks."""
    rows = []
    for model in (record['joint'], *record['workers']):
        for row in model['epochs']:
            rows.append({**row, 'seconds': None, 'train_loss': round(row['train_loss'], 5)})
    phases = [phase | {'seconds': None} for phase in record['phases'].values()]
    same = [record[key] for key in ('seed', 'val_acc', 'tta_val_acc', 'pflop', 'curve')]
    return same, phases, rows


@pytest.mark.parametrize('name', CALLS)
def test_one_process_two_and_four_write_the_same_record(name, by_one, by_ranks):
    assert of_no_clock(record_of(by_one / name)) == of_no_clock(record_of(by_ranks / name))


def test_two_runs_have_their_own_seeds_and_leave_no_checkpoints(by_one, by_ranks):
    for path in (by_one / 'phase 1', by_ranks / 'phase 1'):
        assert [run['seed'] for run in load_log(path)['runs']] == [5, 6]
        assert differing(weights_of(path), weights_of(path, 1))
        assert not list(path.glob('checkpoints/*/*')) and not list(path.rglob('*.tmp'))


#### Phase 1 ####


def test_small_batch_is_the_record_bit_for_bit(folder, tmp_path):
    """Of its weights before phase 3, which recomputes BatchNorm's statistics."""
    shared = [*TINY_NET, 'aug.translate=3']
    hyp = override(record94.hyp, [*shared, 'opt.train_epochs=3.5', 'opt.batch_size=16'])
    options = {'device': 'cpu', 'dtype': torch.float32}
    loader = record94.CifarLoader(folder, True, 16, hyp['aug'], **options)
    net, _ = record94.train(loader, load(folder)[1], hyp, seed=3)
    call = ['--data', str(folder), '--device', 'cpu', '--out', str(tmp_path), '--save']
    call += ['--seed', '3', '--method', 'small-batch', *shared]
    assert swap94.main([*call, 'phase1.train_epochs=3.5', 'phase1.batch_size=16']) == 0
    assert differing(parameters(net), parameters(net, weights_of(tmp_path))) == []
    record = record_of(tmp_path)
    assert record['joint']['step'] == 17 and record['workers'] == []  # 6 + 6 + 3 + half of 3


def test_small_batch_has_the_settings_of_the_record():
    hyp = override(swap94.hyp, swap94.METHODS['small-batch'])
    settings = swap94.phase_settings(hyp, 'phase1')
    for group in ('opt', 'growth', 'selection', 'aug', 'net'):
        ours = {key: settings[group].get(key) for key in record94.hyp[group]}
        theirs = record94.hyp[group] | ({'tta_margin': None} if group == 'net' else {})
        assert ours == theirs


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def shards_of(loader, opt, seed, team):
    """A loader of an epoch of all images."""
    loader = swap94.ShardLoader(loader, opt, seed, team)
    losses = torch.full((len(loader.images),), torch.inf, device=loader.device)
    loader.start_epoch(0, losses, len(losses), len(losses) // opt['batch_size'])
    return loader


def test_batchnorm_statistics_belong_to_a_shard(folder):
    hyp = override(swap94.hyp, SMALL)
    opt = hyp['opt'] | hyp['phase1']
    train_loader, _ = load(folder, dtype=torch.float64)
    fresh = swap94.new_model(hyp, train_loader, 0, Team())['weights']

    def step(batch):
        """The gradient of a train_step which, with a learning rate of zero, leaves nothing else."""
        net = swap94.make_net(hyp, device='cpu', dtype=torch.float64)
        net.load_state_dict(fresh)
        swap94.train_step(net, torch.optim.SGD(net.parameters(), lr=0.0), batch, 0.2, Team())
        return gradients(net)

    shards = list(shards_of(train_loader, opt, 0, Team()))[:4]
    assert [len(labels) for _, labels in shards] == [8] * 4
    apart = sum(step([shard]) for shard in shards)
    undivided = step([tuple(map(torch.cat, zip(*shards)))])
    assert_close(step(shards), apart, rtol=1e-12, atol=1e-12)
    assert (apart - undivided).norm() > 0.01 * undivided.norm()


def test_a_lone_shard_is_not_copied(folder, monkeypatch):
    """With one rank and one shard there is nothing to sum, and so nothing to flatten."""
    hyp = override(swap94.hyp, SMALL)
    train_loader, _ = load(folder)
    net = swap94.make_net(hyp, device='cpu', dtype=torch.float32)
    shard = next(iter(train_loader))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    calls = []
    flatten = swap94.flatten
    monkeypatch.setattr(swap94, 'flatten', lambda tensors: calls.append(1) or flatten(tensors))
    swap94.train_step(net, optimizer, [shard], 0.2, Team())
    assert calls == []
    swap94.train_step(net, optimizer, [shard, shard], 0.2, Team())
    assert len(calls) == 2


def test_flatten_keeps_what_lies_in_memory():
    dense = torch.randn(4, 3, 2, 2)
    tensors = [dense, dense.to(memory_format=torch.channels_last), torch.randn(5)]
    vector = swap94.flatten(tensors)
    assert vector.shape == (4 * 12 * 2 + 5,)
    copies = [torch.zeros_like(tensor) for tensor in tensors]
    swap94.unflatten(vector, copies)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies))
    halves = [torch.randn(3).half(), torch.randn(2).half()]
    assert swap94.flatten(halves).dtype == torch.float32
    assert swap94.flatten([*halves, dense.double()]).dtype == torch.float64
    mixed = [*halves, dense]
    copies = [torch.zeros_like(tensor) for tensor in mixed]
    swap94.unflatten(swap94.flatten(mixed), copies)
    assert all(torch.equal(a, b) for a, b in zip(mixed, copies))


def test_ranks_and_shards_cut_the_batches_of_one_loader(folder):
    opt = {'batch_size': 32, 'shards': 4}
    loader, _ = load(folder)
    loader.seed = 7
    whole = list(loader)
    loader.epoch = 0
    for size in (1, 2, 4):
        parts = []
        for rank in range(size):
            parts.append(list(shards_of(loader, opt, 7, Team(rank, size))))
        per_rank = 4 // size
        assert [len(part) for part in parts] == [len(whole) * per_rank] * size
        for step, (inputs, labels) in enumerate(whole):
            here = slice(step * per_rank, (step + 1) * per_rank)
            mine = [shard for part in parts for shard in part[here]]
            assert torch.equal(torch.cat([shard[0] for shard in mine]), inputs)
            assert torch.equal(torch.cat([shard[1] for shard in mine]), labels)


def test_each_rank_learns_the_losses_of_the_images_that_all_have_seen(folder):
    """Those of another rank come by the sum; those that nobody saw stay."""
    hyp = override(swap94.hyp, [*SMALL, 'phase1.train_epochs=1'])
    settings = swap94.phase_settings(hyp, 'phase1')
    loader, _ = load(folder)
    net = swap94.make_net(hyp, device='cpu', dtype=torch.float32)
    alone = swap94.new_model(hyp, loader, 0, Team())
    shards = swap94.ShardLoader(loader, settings['opt'], 0, Team())
    alone = swap94.train_epoch(alone, net, shards, settings)
    assert torch.isinf(alone['losses']).sum() == 100 - 96
    added = []
    for rank in (0, 1):
        fresh = swap94.new_model(hyp, loader, 0, Team())
        shards = swap94.ShardLoader(loader, settings['opt'], 0, OneOfTwo(rank, added))
        swap94.train_epoch(fresh, net, shards, settings)
    of_epoch = [values[2:] for values in added if len(values) == 102]
    assert [(losses > 0).sum().item() for losses in of_epoch] == [48, 48]
    assert not (of_epoch[0] * of_epoch[1]).any()


def test_the_hardest_images_are_served_to_all_ranks(folder):
    loader, _ = load(folder)
    losses = torch.rand(100, generator=torch.Generator().manual_seed(0))
    hardest = set(losses.topk(64).indices.tolist())
    served = []
    for rank in (0, 1):
        shards = swap94.ShardLoader(loader, {'batch_size': 32, 'shards': 4}, 7, Team(rank, 2))
        order, mine = shards.start_epoch(3, losses, 64, 2)
        assert set(order.tolist()) == hardest
        assert torch.equal(torch.cat([labels for _, labels in shards]), loader.labels[mine])
        served += mine.tolist()
    assert len(served) == 64 and set(served) == hardest


def test_tau_ends_phase_1_with_the_epoch_that_reaches_it(fit):
    def accuracies(tau):
        _, record, _ = fit(f'phase1.tau={tau}', 'phase1.train_epochs=4', 'phase2.workers=1')
        return [row['train_acc'] for row in record['joint']['epochs']]

    free = accuracies(1)
    assert len(free) == 4 and free[0] < free[1]
    assert accuracies(0) == free[:1] and accuracies(free[1]) == free[:2]


#### Phase 2 ####


def test_workers_differ_and_do_not_depend_on_each_other(fit, monkeypatch):
    _, _, before = fit()

    def other_seed(seed, worker):
        return worker_seed(seed, worker) + 5 * (worker == 1)

    monkeypatch.setattr(swap94, 'worker_seed', other_seed)
    _, _, after = fit()
    for n, (one, other) in enumerate(zip(before, after)):
        names = differing(one['weights'], other['weights'])
        assert bool(names) == (n == 1)
    for n, one in enumerate(before):
        assert all(differing(one['weights'], other['weights']) for other in before[:n])


def test_workers_draws_are_those_of_no_other_worker_or_run():
    firsts = []
    for run in (0, 1, 2**32 - 1):
        for seed in (run, *(worker_seed(run, worker) for worker in range(9))):
            rng = swap94.np.random.default_rng((seed, 1))
            firsts.append(tuple(rng.integers(0, 2**62, 2)))
    assert len(set(firsts)) == len(firsts)


def test_without_an_average_the_last_steps_count(fit):
    """With decay 0 the weights are the result, whatever step is the last."""
    _, _, (plain,) = fit('phase2.workers=1', 'phase2.average.decay=0')
    _, _, (rare,) = fit('phase2.workers=1', 'phase2.average.decay=0', 'phase2.average.every=1000')
    _, _, (averaged,) = fit('phase2.workers=1')
    assert differing(plain['weights'], rare['weights']) == []
    assert differing(floats(plain['weights']), floats(averaged['weights']))


def test_the_result_is_the_mean_of_the_workers(fit):
    net, _, workers = fit()
    assert len(workers) == 4 and [model['failed'] for model in workers] == [None] * 4
    assert_mean(net.state_dict(), net, workers)
    assert differing(net.state_dict(), workers[0]['weights'])


def test_one_worker_is_its_own_average(fit):
    net, _, (worker,) = fit('phase2.workers=1')
    assert differing(parameters(net), parameters(net, worker['weights'])) == []


def test_the_average_is_that_of_the_kernel(fit):
    """Phase 3 by kernels/weight_average, interpreted where there is no GPU."""
    pytest.importorskip('triton', reason='needs Triton')
    if torch.cuda.is_available():
        pytest.skip('the interpreter is for machines without a GPU')
    from kernels import running_mean

    plain, _, _ = fit()
    by_kernel, _, workers = fit(running_mean=running_mean)
    assert_mean(by_kernel.state_dict(), by_kernel, workers)
    assert_close(parameters(by_kernel), parameters(plain))


def diverging(monkeypatch, seeds):
    """Let the models with these seeds learn at an infinite rate. Returns the last, by seed."""
    models = {}
    train_epoch = swap94.train_epoch

    def wrapped(model, net, loader, hyp, **functions):
        if loader.seed in seeds:
            hyp = hyp | {'opt': hyp['opt'] | {'lr': float('inf')}}
        models[loader.seed] = train_epoch(model, net, loader, hyp, **functions)
        return models[loader.seed]

    monkeypatch.setattr(swap94, 'train_epoch', wrapped)
    return models


def curve_call(folder, out):
    return ['--data', str(folder), '--device', 'cpu', '--curve', '--out', str(out), *SMALL]


@pytest.mark.parametrize('lost', [1, 3])
def test_a_diverged_worker_is_left_out_of_the_average(lost, folder, tmp_path, monkeypatch, capsys):
    models = diverging(monkeypatch, [worker_seed(0, lost)])
    assert swap94.main([*curve_call(folder, tmp_path), '--save']) == 0
    log = load_log(tmp_path)
    record = record_of(tmp_path)
    others = [models[worker_seed(0, n)] for n in range(4) if n != lost]
    net = swap94.make_net(log['hyp'], device='cpu', dtype=torch.float32)
    assert_mean(weights_of(tmp_path), net, others)
    assert [n for n, worker in enumerate(record['workers']) if worker['failed']] == [lost]
    assert record['curve'][-1]['val_acc'] == record['val_acc'] and log['summary']['n'] == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if 'left out' in line]
    assert line.startswith(f'run 0: worker {lost} is left out') and 'not finite' in line


ALL_WORKERS = [worker_seed(0, n) for n in range(4)]


@pytest.mark.parametrize(
    'seeds, complaint',
    [(ALL_WORKERS, 'no worker is left'), ([0], 'not finite')],
    ids=['workers', 'phase 1'],
)
def test_nothing_to_average_is_a_failed_run(
    seeds, complaint, folder, tmp_path, monkeypatch, capsys
):
    diverging(monkeypatch, seeds)
    assert swap94.main(curve_call(folder, tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith('run 0 failed')]
    assert complaint in line and load_log(tmp_path)['summary']['failed'] == 1


#### Statistics ####


class OneOfTwo(Team):
    """One of two ranks that take turns: it keeps what it adds, or gets the sum of what was."""

    def __init__(self, rank, added, total=None):
        super().__init__(rank, 2)
        self.added = added
        self.total = total

    def copy_from_first(self, tensor):
        pass

    def add(self, values):
        self.added.append(values.clone())
        return values if self.total is None else values.copy_(self.total)


@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('images, size', [(75, 20), (20, 20), (15, 20), (500, 20)])
def test_statistics_are_those_of_update_bn(images, size, ranks, folder):
    hyp = override(swap94.hyp, SMALL)
    loader, _ = load(folder, dtype=torch.float64)
    net = swap94.make_net(hyp, device='cpu', dtype=torch.float64)
    net.load_state_dict(swap94.new_model(hyp, loader, 0, Team())['weights'])
    reference = copy.deepcopy(net)
    used = loader.images[: min(images, 100)]
    batches = [batch for batch in used.split(size) if len(batch) in (size, len(used))]
    torch.optim.swa_utils.update_bn([loader.normalize(batch) for batch in batches], reference)
    statistics = {'images': images, 'batch_size': size}
    if ranks == 1:
        recompute_statistics(net, loader, statistics, Team())
    else:
        added = []
        for rank in (0, 1):
            recompute_statistics(copy.deepcopy(net), loader, statistics, OneOfTwo(rank, added))
        recompute_statistics(net, loader, statistics, OneOfTwo(1, [], sum(added)))
    running = {name: v for name, v in reference.state_dict().items() if 'running' in name}
    ours = {name: net.state_dict()[name] for name in running}
    assert_close(ours, running, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('served, start', [(100, 1.0), (75, 0.0)])
def test_the_result_has_the_averages_statistics_of_the_images_served_last(
    served, start, fit, folder, tmp_path
):
    net, _, workers = fit(f'phase2.selection.from={start}')
    losses = torch.load(tmp_path / 'fit 0' / 'joint.pt', weights_only=True)['losses']
    places = losses.argsort(descending=True)[:served].sort().values
    reference = copy.deepcopy(net)
    loader, _ = load(folder)
    batches = [loader.normalize(loader.images[places[i : i + 20]]) for i in (0, 20, 40)]
    torch.optim.swa_utils.update_bn(batches, reference)
    for name, value in reference.state_dict().items():
        if 'running' in name:
            assert_close(net.state_dict()[name], value)
            assert not torch.allclose(mean_of(workers, name).float(), value, rtol=1e-3)


#### Record ####


@pytest.mark.parametrize('name', CALLS)
@pytest.mark.parametrize('place, ranks', [('by_one', 1), ('by_two', 2), ('by_four', 4)])
def test_the_record_adds_up(name, place, ranks, request):
    path = request.getfixturevalue(place) / name
    record = record_of(path)
    phases = record['phases']
    hyp = load_log(path)['hyp']
    names = ['phase1', 'phase3'] if name == 'phase 1' else ['phase1', 'phase2', 'phase3']
    assert list(phases) == names
    assert record['ranks'] == ranks

    def pflop(phase, steps, ranks=1):
        settings = swap94.phase_settings(hyp, phase)
        return pytest.approx(1e-15 * sum(swap94.flop_of_steps(settings, 100, 10, ranks)[:steps]))

    one = phases['phase1']
    joint = record['joint']
    assert one['pflop_of_all'] == pflop('phase1', joint['step'])
    assert one['pflop'] == pflop('phase1', joint['step'], 4)  # as there are four shards
    assert one['seconds'] == joint['seconds'] > 0
    assert one['all_reduces'] == joint['step'] + len(joint['epochs'])
    net = swap94.make_net(hyp, device='meta', dtype=torch.float32)
    numbers = sum(p.numel() for p in net.parameters() if p.requires_grad)
    bias = net[0].bias.numel()
    small = round(0.45 * joint['step'] + 0.5)  # steps; in the others that bias is at rest
    values = numbers * joint['step'] - bias * (joint['step'] - small)
    sent = 8 * values + 4 * 102 * len(joint['epochs'])  # gradients in float64, losses in float32
    assert one['megabytes'] == pytest.approx(1e-6 * sent)
    if 'phase2' in phases:
        two = phases['phase2']
        workers = record['workers']
        per_worker = hyp['phase2']['ranks_per_worker']
        assert [worker['step'] for worker in workers] == [6] * hyp['phase2']['workers']
        assert two['pflop'] == pflop('phase2', 6, per_worker)
        assert two['pflop_of_all'] / len(workers) == pflop('phase2', 6)
        assert two['all_reduces'] == (0 if per_worker == 1 else 6 + 2)
        seconds = [worker['seconds'] for worker in workers]
        assert max(seconds) <= two['seconds'] <= sum(seconds)
        assert all(0 <= worker['epochs'][-1]['val_acc'] <= 1 for worker in workers)
        assert all(worker['failed'] is None for worker in workers)
    assert phases['phase3']['all_reduces'] == (3 if 'phase2' in phases else 2)
    of_all = [phase['pflop_of_all'] for phase in phases.values()]
    assert record['seconds'] == pytest.approx(sum(phase['seconds'] for phase in phases.values()))
    assert record['pflop'] == pytest.approx(sum(of_all))


def test_ranks_share_all_of_a_step_but_its_optimizer():
    settings = swap94.phase_settings(override(swap94.hyp, TINY_NET), 'phase1')
    settings['opt'] |= {'train_epochs': 1.0}

    def flop(ranks):
        return sum(swap94.flop_of_steps(settings, 50000, 10, ranks))

    no_muon = settings | {'opt': settings['opt'] | {'newton_schulz': 0}}
    of_images = sum(swap94.flop_of_steps(no_muon, 50000, 10))
    of_muon = flop(1) - of_images
    assert of_muon > 0
    assert flop(8) == pytest.approx(of_images / 8 + of_muon)


@pytest.mark.parametrize('start, statistics', [(1.0, 100), (0.0, 50)])  # of 75, a full batch
def test_phase_3_costs_no_more_than_the_images_that_were_served_last(start, statistics, fit):
    settings = ['phase2.workers=1', 'statistics.images=10000', 'statistics.batch_size=50']
    _, record, _ = fit(*settings, f'phase2.selection.from={start}')
    of_view = 1e-15 * swap94.flop_per_image(override(swap94.hyp, SMALL), 10)[1]
    expected = (statistics + 40 * 2) * of_view
    assert record['phases']['phase3']['pflop_of_all'] == pytest.approx(expected)


def test_the_curve_has_each_epoch_of_phase_2_and_ends_with_the_result(by_one, by_ranks):
    for path in (by_one, by_ranks):
        record = record_of(path / 'teams')
        assert [point['epoch'] for point in record['curve']] == [1, 2]
        assert record['curve'][-1]['val_acc'] == record['val_acc']
        for model in (record['joint'], *record['workers']):
            assert all('val_acc' in row for row in model['epochs'])
        assert record_of(path / 'workers')['curve'] == record_of(path / 'phase 1')['curve'] == []


def test_a_curve_changes_nothing(fit):
    plain, one, _ = fit()
    measured, other, _ = fit(curve=True)
    assert differing(plain.state_dict(), measured.state_dict()) == []
    assert one['val_acc'] == other['val_acc'] and len(other['curve']) == 2


#### Lost ranks and damaged files ####


def test_ranks_meet_under_a_prefix_that_no_ranks_before_them_had():
    store = torch.distributed.HashStore()
    prefixes = []
    for _ in range(2):  # what the first ones leave in the store does not mislead the second
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(swap94.new_prefix, store, 0, 3)
            time.sleep(0.2)
            others = [pool.submit(swap94.new_prefix, store, rank, 3) for rank in (1, 2)]
            found = {first.result(20), *(other.result(20) for other in others)}
        (prefix,) = found
        prefixes.append(prefix)
    assert prefixes[0] != prefixes[1]


def test_a_run_that_loses_a_rank_in_each_phase_ends_as_one_that_did_not(by_two, tmp_path, folder):
    log = tmp_path / 'log'
    checkpoints = log / 'checkpoints' / '00000'
    call = script('--data', folder, '--save', '--out', log, *LONG)
    with torchrun(*call, cwd=tmp_path) as process:
        wait_for(checkpoints / 'joint.pt')
        kill_rank(1, process)
        code, _, _ = finish(process)
    epoch = torch.load(checkpoints / 'joint.pt', weights_only=True)['epoch']
    assert code != 0 and 1 <= epoch < 8 and not list(checkpoints.glob('w*'))

    options = ['--nproc_per_node=2', '--max-restarts=1']
    with torchrun(*call, cwd=tmp_path, options=options) as process:
        wait_for(checkpoints / 'w0.pt')
        kill_rank(0, process)
        assert torch.load(checkpoints / 'joint.pt', weights_only=True)['done']
        assert not list(log.glob('runs/*.json'))
        code, out, err = finish(process)
    assert code == 0, err
    # It went on after the epoch that was there, and torchrun's restart did not begin again.
    assert f'joint {epoch} ' not in out and f'joint {epoch + 1} ' in out
    assert out.count('joint 8 ') == 1
    assert differing(weights_of(log), weights_of(by_two / 'long')) == []
    assert of_no_clock(record_of(log)) == of_no_clock(record_of(by_two / 'long'))
    assert not list(log.rglob('*.tmp'))


@pytest.mark.parametrize('content, older', [(b'', True), (b'PK', False)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(content, older, fit, capsys):
    plain, _, _ = fit()
    original = swap94.load_checkpoint
    damaged = []

    def load_checkpoint(path, device):
        if path.name == 'w2.pt' and not damaged:
            # What a run leaves that was stopped in its second epoch.
            joint = torch.load(path.with_name('joint.pt'), weights_only=True)
            model = swap94.start_model(joint['weights'], joint['losses'])
            damaged.append(path)
            if older:
                torch.save(model, swap94.older(path))
            path.write_bytes(content)
        return original(path, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap94, 'load_checkpoint', load_checkpoint)
        repaired, _, _ = fit()
    assert differing(plain.state_dict(), repaired.state_dict()) == []
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if 'damaged' in line]
    assert line.startswith(str(damaged[0]))


@pytest.mark.parametrize('name', ['joint', 'w1'])
def test_a_full_disk_names_the_file_and_takes_one_epoch(name, folder, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes
    written = []

    def full(file, content):
        if file.name.startswith(f'{name}.pt'):
            written.append(file)
            if len(written) == 2:
                write_bytes(file, content[:100])
                raise OSError(28, 'No space left on device')
        return write_bytes(file, content)

    monkeypatch.setattr(Path, 'write_bytes', full)
    call = ['--data', str(folder), '--device', 'cpu', '--out', str(tmp_path), '--save', *SMALL]
    with pytest.raises(UserError, match=rf'{name}\.pt cannot be written') as error:
        swap94.main(call)
    assert '\n' not in str(error.value) and not list(tmp_path.rglob('*.tmp'))
    assert swap94.main(call) == 0
    monkeypatch.setattr(Path, 'write_bytes', write_bytes)
    again = tmp_path / 'again'
    call[call.index('--out') + 1] = str(again)
    assert swap94.main(call) == 0
    assert differing(weights_of(tmp_path), weights_of(again)) == []


def test_a_second_call_is_refused_while_the_first_lives(folder, tmp_path):
    call = ['--data', str(folder), '--device', 'cpu', '--out', str(tmp_path), *SMALL]
    assert swap94.main(call) == 0
    with swap94.FileLock(tmp_path / 'call.lock'):
        with pytest.raises(UserError, match='another call is at work there'):
            swap94.main(call)
    assert swap94.main(call) == 0


#### Mistakes ####


@pytest.mark.parametrize(
    'ranks, settings, complaint',
    [
        (2, ['phase1.shards=3', 'phase1.batch_size=48'], 'phase1.shards=3'),
        (1, ['phase1.batch_size=50'], 'phase1.batch_size=50'),
        (1, ['phase1.batch_size=201', 'phase1.shards=1'], 'phase1.batch_size=201'),
        (1, ['phase2.batch_size=31', 'phase2.shards=2'], 'phase2.batch_size=31'),
        (1, ['phase2.batch_size=201'], 'phase2.batch_size=201'),
        (2, ['phase2.ranks_per_worker=2'], 'phase2.shards=1'),
        (2, ['phase2.workers=3'], 'phase2.workers=3'),
        (3, ['phase1.shards=3', 'phase1.batch_size=48', *TEAMS[1:]], 'phase2.workers=4'),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(ranks, settings, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        check_settings(override(swap94.hyp, [*SMALL, *settings]), ranks, 200, 'swap')
    assert '\n' not in str(error.value)


def test_ranks_of_a_worker_are_counted():
    for ranks, per_worker, expected in ((1, 1, 1), (1, 2, 1), (2, 2, 2), (4, 2, 2), (2, 4, 2)):
        settings = [*SMALL, f'phase2.ranks_per_worker={per_worker}', 'phase2.shards=2']
        assert check_settings(override(swap94.hyp, settings), ranks, 200, 'swap') == expected
    no_phase_2 = override(swap94.hyp, [*SMALL, 'phase2.workers=3', 'phase2.batch_size=999'])
    for method in ('large-batch', 'small-batch'):
        check_settings(no_phase_2, 2, 200, method)


@pytest.mark.parametrize(
    'setting',
    [
        'phase1.tau=1.5',
        'phase2.tau=-1',
        'phase1.average.decay=2',
        'phase2.workers=0',
        'phase1.batch_size=50',
        'phase1.speed=1',
        '--method=fast',
        '--lr=3',
    ],
)
def test_a_bad_setting_is_refused_before_there_is_a_log(setting, tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=setting.split('=')[0]) as error:
        swap94.main(['--data', str(folder), '--device', 'cpu', *SMALL, setting])
    assert '\n' not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_file_without_a_name_is_not_loaded(folder):
    line = refuse('--data', folder, '--device', 'cpu', '--load', '', script=swap94)
    assert line.endswith(': there is no such file')


def test_the_method_comes_before_the_digits_and_the_digits_before_the_user():
    args = swap94.parse_args(['--data', 'digits', 'phase2.batch_size=32'], swap94.OPTIONS)
    _, hyp = swap94.choose_data(args, swap94.METHODS['large-batch'])
    assert (hyp['phase1']['schedule']['end'], hyp['phase1']['batch_size']) == (0.02, 128)
    assert hyp['phase2']['batch_size'] == 32


def test_ranks_that_do_not_fit_together_end_at_once(tmp_path, folder):
    call = ' '.join(map(str, script('--data', folder, '--out', 'log', *SMALL)))
    command = f'exec {call} phase2.lr=4.$RANK'
    with torchrun('sh', '-c', command, cwd=tmp_path) as process:
        code, _, err = finish(process, 60)
    complaint = 'hyp.phase2.lr is 4.0 there, and 4.1 here'
    lines = [line for line in err.splitlines() if line.startswith('swap94.py: ')]
    assert code != 0 and any(complaint in line for line in lines), err
    assert 'swap94.py", line' not in err  # no traceback of a rank's
    assert not list(tmp_path.glob('log/runs/*'))


#### The accelerator and the compiler ####


def test_fp16_shards_are_summed_in_fp32_and_leave_nothing_on_the_cpu(loaders):
    train_loader, _ = loaders(device='meta', dtype=torch.float16)
    settings = swap94.phase_settings(swap94.hyp, 'phase1')
    opt = settings['opt'] | {'batch_size': 32, 'shards': 4}
    shards = shards_of(train_loader, opt, seed=0, team=Team())
    net = swap94.make_net(swap94.hyp, device='meta', dtype=torch.float16)
    optimizer, _ = swap94.make_optimizer(net, swap94.hyp | {'opt': opt}, total_steps=10)
    batch = list(shards)[:4]
    totals, losses = swap94.train_step(net, optimizer, batch, opt['label_smoothing'], shards.team)
    assert losses.device.type == 'meta' and losses.shape == (32,)
    assert totals.device.type == 'meta' and totals.dtype == torch.float32 and totals.shape == (2,)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert {p.grad.dtype for p in trained} == {torch.float16, torch.float32}
    vector = swap94.flatten([p.grad for p in trained])
    assert vector.device.type == 'meta' and vector.dtype == torch.float32


def test_swap_is_compiled_by_its_warm_up_and_is_the_eager_one(folder, monkeypatch):
    """By Dynamo and AOTAutograd; Inductor's part is tested with airbench94."""
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
    settings = [*SMALL, 'phase1.train_epochs=2', 'phase1.shards=1']
    hyp = override(swap94.hyp, [*settings, 'phase2.workers=2'])
    options = {'device': torch.device('cpu'), 'dtype': torch.float64}
    loaders = load(folder, dtype=torch.float64)
    torch._dynamo.reset()
    counters.clear()
    faster = swap94.compiled(hyp, **options)
    swap94.warm_up(*loaders, hyp, **faster)
    graphs = counters['stats']['unique_graphs']
    weights = []
    for seed in (0, 1, 0):
        net, _ = swap94.train(*loaders, hyp, seed, **faster)
        weights.append({name: value.clone() for name, value in net.state_dict().items()})
    assert 0 < graphs == counters['stats']['unique_graphs']  # nothing was compiled later
    assert not counters['graph_break']
    eager, _ = swap94.train(*loaders, hyp, seed=0)
    assert_close(floats(weights[0]), floats(eager.state_dict()), rtol=1e-9, atol=1e-9)
    assert differing(weights[0], weights[2]) == []
    assert differing(floats(weights[0]), floats(weights[1]))


def run_on_cuda(folder, tmp_path, *options):
    ranks = min(2, torch.cuda.device_count())
    call = ['--data', folder, '--runs', 1, '--out', tmp_path / 'log', *options]
    call += [*TINY_NET, 'phase1.batch_size=32', 'phase1.shards=2', 'phase2.batch_size=20']
    call += ['phase2.workers=2', 'phase1.train_epochs=15', 'phase2.train_epochs=2']
    command = [sys.executable, ROOT / 'swap94.py', *call]
    with torchrun(*command, cwd=tmp_path, options=[f'--nproc_per_node={ranks}']) as process:
        code, _, err = finish(process, 280)
    assert code == 0, err
    return record_of(tmp_path / 'log')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('options', [[], ['--compile']])
def test_swap_trains_on_cuda_and_by_nccl(options, folder, tmp_path):
    assert run_on_cuda(folder, tmp_path, *options)['tta_val_acc'] > 0.3


#### What it is for ####


def test_the_average_is_better_than_its_workers():
    settings = [
        *swap94.DIGITS, *TINY_NET, 'phase1.shards=1', 'phase1.batch_size=32',
        'phase1.train_epochs=2', 'phase2.workers=4', 'phase2.batch_size=32',
        'phase2.train_epochs=0.5', 'phase2.lr=0.24', 'phase2.schedule.end=1',
        'phase2.average.decay=0', 'statistics.images=200',
    ]  # fmt: skip
    hyp = override(swap94.hyp, settings)
    averages = []
    workers = []
    for seed in range(5):
        _, record = swap94.train(*load('digits', hyp['aug']), hyp, seed)
        accuracies = [worker['epochs'][-1]['val_acc'] for worker in record['workers']]
        averages.append(record['val_acc'])
        workers.append(sum(accuracies) / len(accuracies))
    test = scipy.stats.ttest_rel(averages, workers, alternative='greater')
    assert test.pvalue < 0.05, (averages, workers)
