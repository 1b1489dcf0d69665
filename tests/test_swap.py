"""swap94.py: workers and their average, by one, two and four gloo processes on the CPU, and after lost ranks."""

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scipy
import torch
from torch.testing import assert_close

import airbench94
import swap94
from conftest import ONE_THREAD, ROOT, load_log, made_up_split
from swap94 import Team, UserError, check_settings, override, recompute_statistics, worker_seed

TINY_NET = ['net.widths.block1=4', 'net.widths.block2=8', 'net.widths.block3=16', 'net.whiten_kernel=1']
SMALL = [*TINY_NET, 'net.tta_level=1', 'phase1.batch_size=32', 'phase1.shards=4', 'phase1.train_epochs=2',
         'phase1.tau=1', 'phase2.workers=4', 'phase2.batch_size=16', 'phase2.train_epochs=1.5',
         'phase2.lookahead.decay=0.5', 'statistics.images=75', 'statistics.batch_size=20']     # three batches
LONG = [*SMALL, 'phase1.train_epochs=8', 'phase2.train_epochs=3']       # long enough to be killed in
CALLS = {   # name: (type, arguments of main), for one, two and four processes
    'workers': ('float64', SMALL),
    'teams': ('float64', ['--curve', *SMALL, 'phase2.workers=2', 'phase2.ranks_per_worker=2', 'phase2.shards=2']),
    'phase 1': ('float64', ['--runs', '2', '--seed', '5', '--method', 'large-batch', *SMALL,
                            'phase1.train_epochs=1.5'])}
MAIN = '''if True:    # swap94.main once for each of the calls, all by the same processes
    import json, sys
    import torch, swap94
    for kind, *args in json.loads(sys.argv[1]):
        swap94.pick_device = lambda name: (torch.device('cpu'), getattr(torch, kind))
        assert swap94.main(args) == 0
        torch.distributed.destroy_process_group()'''


@contextlib.contextmanager
def torchrun(*command, cwd, options=('--nproc_per_node=2',)):
    """The command in each of torchrun's processes, all of which end with the context."""
    with subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--no-python', *options,
                           *map(str, command)], cwd=cwd, env=ONE_THREAD | {'PYTHONPATH': str(ROOT)},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
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


def kill_rank(rank, process):
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text()
    (pid,) = [pid for pid in children.split() if f'RANK={rank}' in Path(f'/proc/{pid}/environ').read_text().split('\0')]
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


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys() and [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def floats(weights):
    """Without BatchNorm's counts of batches, which mean nothing here."""
    return {name: value for name, value in weights.items() if value.is_floating_point()}


def differ(ours, theirs):
    return any(not torch.equal(value, theirs[name]) for name, value in floats(ours).items())


def calls_into(path, folder, calls):
    """The calls with a log for each in `path`."""
    return [[kind, '--data', str(folder), '--resume', str(path / name), *args] for name, (kind, args) in calls.items()]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Half as many images as the other tests' folder has."""
    path = tmp_path_factory.mktemp('half')
    for seed, (name, images) in enumerate(zip(swap94.CACHES, (100, 40))):
        torch.save(made_up_split(images, seed), path / name)
    return path


@pytest.fixture(scope='module')
def by_one(tmp_path_factory, folder):
    """A folder with a log for each of CALLS, made by this process."""
    path = tmp_path_factory.mktemp('one')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap94, 'pick_device', lambda name: (torch.device('cpu'), torch.float64))
        for _, *args in calls_into(path, folder, CALLS):
            assert swap94.main(args) == 0
    return path


def by_many(path, folder, ranks, calls):
    with torchrun(sys.executable, '-c', MAIN, json.dumps(calls_into(path, folder, calls)), cwd=path,
                  options=[f'--nproc_per_node={ranks}']) as process:
        code, out, err = finish(process)
    assert code == 0, err
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
    return [swap94.CifarLoader(data, train, 32, aug, device='cpu', dtype=dtype) for train in (True, False)]


@pytest.fixture
def fit(folder, tmp_path):
    """fit(*settings, seed=0, **options) -> (net, record, the workers' last states), in this process."""
    def fit(*settings, seed=0, **options):
        path = tmp_path / f'fit {len(list(tmp_path.iterdir()))}'
        path.mkdir()
        hyp = override(swap94.hyp, [*SMALL, *settings])
        net, record = swap94.train(*load(folder), hyp, seed, checkpoints=path, **options)
        return net, record, [torch.load(path / f'w{n}.pt', weights_only=True) for n in range(len(record['workers']))]
    return fit


def mean_of(states, name):
    return torch.stack([state['weights'][name].double() for state in states]).mean(0)


def assert_mean(weights, net, states):
    for name, _ in net.named_parameters():
        assert_close(weights[name].double(), mean_of(states, name), rtol=1e-5, atol=1e-6)


#### Any number of ranks makes the same network ####

@pytest.mark.parametrize('name', CALLS)
def test_one_process_two_and_four_make_the_same_network(name, by_one, by_ranks):
    assert record_of(by_one / name)['joint']['step'] == (5 if name == 'phase 1' else 6)
    for run in range(len(load_log(by_one / name)['runs'])):
        ours, theirs = weights_of(by_one / name, run), weights_of(by_ranks / name, run)
        assert ours.keys() == theirs.keys()
        for key, value in floats(ours).items():
            assert_close(value, theirs[key], rtol=1e-9, atol=1e-9)


def of_no_clock(record):
    """What of a run's record depends on neither clock nor number of ranks."""
    models = [record['joint'], *record['workers']]
    rows = [[{**row, 'seconds': None, 'train_loss': round(row['train_loss'], 9)} for row in model['epochs']]
            for model in models]
    return [record[key] for key in ('seed', 'val_acc', 'tta_val_acc', 'pflop', 'curve')], rows


@pytest.mark.parametrize('name', CALLS)
def test_one_process_two_and_four_write_the_same_record(name, by_one, by_ranks):
    assert of_no_clock(record_of(by_one / name)) == of_no_clock(record_of(by_ranks / name))


def test_two_runs_have_their_own_seeds_and_leave_no_checkpoints(by_one, by_ranks):
    for path in (by_one / 'phase 1', by_ranks / 'phase 1'):
        assert [run['seed'] for run in load_log(path)['runs']] == [5, 6]
        assert differ(weights_of(path), weights_of(path, 1))
        assert not list(path.glob('checkpoints/*/*')) and not list(path.rglob('*.tmp'))


#### Phase 1 ####

def test_small_batch_is_airbench94_bit_for_bit(folder, tmp_path):
    opt = ['train_epochs=2.5', 'batch_size=16', 'lr=9', 'whiten_bias_epochs=1', 'lookahead.every=4']
    hyp = override(airbench94.hyp, [*TINY_NET, *(f'opt.{setting}' for setting in opt)])
    loader = airbench94.CifarLoader(folder, True, 16, hyp['aug'], device='cpu', dtype=torch.float32)
    net, _ = airbench94.train(loader, load(folder)[1], hyp, seed=3)
    args = ['--data', str(folder), '--device', 'cpu', '--resume', str(tmp_path / 'log'), '--seed', '3',
            '--method', 'small-batch', *TINY_NET, *(f'phase1.{setting}' for setting in opt)]
    assert swap94.main(args) == 0
    weights = weights_of(tmp_path / 'log')
    assert_same_bits({name: p.detach() for name, p in net.named_parameters()},
                     {name: weights[name] for name, _ in net.named_parameters()})
    assert record_of(tmp_path / 'log')['joint']['step'] == 15 and record_of(tmp_path / 'log')['workers'] == []


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def test_batchnorm_statistics_belong_to_a_shard(folder):
    hyp = override(swap94.hyp, SMALL)
    opt = hyp['opt'] | hyp['phase1']
    train_loader, _ = load(folder, dtype=torch.float64)
    fresh = swap94.new_model(hyp, train_loader, 0)['weights']

    def step(batch):
        """The gradient of train_step, of which nothing else is left by an optimizer that learns nothing."""
        net = swap94.make_net(hyp, device='cpu', dtype=torch.float64)
        net.load_state_dict(fresh)
        swap94.train_step(net, torch.optim.SGD(net.parameters(), lr=0.0), batch, 0.2, Team())
        return gradients(net)
    shards = list(swap94.ShardLoader(train_loader, opt, 0, Team()))[:4]
    assert [len(labels) for _, labels in shards] == [8] * 4
    apart = sum(step([shard]) for shard in shards)
    undivided = step([tuple(map(torch.cat, zip(*shards)))])
    assert_close(step(shards), apart, rtol=1e-12, atol=1e-12)
    assert (apart - undivided).norm() > 0.01 * undivided.norm()


def test_ranks_and_shards_cut_the_batches_of_one_loader(folder):
    opt, (loader, _) = {'batch_size': 32, 'shards': 4}, load(folder)
    loader.seed = 7
    whole = list(loader)
    loader.epoch = 0
    for size in (1, 2, 4):
        parts = [list(swap94.ShardLoader(loader, opt, 7, Team(rank, size))) for rank in range(size)]
        per_rank = 4 // size
        assert [len(part) for part in parts] == [len(whole) * per_rank] * size
        for step, (inputs, labels) in enumerate(whole):
            mine = [shard for part in parts for shard in part[step * per_rank:(step + 1) * per_rank]]
            assert torch.equal(torch.cat([shard[0] for shard in mine]), inputs)
            assert torch.equal(torch.cat([shard[1] for shard in mine]), labels)


def test_tau_ends_phase_1_with_the_epoch_that_reaches_it(fit):
    def accs(tau):
        _, record, _ = fit(f'phase1.tau={tau}', 'phase1.train_epochs=4', 'phase2.workers=1')
        return [row['train_acc'] for row in record['joint']['epochs']]
    free = accs(1)
    assert len(free) == 4 and free[0] < free[1]
    assert accs(0) == free[:1] and accs(free[1]) == free[:2]


#### Phase 2 ####

def test_workers_differ_and_do_not_depend_on_each_other(fit, monkeypatch):
    _, _, before = fit()
    monkeypatch.setattr(swap94, 'worker_seed', lambda seed, worker: worker_seed(seed, worker) + 5 * (worker == 1))
    _, _, after = fit()
    for n, (one, other) in enumerate(zip(before, after)):
        assert differ(one['weights'], other['weights']) if n == 1 else one['weights'].keys() == other['weights'].keys()
        if n != 1:
            assert_same_bits(one['weights'], other['weights'])
    assert all(differ(a['weights'], b['weights']) for n, a in enumerate(before) for b in before[:n])


def test_workers_draws_are_those_of_no_other_worker_or_run():
    seeds = [seed for run in (0, 1, 2**32 - 1) for seed in (run, *(worker_seed(run, worker) for worker in range(9)))]
    firsts = [tuple(swap94.np.random.default_rng((seed, 1)).integers(0, 2**62, 2)) for seed in seeds]
    assert len(set(firsts)) == len(firsts)


def test_the_result_is_the_mean_of_the_workers(fit):
    net, record, workers = fit()
    assert len(workers) == 4 and [state['failed'] for state in workers] == [None] * 4
    assert_mean(net.state_dict(), net, workers)
    assert any(differ(net.state_dict(), state['weights']) for state in workers)


def test_one_worker_is_its_own_average(fit):
    net, _, (worker,) = fit('phase2.workers=1')
    assert_same_bits({name: p.detach() for name, p in net.named_parameters()},
                     {name: worker['weights'][name] for name, _ in net.named_parameters()})


def diverging(monkeypatch, seeds):
    """Let the models with these seeds learn at an absurd rate. Returns all models' last states, by seed."""
    states, train_epoch = {}, swap94.train_epoch

    def wrapped(state, net, loader, hyp, **functions):
        if loader.seed in seeds:
            hyp = hyp | {'opt': hyp['opt'] | {'lr': 1e30}}
        states[loader.seed] = train_epoch(state, net, loader, hyp, **functions)
        return states[loader.seed]
    monkeypatch.setattr(swap94, 'train_epoch', wrapped)
    return states


def test_a_diverged_worker_is_left_out_of_the_average(folder, tmp_path, monkeypatch, capsys):
    states = diverging(monkeypatch, [worker_seed(0, 1)])
    assert swap94.main(['--data', str(folder), '--device', 'cpu', '--curve', '--resume', str(tmp_path), *SMALL]) == 0
    log, record, others = load_log(tmp_path), record_of(tmp_path), [states[worker_seed(0, n)] for n in (0, 2, 3)]
    assert_mean(weights_of(tmp_path), swap94.make_net(log['hyp'], device='cpu', dtype=torch.float32), others)
    assert [bool(worker['failed']) for worker in record['workers']] == [False, True, False, False]
    assert record['curve'][-1]['val_acc'] == record['val_acc'] and log['summary']['n'] == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if 'left out' in line]
    assert line.startswith('run 0: worker 1 is left out') and 'not finite' in line


@pytest.mark.parametrize('seeds, complaint', [
    ([worker_seed(0, n) for n in range(4)], 'no worker is left'), ([0], 'not finite')], ids=['workers', 'phase 1'])
def test_nothing_to_average_is_a_failed_run(seeds, complaint, folder, tmp_path, monkeypatch, capsys):
    diverging(monkeypatch, seeds)
    assert swap94.main(['--data', str(folder), '--device', 'cpu', '--curve', '--resume', str(tmp_path), *SMALL]) != 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('run 0') and 'failed' in line]
    assert complaint in line and load_log(tmp_path)['summary']['failed'] == 1


#### Statistics ####

class OneOfTwo(Team):
    """One of two ranks that take turns: it keeps what it adds, or gets the sum of what was added."""
    def __init__(self, rank, added, total=None):
        super().__init__(rank, 2)
        self.added, self.total = added, total

    def add(self, values):
        self.added.append(values.clone())
        return values if self.total is None else values.copy_(self.total)


@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('images, size', [(75, 20), (20, 20), (15, 20), (500, 20)])
def test_statistics_are_those_of_update_bn(images, size, ranks, folder):
    hyp, (loader, _) = override(swap94.hyp, SMALL), load(folder, dtype=torch.float64)
    net = swap94.make_net(hyp, device='cpu', dtype=torch.float64)
    net.load_state_dict(swap94.new_model(hyp, loader, 0)['weights'])
    reference, statistics, used = copy.deepcopy(net), {'images': images, 'batch_size': size}, min(images, 100)
    full = [loader.normalize(loader.images[i:i + size]) for i in range(0, max(1, used - size + 1), size)]
    torch.optim.swa_utils.update_bn([batch[:used] for batch in full], reference)
    if ranks == 1:
        recompute_statistics(net, loader, statistics, Team())
    else:
        added = []
        for rank in (0, 1):
            recompute_statistics(copy.deepcopy(net), loader, statistics, OneOfTwo(rank, added))
        recompute_statistics(net, loader, statistics, OneOfTwo(1, [], sum(added)))
    for name, value in reference.state_dict().items():
        if 'running' in name:
            assert_close(net.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_the_result_has_the_averages_statistics_not_the_workers(fit, folder):
    net, _, workers = fit()
    reference, (loader, _) = copy.deepcopy(net), load(folder)
    torch.optim.swa_utils.update_bn([loader.normalize(loader.images[i:i + 20]) for i in (0, 20, 40)], reference)
    for name, value in reference.state_dict().items():
        if 'running' in name:
            assert_close(net.state_dict()[name], value)
            assert not torch.allclose(mean_of(workers, name).float(), value, rtol=1e-3)


#### Record ####

@pytest.mark.parametrize('name', CALLS)
@pytest.mark.parametrize('place, ranks', [('by_one', 1), ('by_two', 2), ('by_four', 4)])
def test_the_record_adds_up(name, place, ranks, request):
    path = request.getfixturevalue(place) / name
    record, hyp = record_of(path), load_log(path)['hyp']
    phases, per_image = record['phases'], 1e-15 * swap94.flop_per_image(hyp, 10)[0]
    assert list(phases) == ['phase1', 'phase3'] if name == 'phase 1' else ['phase1', 'phase2', 'phase3']
    assert phases['phase1']['pflop_of_all'] == pytest.approx(record['joint']['step'] * 32 * per_image)
    assert phases['phase1']['pflop'] == pytest.approx(phases['phase1']['pflop_of_all'] / ranks)
    assert phases['phase1']['seconds'] == record['joint']['seconds'] == record['joint']['epochs'][-1]['seconds'] > 0
    for phase in phases.values():
        assert phase['pflop_of_all'] / ranks <= phase['pflop'] * (1 + 1e-9) and phase['seconds'] > 0
        assert phase['pflop'] == phase['pflop_of_all'] if ranks == 1 else phase['pflop'] < phase['pflop_of_all']
    if 'phase2' in phases:
        workers = record['workers']
        assert [worker['step'] for worker in workers] == [9] * hyp['phase2']['workers']
        assert phases['phase2']['pflop_of_all'] == pytest.approx(9 * 16 * per_image * len(workers))
        assert phases['phase2']['pflop'] == pytest.approx(phases['phase2']['pflop_of_all'] / ranks)
        assert max(w['seconds'] for w in workers) <= phases['phase2']['seconds'] <= sum(w['seconds'] for w in workers)
        assert all(0 <= worker['epochs'][-1]['val_acc'] <= 1 and worker['failed'] is None for worker in workers)
    assert record['seconds'] == pytest.approx(sum(phase['seconds'] for phase in phases.values()))
    assert record['pflop'] == pytest.approx(sum(phase['pflop_of_all'] for phase in phases.values()))


def test_phase_3_costs_no_more_than_the_set_has_images(fit):
    _, record, _ = fit('phase2.workers=1', 'statistics.images=10000', 'statistics.batch_size=50')
    of_view = 1e-15 * swap94.flop_per_image(override(swap94.hyp, SMALL), 10)[1]
    assert record['phases']['phase3']['pflop_of_all'] == pytest.approx((100 + 40 * 2) * of_view)


def test_the_curve_has_each_epoch_of_phase_2_and_ends_with_the_result(by_one, by_ranks):
    for path in (by_one, by_ranks):
        record = record_of(path / 'teams')
        assert [point['epoch'] for point in record['curve']] == [1, 2]
        assert record['curve'][-1]['val_acc'] == record['val_acc']
        assert all('val_acc' in row for model in (record['joint'], *record['workers']) for row in model['epochs'])
        assert record_of(path / 'workers')['curve'] == [] and record_of(path / 'phase 1')['curve'] == []


def test_a_curve_changes_nothing(fit):
    (plain, one, _), (measured, other, _) = fit(), fit(curve=True)
    assert_same_bits(plain.state_dict(), measured.state_dict())
    assert one['val_acc'] == other['val_acc'] and len(other['curve']) == 2


#### Lost ranks ####

def test_a_run_that_loses_a_rank_in_each_phase_ends_as_one_that_did_not(by_two, tmp_path, folder):
    log, checkpoints = tmp_path / 'log', tmp_path / 'log' / 'checkpoints' / '00000'
    call = script('--data', folder, '--resume', log, *LONG)
    with torchrun(*call, cwd=tmp_path) as process:
        wait_for(checkpoints / 'joint.pt')
        kill_rank(1, process)
        code, _, _ = finish(process)
    epoch = torch.load(checkpoints / 'joint.pt', weights_only=True)['epoch']
    assert code != 0 and 1 <= epoch < 8 and not list(checkpoints.glob('w*'))

    (checkpoints / 'joint.tmp').write_bytes((checkpoints / 'joint.pt').read_bytes()[:1000])     # cut off in writing
    (checkpoints / 'w0.tmp').write_bytes(b'PK')
    with torchrun(*call, cwd=tmp_path, options=['--nproc_per_node=2', '--max-restarts=1']) as process:
        wait_for(checkpoints / 'w0.pt')
        kill_rank(0, process)
        assert torch.load(checkpoints / 'joint.pt', weights_only=True)['done'] and not list(log.glob('runs/*'))
        code, out, err = finish(process)
    assert code == 0, err
    assert len(load_log(log)['resumed']) == 2       # by this call, and by torchrun
    assert [f'joint {n} ' in out for n in (epoch, epoch + 1, 8)] == [False, True, True] and out.count('joint 8 ') == 1
    assert_same_bits(weights_of(log), weights_of(by_two / 'long'))
    assert of_no_clock(record_of(log)) == of_no_clock(record_of(by_two / 'long'))
    assert not list(log.rglob('*.tmp'))


#### Mistakes ####

@pytest.mark.parametrize('ranks, settings, complaint', [
    (2, ['phase1.shards=3', 'phase1.batch_size=48'], 'phase1.shards=3'),
    (1, ['phase1.batch_size=50'], 'phase1.batch_size=50'),
    (1, ['phase1.batch_size=201', 'phase1.shards=1'], 'phase1.batch_size=201'),
    (1, ['phase2.batch_size=31', 'phase2.shards=2'], 'phase2.batch_size=31'),
    (1, ['phase2.batch_size=201'], 'phase2.batch_size=201'),
    (2, ['phase2.ranks_per_worker=2'], 'phase2.shards=1'),
    (2, ['phase2.workers=3'], 'phase2.workers=3'),
    (3, ['phase1.shards=3', 'phase1.batch_size=48', 'phase2.ranks_per_worker=2', 'phase2.shards=2'],
     'phase2.workers=4'),
])
def test_what_cannot_be_dealt_out_is_refused(ranks, settings, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        check_settings(override(swap94.hyp, [*SMALL, *settings]), ranks, 200, 'swap')
    assert '\n' not in str(error.value)


def test_ranks_of_a_worker_are_counted():
    for ranks, per_worker, expected in ((1, 1, 1), (1, 2, 1), (2, 2, 2), (4, 2, 2), (2, 4, 2)):
        settings = [*SMALL, f'phase2.ranks_per_worker={per_worker}', 'phase2.shards=2']
        assert check_settings(override(swap94.hyp, settings), ranks, 200, 'swap') == expected
    without_phase_2 = override(swap94.hyp, [*SMALL, 'phase2.workers=3', 'phase2.batch_size=999'])
    for method in ('large-batch', 'small-batch'):
        check_settings(without_phase_2, 2, 200, method)


@pytest.mark.parametrize('setting', ['phase1.tau=1.5', 'phase2.tau=-1', 'phase1.lookahead.decay=2', 'phase2.workers=0',
                                     'phase1.batch_size=50', 'phase1.speed=1', '--method=fast'])
def test_a_bad_setting_is_refused_before_there_is_a_log(setting, tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=setting.split('=')[0]) as error:
        swap94.main(['--data', str(folder), '--device', 'cpu', *SMALL, setting])
    assert '\n' not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('args, complaint', [
    ('phase1.shards=3 phase1.batch_size=48', 'phase1.shards=3'), ('phase2.lr=4.$RANK', 'differ in hyp'),
    ('--seed 7', 'differ in data')])
def test_a_mistake_of_two_ranks_gets_one_line(args, complaint, tmp_path, folder):
    for rank in (0, 1):     # each rank has a folder, and a set there, of its own
        (tmp_path / f'{rank}').mkdir()
        for name in swap94.CACHES:
            torch.save(made_up_split(100, seed=rank * ('data' in complaint)), tmp_path / f'{rank}' / name)
    call = ' '.join(map(str, script('--data', '.', *SMALL)))
    with torchrun('sh', '-c', f'cd $RANK && exec {call} {args}', cwd=tmp_path) as process:
        code, _, err = finish(process, 60)
    (line,) = [line for line in err.splitlines() if line.startswith('swap94.py: ')]
    assert code != 0 and complaint in line and list(tmp_path.rglob('logs')) == []


#### What it is for ####

def test_the_average_is_better_than_its_workers():
    hyp, pairs = override(swap94.hyp, [
        *swap94.DIGITS, *TINY_NET, 'phase1.shards=1', 'phase1.batch_size=32', 'phase1.train_epochs=2', 'phase1.lr=20',
        'phase2.workers=4', 'phase2.batch_size=32', 'phase2.train_epochs=0.5', 'phase2.lr=30', 'phase2.schedule.end=1',
        'statistics.images=200']), []
    for seed in range(5):
        _, record = swap94.train(*load('digits', hyp['aug']), hyp, seed)
        workers = [worker['epochs'][-1]['val_acc'] for worker in record['workers']]
        pairs.append((record['val_acc'], sum(workers) / len(workers)))
    assert scipy.stats.ttest_rel(*zip(*pairs), alternative='greater').pvalue < 0.05, pairs
