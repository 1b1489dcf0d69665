"""swap94.py: workers and their average, with one, two, four and eight ranks, and lost ranks."""

import contextlib
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import scipy
import torch
import torch.distributed as dist
from conftest import ONE_THREAD, ROOT, call, load_log, on_ranks, random_set, refuse, save_set
from torch._dynamo.utils import counters
from torch.testing import assert_close

import airbench94
import swap94
from lab.flops import flop_of_steps, flop_per_image, swap_costs
from lab.options import override
from records import record94
from studies.swap import METHODS
from swap94 import Ranks, check_settings, recompute_statistics, worker_seed

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
LONG = [*SMALL, 'phase1.train_epochs=8', 'phase2.train_epochs=3']  # long enough to be killed in
TEAMS = ['phase2.workers=2', 'phase2.ranks_per_worker=2', 'phase2.shards=2']
EIGHTHS = [
    *TINY_NET, 'phase1.batch_size=40', 'phase1.train_epochs=3', 'phase2.batch_size=10',
    'phase2.train_epochs=1', 'statistics.images=80', 'statistics.batch_size=10',
]  # fmt: skip
RUNS = {  # name: (dtype, settings)
    'workers': (torch.float64, SMALL),
    'teams': (torch.float64, [*SMALL, *TEAMS]),
    'phase 1': (torch.float64, [*SMALL, 'phase1.train_epochs=1.5', 'phase2.workers=0']),
    'float32': (torch.float32, LONG),
}
TRAIN_SET = random_set(100, seed=0)
TEST_SET = random_set(40, seed=1)


def load(dtype=torch.float32, aug=airbench94.hyp['aug'], device='cpu'):
    """(train_loader, test_loader) of TRAIN_SET and TEST_SET."""
    options = {'device': device, 'dtype': dtype}
    train_loader = swap94.CifarLoader(*TRAIN_SET, 32, aug, train=True, **options)
    return train_loader, swap94.CifarLoader(*TEST_SET, **options)


def hyp_of(*settings):
    return override(swap94.hyp, [*SMALL, *settings])


@pytest.fixture
def swap(tmp_path):
    """swap(*settings, seed=0, **options) -> (net, record, the results of the workers), here."""

    def swap(*settings, seed=0, **options):
        path = tmp_path / f'swap {len(list(tmp_path.iterdir()))}'
        path.mkdir()
        net, record = swap94.train(*load(), hyp_of(*settings), seed, checkpoints=path, **options)
        return net, record, [read(path, f'worker{n}') for n in range(len(record['workers']))]

    return swap


def read(path, name):
    return torch.load(path / f'{name}.pt', weights_only=True)


def start(hyp, loader, seed=0, dtype=torch.float32):
    """(net, losses) before training."""
    net = swap94.start(
        loader, hyp, seed, Ranks(), None, swap94.make_net, swap94.init_whitening_conv
    )
    return net, torch.full((len(loader.images),), math.inf)


def floats(weights):
    """Without BatchNorm's number of batches, which means nothing here."""
    return {name: value for name, value in weights.items() if value.is_floating_point()}


def parameters(net, weights=None):
    weights = weights or net.state_dict()
    return {name: weights[name] for name, _ in net.named_parameters()}


def differing(ours, theirs):
    """Names of the tensors that are not the same to the last bit."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def mean_of(results, name):
    return torch.stack([result['weights'][name].double() for result in results]).mean(0)


def assert_mean(net, results):
    for name, p in net.named_parameters():
        assert_close(p.detach().double(), mean_of(results, name), rtol=1e-5, atol=1e-6)


#### Any number of ranks trains the same network ####


def train_rank(runs, path):
    """What torchrun has one of its processes do. Writes each run's result into a file."""
    swap94.join_ranks(torch.device('cpu'))
    all_reduce = dist.all_reduce
    sent = []

    def counting_all_reduce(tensor, group=None):
        sent.append(tensor.numel())
        all_reduce(tensor, group=group)

    dist.all_reduce = counting_all_reduce
    for name, (dtype, settings) in runs.items():
        sent.clear()
        hyp = override(swap94.hyp, settings)
        net, record = swap94.train(*load(dtype), hyp, seed=5)
        result = {'weights': net.state_dict(), 'record': record, 'sent': list(sent)}
        torch.save(result, path / f'{name} {dist.get_rank()}.pt')


def train_on(ranks, path, runs):
    on_ranks(ranks, train_rank, runs, path, seconds=200)
    return path


@pytest.fixture(scope='module')
def on_two(tmp_path_factory):
    return train_on(2, tmp_path_factory.mktemp('two'), RUNS)


@pytest.fixture(scope='module')
def on_four(tmp_path_factory):
    return train_on(4, tmp_path_factory.mktemp('four'), RUNS)


@pytest.fixture(params=['on_two', 'on_four'])
def on_several(request):
    return request.getfixturevalue(request.param)


def without_clock(record):
    """The part of a record that depends on neither the clock nor the number of ranks."""
    fits = []
    for fit in (record['phase1'], *record['workers']):
        rows = []
        for row in fit['epochs']:
            rows.append(row | {'seconds': None, 'train_loss': round(row['train_loss'], 5)})
        fits.append([fit['steps'], fit['val_acc'], rows])
    return [record['seed'], record['val_acc'], record['tta_val_acc'], fits]


@pytest.mark.parametrize('name', ['workers', 'teams', 'phase 1'])
def test_one_process_two_and_four_train_the_same_network(name, on_several):
    dtype, settings = RUNS[name]
    net, record = swap94.train(*load(dtype), override(swap94.hyp, settings), seed=5)
    result = read(on_several, f'{name} 0')
    assert record['phase1']['steps'] == (4 if name == 'phase 1' else 5)
    assert_close(floats(result['weights']), floats(net.state_dict()), rtol=1e-9, atol=1e-9)
    assert without_clock(result['record']) == without_clock(record)
    for rank in range(1, len(list(on_several.glob(f'{name} *.pt')))):
        other = read(on_several, f'{name} {rank}')
        assert differing(floats(other['weights']), floats(result['weights'])) == []
        assert without_clock(other['record']) == without_clock(record)


def test_eight_processes_train_the_network_of_one(tmp_path):
    """The defaults, narrowed: each rank has one of the eight shards, and then a worker."""
    runs = {'defaults': (torch.float64, EIGHTHS)}
    result = read(train_on(8, tmp_path, runs), 'defaults 0')
    net, record = swap94.train(*load(torch.float64), override(swap94.hyp, EIGHTHS), seed=5)
    assert_close(floats(result['weights']), floats(net.state_dict()), rtol=1e-9, atol=1e-9)
    assert without_clock(result['record']) == without_clock(record)
    assert len(record['workers']) == 8


@pytest.mark.parametrize('name', ['workers', 'teams', 'phase 1'])
def test_the_all_reduces_that_we_count_are_those_that_happen(name, on_four):
    hyp = override(swap94.hyp, RUNS[name][1])
    result = read(on_four, f'{name} 0')
    costs = swap_costs(swap94, hyp, 100, 40, 10, result['record'])
    net = swap94.make_net(hyp, device='meta', dtype=torch.float32)
    statistics = sum(value.numel() for key, value in net.named_buffers() if 'running' in key) + 1
    validation = [statistics, 1, 1]  # after phase 1; and of the result, which has its statistics
    if name == 'teams':
        validation += [statistics, 1]  # of the worker of this rank's team
    all_reduces = sum(cost['all_reduces'] for cost in costs.values())
    numbers = sum(cost['megabytes'] for cost in costs.values()) / 4e-6
    assert len(result['sent']) == all_reduces + len(validation)
    assert sum(result['sent']) == pytest.approx(numbers + sum(validation))


#### Phase 1 ####


def test_small_batches_are_the_record():
    """Before phase 3, which recomputes statistics. The record convolves in another way on a CPU."""
    shared = [*TINY_NET, 'aug.translate=3']
    hyp = override(record94.hyp, [*shared, 'opt.train_epochs=3.5', 'opt.batch_size=16'])
    train_loader, test_loader = load(torch.float64, hyp['aug'])
    loaders = record94.make_loaders(TRAIN_SET, TEST_SET, hyp, device='cpu', dtype=torch.float64)
    theirs, _ = record94.train(*loaders, hyp, seed=3)
    own = [*METHODS['small-batch'], 'phase1.train_epochs=3.5', 'phase1.batch_size=16']
    hyp = override(swap94.hyp, [*own, *shared])
    ours, record = swap94.train(train_loader, test_loader, hyp, seed=3)
    assert_close(parameters(ours), parameters(theirs), rtol=1e-9, atol=1e-9)
    assert record['phase1']['steps'] == 17 and record['workers'] == []  # 6 + 6 + 3 + half of 3


def test_small_batches_have_the_settings_of_the_record():
    settings = swap94.phase_settings(override(swap94.hyp, METHODS['small-batch']), 'phase1')
    for group in ('opt', 'growth', 'selection', 'aug', 'net'):
        ours = {key: settings[group].get(key) for key in record94.hyp[group]}
        missing = {'depth': None, 'residual': None, 'tta_margin': None} if group == 'net' else {}
        theirs = record94.hyp[group] | missing
        assert ours == theirs


def shards_of(loader, n, rank=0, ranks=1):
    """The parts of an epoch's batches of 32 that a rank gets, if each is cut into n shards."""
    loader = copy.copy(loader)
    loader.epoch = 0
    loader.batch_size = 32 // n
    draws = loader.next_draws()
    order = draws['order'][:96].view(3, ranks, -1)[:, rank].flatten()
    return list(loader.batches(draws | {'order': order}))


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def test_batchnorm_normalizes_each_shard_by_its_own_statistics():
    train_loader, _ = load(torch.float64)
    fresh, _ = start(hyp_of(), train_loader)

    def step(batch):
        """The gradient of a train_step with a learning rate of zero."""
        net = copy.deepcopy(fresh)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        swap94.train_step(net, optimizer, batch, 32, 0.2, Ranks())
        return gradients(net)

    shards = shards_of(train_loader, 4)[:4]
    assert [len(labels) for _, labels in shards] == [8] * 4
    apart = sum(step([shard]) for shard in shards)
    together = step([tuple(map(torch.cat, zip(*shards)))])
    assert_close(step(shards), apart, rtol=1e-12, atol=1e-12)
    assert (apart - together).norm() > 0.01 * together.norm()


def test_flatten_keeps_the_order_in_memory(monkeypatch):
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


def test_foreach_gets_one_dtype_per_call(monkeypatch):
    """torch 2.9 and 2.10 copy into lists of mixed dtypes as if all had the first one's dtype."""
    foreach_copy = torch._foreach_copy_
    calls = []

    def checking_copy(targets, sources):
        calls.append({target.dtype for target in targets})
        foreach_copy(targets, sources)

    monkeypatch.setattr(torch, '_foreach_copy_', checking_copy)
    mixed = [torch.randn(3).half(), torch.randn(2, 2), torch.randn(2).half()]
    copies = [torch.zeros_like(tensor) for tensor in mixed]
    swap94.unflatten(swap94.flatten(mixed), copies)
    assert all(torch.equal(a, b) for a, b in zip(mixed, copies))
    assert len(calls) == 2 and all(len(dtypes) == 1 for dtypes in calls)


@pytest.mark.parametrize('ranks', [1, 2, 4])
def test_ranks_and_shards_cut_the_batches_of_one_loader(ranks):
    loader, _ = load()
    whole = list(loader)
    parts = [shards_of(loader, 4, rank, ranks) for rank in range(ranks)]
    per_rank = 4 // ranks
    for step, (inputs, labels) in enumerate(whole):
        here = slice(step * per_rank, (step + 1) * per_rank)
        mine = [shard for part in parts for shard in part[here]]
        assert torch.equal(torch.cat([shard[0] for shard in mine]), inputs)
        assert torch.equal(torch.cat([shard[1] for shard in mine]), labels)


class OneOfTwo(Ranks):
    """One of two ranks: it keeps what it adds to a sum, and gets `total`, or its own part."""

    def __init__(self, rank, added, total=None):
        super().__init__(rank, 2)
        self.added = added
        self.total = total

    def sum(self, tensor):
        self.added.append(tensor.clone())
        return tensor if self.total is None else tensor.copy_(self.total)


def test_each_rank_gets_the_losses_of_the_images_that_the_others_saw():
    hyp = hyp_of('phase1.train_epochs=1')
    loader, _ = load()
    net, unseen = start(hyp, loader)
    result = swap94.fit(net, loader, hyp, 'phase1', 0, Ranks(), unseen)
    assert torch.isinf(result['losses']).sum() == 100 - 96
    added = []
    for rank in (0, 1):
        net, unseen = start(hyp, loader)
        swap94.fit(net, loader, hyp, 'phase1', 0, OneOfTwo(rank, added), unseen)
    of_epoch = [values[2:] for values in added if len(values) == 102]
    assert [(losses > 0).sum().item() for losses in of_epoch] == [48, 48]
    assert not (of_epoch[0] * of_epoch[1]).any()


def test_all_ranks_together_see_the_hardest_images():
    hyp = hyp_of('phase1.train_epochs=1', 'phase1.selection.from=0', 'phase1.selection.keep=0.64')
    loader, _ = load()
    losses = torch.rand(100, generator=torch.Generator().manual_seed(0))
    seen = []
    for rank in (0, 1):
        net, _ = start(hyp, loader)
        added = []
        swap94.fit(net, loader, hyp, 'phase1', 7, OneOfTwo(rank, added), losses)
        (of_epoch,) = [values[2:] for values in added if len(values) == 102]
        seen += of_epoch.nonzero().flatten().tolist()
    assert sorted(seen) == losses.topk(64).indices.sort().values.tolist()


def test_tau_ends_phase_1_with_the_epoch_that_reaches_it(swap):
    def accuracies(tau):
        _, record, _ = swap(f'phase1.tau={tau}', 'phase1.train_epochs=4', 'phase2.workers=0')
        return [row['train_acc'] for row in record['phase1']['epochs']]

    free = accuracies(1)
    assert len(free) == 4 and free[0] < free[1]
    assert accuracies(0) == free[:1] and accuracies(free[1]) == free[:2]


@pytest.mark.parametrize(
    'ended', [['phase1.tau=0', 'phase2.workers=0'], ['phase2.tau=0', 'phase2.workers=1']]
)
def test_statistics_are_of_the_images_of_the_epoch_in_which_tau_ended_it(ended, swap, monkeypatch):
    """The first epoch serves all 100 images, and the next one would leave out a quarter."""
    served = []

    def recording_statistics(net, loader, *args):
        served.append(len(loader.images))
        recompute_statistics(net, loader, *args)

    monkeypatch.setattr(swap94, 'recompute_statistics', recording_statistics)
    selection = ['phase1.selection.from=1', 'phase2.selection.from=0.4']
    if 'phase1.tau=0' in ended:
        selection = ['phase1.selection.from=0.4']
    _, record, _ = swap(*ended, *selection, 'phase2.train_epochs=2')
    fits = [record['phase1'], *record['workers']]
    assert 1 in [len(fitted['epochs']) for fitted in fits]
    assert served == [100] * (len(fits) + 1)


@pytest.mark.parametrize(('broken', 'is_failed'), [(0, True), (2, False), (3, True)])
def test_statistics_that_are_not_finite_leave_a_network_out(broken, is_failed, swap, monkeypatch):
    """Those of phase 1, of the second worker, or of the average, in the order of measuring."""
    measured = []

    def breaking_statistics(net, loader, *args):
        recompute_statistics(net, loader, *args)
        if len(measured) == broken:
            [*_, running] = [value for name, value in net.named_buffers() if 'running_var' in name]
            running[0] = math.nan
        measured.append(net)

    monkeypatch.setattr(swap94, 'recompute_statistics', breaking_statistics)
    net, record, workers = swap('phase2.workers=2')
    assert ('failed' in record) == is_failed
    if is_failed:
        assert record['failed'].endswith('.norm.running_var is not finite')
    else:
        assert record['workers'][1]['failed'].endswith('.norm.running_var is not finite')
        assert 'val_acc' not in record['workers'][1]
        assert_mean(net, workers[:1])


def test_without_workers_the_result_is_phase_1(swap, tmp_path):
    net, record, _ = swap('phase2.workers=0')
    (path,) = tmp_path.iterdir()
    assert differing(parameters(net), parameters(net, read(path, 'phase1')['weights'])) == []
    assert record['workers'] == [] and 'failed' not in record
    assert record['val_acc'] == record['phase1']['val_acc']


#### Phase 2 ####


def test_workers_differ_and_do_not_depend_on_each_other(swap, monkeypatch):
    _, _, before = swap()

    def other_seed(seed, worker):
        return worker_seed(seed, worker) + 5 * (worker == 1)

    monkeypatch.setattr(swap94, 'worker_seed', other_seed)
    _, _, after = swap()
    for n, (one, other) in enumerate(zip(before, after)):
        assert bool(differing(one['weights'], other['weights'])) == (n == 1)
    for n, one in enumerate(before):
        assert all(differing(one['weights'], other['weights']) for other in before[:n])


def test_no_other_worker_or_run_has_the_draws_of_a_worker():
    firsts = []
    for run in (0, 1, 2**32 - 1):
        for seed in (run, *(worker_seed(run, worker) for worker in range(9))):
            rng = swap94.np.random.default_rng((seed, 1))
            firsts.append(tuple(rng.integers(0, 2**62, 2)))
    assert len(set(firsts)) == len(firsts)


def test_without_an_average_the_last_steps_count(swap):
    """With decay 0 the weights are the result, whatever step is the last."""
    _, _, (plain,) = swap('phase2.workers=1', 'phase2.average.decay=0')
    _, _, (rare,) = swap('phase2.workers=1', 'phase2.average.decay=0', 'phase2.average.every=1000')
    _, _, (averaged,) = swap('phase2.workers=1')
    assert differing(plain['weights'], rare['weights']) == []
    assert differing(floats(plain['weights']), floats(averaged['weights']))


def test_the_result_is_the_mean_of_the_workers(swap):
    net, record, workers = swap()
    assert len(workers) == 4 and not any('failed' in worker for worker in record['workers'])
    assert_mean(net, workers)
    assert differing(net.state_dict(), workers[0]['weights'])


def test_one_worker_is_its_own_average(swap):
    net, _, (worker,) = swap('phase2.workers=1')
    assert differing(parameters(net), parameters(net, worker['weights'])) == []


def test_the_average_is_that_of_the_kernel(swap):
    """Phase 3 with kernels.mean, interpreted where there is no GPU."""
    pytest.importorskip('triton', reason='needs Triton')
    if torch.cuda.is_available():
        pytest.skip('the interpreter is for machines without a GPU')
    import kernels

    plain, _, _ = swap()
    with_kernel, _, workers = swap(mean=kernels.mean)
    assert_mean(with_kernel, workers)
    assert_close(parameters(with_kernel), parameters(plain))


@pytest.mark.parametrize('of_first', [1, 4])
def test_all_workers_count_the_same_whichever_rank_has_them(of_first):
    """Weights and losses are means over four workers, of which the second rank has 3 or none."""
    net = torch.nn.Linear(3, 2)
    draws = torch.Generator().manual_seed(0)
    workers = []
    for _ in range(4):
        weights = {name: torch.rand(p.shape, generator=draws) for name, p in net.named_parameters()}
        workers.append({'weights': weights, 'losses': torch.rand(5, generator=draws)})
    workers[2]['losses'][4] = math.inf  # nobody has seen this image
    by_rank = [workers[:of_first], workers[of_first:]]
    added = []
    for rank in (0, 1):
        swap94.average(by_rank[rank], net, torch.zeros(5), OneOfTwo(rank, added))
    for rank in (0, 1):
        ranks = OneOfTwo(rank, [], sum(added))
        count, losses = swap94.average(by_rank[rank], net, torch.zeros(5), ranks)
        assert count == 4
        assert_close(losses, torch.stack([worker['losses'] for worker in workers]).mean(0))
        for name, p in net.named_parameters():
            assert_close(p, torch.stack([worker['weights'][name] for worker in workers]).mean(0))


def diverging_fit(seeds):
    """`fit`, in which networks with these seeds learn at an infinite rate."""
    fit = swap94.fit

    def diverging(net, train_loader, hyp, phase, seed, *args, **options):
        if seed in seeds:
            hyp = hyp | {phase: hyp[phase] | {'lr': math.inf}}
        return fit(net, train_loader, hyp, phase, seed, *args, **options)

    return diverging


@pytest.mark.parametrize('lost', [1, 3])
def test_a_worker_that_diverges_is_left_out_of_the_average(lost, swap, monkeypatch, capsys):
    monkeypatch.setattr(swap94, 'fit', diverging_fit([worker_seed(0, lost)]))
    net, record, workers = swap()
    assert [n for n, worker in enumerate(record['workers']) if 'failed' in worker] == [lost]
    assert 'not finite' in record['workers'][lost]['failed']
    assert_mean(net, [worker for n, worker in enumerate(workers) if n != lost])
    assert 'failed' not in record and 0 <= record['tta_val_acc'] <= 1
    line = swap94.describe_workers(record)
    assert f'worker {lost} is left out' in line


@pytest.mark.parametrize('phase, complaint', [(2, 'no worker is left'), (1, 'not finite')])
def test_nothing_to_average_is_a_failed_run(phase, complaint, swap, monkeypatch):
    seeds = [0] if phase == 1 else [worker_seed(0, n) for n in range(4)]
    monkeypatch.setattr(swap94, 'fit', diverging_fit(seeds))
    _, record = swap94.train(*load(), hyp_of())
    assert complaint in record['failed'] and record['tta_val_acc'] is None
    assert record['seconds'] > 0


#### Statistics ####


@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('images, size', [(75, 20), (20, 20), (15, 20), (500, 20)])
def test_statistics_are_those_of_update_bn(images, size, ranks):
    loader, _ = load(torch.float64)
    net, _ = start(hyp_of(), loader)
    reference = copy.deepcopy(net)
    used = loader.images[: min(images, 100)]
    batches = [batch for batch in used.split(size) if len(batch) in (size, len(used))]
    torch.optim.swa_utils.update_bn([loader.normalize(batch) for batch in batches], reference)
    statistics = {'images': images, 'batch_size': size}
    if ranks == 1:
        recompute_statistics(net, loader, statistics, Ranks())
    else:
        added = []
        for rank in (0, 1):
            recompute_statistics(copy.deepcopy(net), loader, statistics, OneOfTwo(rank, added))
        recompute_statistics(net, loader, statistics, OneOfTwo(1, [], sum(added)))
    running = {name: v for name, v in reference.state_dict().items() if 'running' in name}
    ours = {name: net.state_dict()[name] for name in running}
    assert_close(ours, running, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('served, selected_from', [(100, 1.0), (75, 0.0)])
def test_the_result_has_statistics_of_the_images_served_last(served, selected_from, swap, tmp_path):
    net, _, workers = swap(f'phase2.selection.from={selected_from}')
    (path,) = tmp_path.iterdir()
    losses = torch.stack([worker['losses'] for worker in workers]).mean(0)
    assert not torch.equal(losses, read(path, 'phase1')['losses'])
    places = losses.argsort(descending=True)[:served].sort().values
    reference = copy.deepcopy(net)
    loader, _ = load()
    batches = [loader.normalize(loader.images[places[i : i + 20]]) for i in (0, 20, 40)]
    torch.optim.swa_utils.update_bn(batches, reference)
    for name, value in reference.state_dict().items():
        if 'running' in name:
            assert_close(net.state_dict()[name], value)
            assert not torch.allclose(mean_of(workers, name).float(), value, rtol=1e-3)


#### Record and costs ####


def test_the_seconds_add_up(swap):
    _, record, _ = swap()
    seconds = record['phase_seconds']
    assert list(seconds) == ['phase1', 'phase2', 'phase3']
    assert record['seconds'] == pytest.approx(sum(seconds.values()))
    assert seconds['phase1'] > record['phase1']['seconds'] > 0
    of_workers = [worker['seconds'] for worker in record['workers']]
    assert seconds['phase2'] == pytest.approx(sum(of_workers))


def test_ranks_share_all_of_a_step_except_for_its_optimizer():
    settings = swap94.phase_settings(override(swap94.hyp, TINY_NET), 'phase1')
    settings['opt'] |= {'train_epochs': 1.0}

    def flop(ranks):
        return sum(flop_of_steps(swap94, settings, 50000, 10, ranks))

    no_muon = settings | {'opt': settings['opt'] | {'newton_schulz': 0}}
    of_images = sum(flop_of_steps(swap94, no_muon, 50000, 10))
    of_muon = flop(1) - of_images
    assert of_muon > 0
    assert flop(8) == pytest.approx(of_images / 8 + of_muon)


def test_the_defaults_cost_what_they_may():
    """The goal that swap94.py set itself: at most 150 all-reduces, and 0.055 PFLOP on a rank."""
    fits = {}
    for phase in ('phase1', 'phase2'):
        plan = swap94.plan_epochs(50000, swap94.phase_settings(swap94.hyp, phase))
        fits[phase] = {'steps': sum(steps for _, steps in plan), 'epochs': plan}
    record = {'phase1': fits['phase1'], 'workers': 8 * [fits['phase2']]}
    costs = swap_costs(swap94, swap94.hyp, 50000, 10000, 10, record).values()
    assert sum(cost['all_reduces'] for cost in costs) <= 150
    assert 0.05 < sum(cost['pflop'] for cost in costs) <= 0.055


@pytest.mark.parametrize('selected_from, statistics', [(1.0, 100), (0.0, 50)])
def test_phase_3_costs_no_more_than_the_images_that_were_served_last(selected_from, statistics):
    """Of the 75 images that the selection leaves, one batch of 50 is full."""
    settings = ['statistics.images=10000', 'statistics.batch_size=50']
    hyp = hyp_of(*settings, f'phase2.selection.from={selected_from}')
    fit = {'steps': 6, 'epochs': [{}]}
    record = {'phase1': fit, 'workers': [fit]}
    cost = swap_costs(swap94, hyp, 100, 40, 10, record)['phase3']['pflop_of_all']
    _, of_view = flop_per_image(swap94, hyp, 10)
    assert cost == pytest.approx(1e-15 * (statistics + 40 * 2) * of_view)


#### Lost ranks and damaged files ####


def test_an_interrupted_run_continues_where_it_was(swap, tmp_path):
    plain, plain_record, _ = swap()
    path = tmp_path / 'checkpoints'
    path.mkdir()
    rows = []

    def stop_in_worker_2(row):
        rows.append(row['epoch'])
        if row['epoch'] == 'worker2 1':
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        swap94.train(*load(), hyp_of(), 0, stop_in_worker_2, checkpoints=path)
    assert sorted(file.stem for file in path.iterdir()) == ['phase1', 'worker0', 'worker1']
    rows.clear()

    def collect(row):
        rows.append(row['epoch'])

    net, record = swap94.train(*load(), hyp_of(), 0, collect, checkpoints=path)
    assert rows[0] == 'worker2 1' and rows[-1] == 'worker3 eval'
    assert differing(plain.state_dict(), net.state_dict()) == []
    assert without_clock(record) == without_clock(plain_record)


def cut(content):
    return content[: len(content) // 2]


def flip_a_bit(content):
    """In the middle, where the weights are."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize('name', ['phase1', 'worker2'])
@pytest.mark.parametrize('damage', [cut, flip_a_bit])
def test_a_damaged_checkpoint_is_named_and_made_again(name, damage, swap, tmp_path, capsys):
    plain, _, _ = swap()
    (path,) = tmp_path.iterdir()
    file = path / f'{name}.pt'
    file.write_bytes(damage(file.read_bytes()))
    net, _ = swap94.train(*load(), hyp_of(), checkpoints=path)
    assert differing(plain.state_dict(), net.state_dict()) == []
    assert capsys.readouterr().out.startswith(f'{path / name}.pt is damaged')


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(swap, tmp_path, monkeypatch, capsys):
    plain, _, _ = swap()

    def full(result, file):
        file.write_bytes(b'PK')
        raise RuntimeError('unexpected pos')

    monkeypatch.setattr(torch, 'save', full)
    path = tmp_path / 'checkpoints'
    path.mkdir()
    net, _ = swap94.train(*load(), hyp_of(), checkpoints=path)
    assert differing(plain.state_dict(), net.state_dict()) == []
    assert f'{path / "phase1.pt"} was not written' in capsys.readouterr().out
    assert not list(path.iterdir())


@contextlib.contextmanager
def torchrun(*command, cwd, options=('--nproc_per_node=2',)):
    """The command in each of torchrun's processes, which end with the context."""
    run = [sys.executable, '-m', 'torch.distributed.run', '--standalone', *options]
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


def has_rank(pid, rank):
    environment = Path(f'/proc/{pid}/environ').read_text()
    return f'RANK={rank}' in environment.split('\0')


def kill_rank(rank, process):
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    (pid,) = [pid for pid in children if has_rank(pid, rank)]
    os.kill(int(pid), signal.SIGKILL)


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def lab_run(folder, out, *settings):
    options = ['--data', folder, '--device', 'cpu', '--seed', 5, '--save', '--out', out]
    return ['-m', 'lab', 'run', ROOT / 'swap94.py', '--runs', 1, *options, *settings]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save_set(tmp_path_factory.mktemp('half'), TRAIN_SET, TEST_SET)


def test_a_run_that_loses_a_rank_in_each_phase_ends_as_one_that_did_not(on_two, tmp_path, folder):
    log = tmp_path / 'log'
    checkpoints = log / 'checkpoints' / '00000'
    command = lab_run(folder, log, *LONG)
    with torchrun(*command, cwd=tmp_path) as process:
        wait_for(checkpoints.exists)
        kill_rank(1, process)
        code, _, _ = finish(process)
    assert code != 0 and not list(checkpoints.iterdir())

    options = ['--nproc_per_node=2', '--max-restarts=1']
    with torchrun(*command, cwd=tmp_path, options=options) as process:
        wait_for((checkpoints / 'phase1.pt').exists)
        kill_rank(0, process)
        assert not list(log.glob('runs/*.json'))
        code, out, err = finish(process)
    assert code == 0, err
    assert out.count('phase1 8 ') == 1  # torchrun's restart did not repeat phase 1
    result = read(on_two, 'float32 0')
    weights = torch.load(log / 'runs' / '00000.pt', weights_only=True)['weights']
    assert differing(weights, result['weights']) == []
    assert without_clock(load_log(log)['runs'][0]) == without_clock(result['record'])
    assert not list(log.rglob('*.tmp')) and not checkpoints.exists()


def test_the_script_alone_continues_after_torchrun_lost_a_rank(tmp_path):
    """Its own command line, on the digits: the checkpoints lie in logs/unfinished."""
    source = (ROOT / 'swap94.py').read_text()
    short = {"'train_epochs': 4.0, 'batch_size': 128": "'train_epochs': 3.0, 'batch_size': 128"}
    short |= {"'block1': 64": "'block1': 4", "'block2': 256": "'block2': 8"}
    short |= {"'block3': 256": "'block3': 16", "'workers': 8": "'workers': 4"}
    for before, after in short.items():
        assert before in source
        source = source.replace(before, after)
    (tmp_path / 'swap94.py').write_text(source)
    command = ['swap94.py', '--data', 'digits', '--runs', 1]
    with torchrun(*command, cwd=tmp_path) as process:
        wait_for(lambda: list(tmp_path.glob('logs/unfinished/*/phase1.pt')))
        kill_rank(1, process)
        code, _, _ = finish(process)
    assert code != 0 and not list(tmp_path.glob('logs/*.json'))
    with torchrun(*command, cwd=tmp_path) as process:
        code, out, err = finish(process)
    assert code == 0, err
    assert 'phase1 3 ' not in out and 'worker3 eval' in out and 'mean accuracy' in out
    (file,) = tmp_path.glob('logs/*.json')
    assert len(json.loads(file.read_text())['runs']) == 1
    assert not list(tmp_path.glob('logs/unfinished/*'))


#### Mistakes ####


@pytest.mark.parametrize(
    'ranks, settings, complaint',
    [
        (2, ['phase1.shards=3', 'phase1.batch_size=48'], 'phase1.shards=3'),
        (1, ['phase1.batch_size=50'], 'phase1.batch_size=50'),
        (1, ['phase1.batch_size=201', 'phase1.shards=1'], 'phase1.batch_size=201'),
        (1, ['phase2.batch_size=31', 'phase2.shards=2'], 'phase2.batch_size=31'),
        (1, ['phase2.batch_size=201'], 'phase2.batch_size=201'),
        (1, ['phase1.shards=32'], 'phase1.shards=32'),
        (2, ['phase2.ranks_per_worker=2'], 'phase2.shards=1'),
        (2, ['phase2.workers=3'], 'phase2.workers=3'),
        (3, ['phase1.shards=3', 'phase1.batch_size=48', *TEAMS[1:]], 'phase2.workers=4'),
    ],
)
def test_what_ranks_cannot_share_evenly_is_refused(ranks, settings, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        check_settings(hyp_of(*settings), ranks, 200)
    assert '\n' not in str(error.value)


def test_without_workers_phase_2_may_have_any_settings():
    check_settings(hyp_of('phase2.workers=0', 'phase2.batch_size=999'), 2, 200)


@pytest.mark.parametrize(
    'setting',
    ['phase1.tau=1.5', 'phase2.tau=-1', 'phase1.average.decay=2', 'phase1.batch_size=50', '--lr=3'],
)
def test_a_bad_setting_is_refused_before_there_is_a_log(setting, tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refuse(*lab_run(folder, 'log', *SMALL, setting)[2:])
    assert setting.split('=')[0] in line
    assert list(tmp_path.iterdir()) == []


def test_a_second_command_in_the_same_folder_is_refused_while_the_first_runs(folder, tmp_path):
    command = lab_run(folder, tmp_path / 'log', *SMALL)[2:]
    assert call(*command) == 0
    with swap94.FileLock(tmp_path / 'log' / 'call.lock'):
        assert 'another' in refuse(*command)
    assert call(*command) == 0


def test_ranks_that_do_not_fit_together_end_at_once(tmp_path, folder):
    command = ' '.join(map(str, ['exec', sys.executable, *lab_run(folder, 'log', *SMALL)]))
    with torchrun(
        'sh', '-c', f'{command} phase2.lr=4.$RANK', cwd=tmp_path,
        options=['--no-python', '--nproc_per_node=2'],
    ) as process:  # fmt: skip
        code, _, err = finish(process, 60)
    assert code != 0 and 'the ranks must agree: hyp.phase2.lr is 4.1 on rank 1' in err, err
    assert 'lab/__main__.py' not in err  # no traceback of a rank
    assert not list(tmp_path.glob('log/runs/*'))


#### The accelerator and the compiler ####


def test_fp16_shards_are_summed_in_fp32_and_nothing_stays_on_the_cpu():
    train_loader, _ = load(torch.float16, device='meta')
    settings = swap94.phase_settings(swap94.hyp, 'phase1')
    opt = settings['opt'] | {'batch_size': 32}
    net = swap94.make_net(swap94.hyp, device='meta', dtype=torch.float16)
    optimizer, _ = swap94.make_optimizer(net, swap94.hyp | {'opt': opt}, total_steps=10)
    batch = shards_of(train_loader, 4)[:4]
    totals, losses = swap94.train_step(net, optimizer, batch, 20, 0.2, Ranks())
    assert losses.device.type == 'meta' and losses.shape == (32,)
    assert totals.device.type == 'meta' and totals.dtype == torch.float32 and totals.shape == (2,)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert {p.grad.dtype for p in trained} == {torch.float16, torch.float32}
    vector = swap94.flatten([p.grad for p in trained])
    assert vector.device.type == 'meta' and vector.dtype == torch.float32


def test_bfloat16_trains_on_a_cpu():
    _, record = swap94.train(*load(torch.bfloat16), hyp_of('phase2.workers=1'))
    assert 'failed' not in record and record['phase1']['epochs'][-1]['train_loss'] > 0


def test_swap_is_compiled_by_its_warm_up_and_trains_the_same_network(monkeypatch):
    """With Dynamo and AOTAutograd. The tests of airbench94 include Inductor."""
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
    hyp = hyp_of('phase1.shards=1', 'phase2.workers=2')
    loaders = load(torch.float64)
    torch._dynamo.reset()
    counters.clear()
    faster = swap94.fast_path(loaders[0], hyp)
    swap94.warm_up(*loaders, hyp, faster)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('options', [[], ['--compile']])
def test_swap_trains_on_cuda_over_nccl(options, folder, tmp_path):
    ranks = min(2, torch.cuda.device_count())
    settings = ['phase1.batch_size=32', 'phase1.shards=2', 'phase2.batch_size=20']
    settings += ['phase2.workers=2', 'phase1.train_epochs=15', 'phase2.train_epochs=2']
    command = ['-m', 'lab', 'run', ROOT / 'swap94.py', '--runs', 1, '--data', folder]
    command += ['--out', tmp_path / 'log', *options, *TINY_NET, *settings]
    with torchrun(*command, cwd=tmp_path, options=[f'--nproc_per_node={ranks}']) as process:
        code, _, err = finish(process, 280)
    assert code == 0, err
    assert load_log(tmp_path / 'log')['runs'][0]['tta_val_acc'] > 0.3


#### What it is for ####


def test_the_average_is_better_than_its_workers():
    settings = [
        *TINY_NET, 'aug.flip=false', 'phase1.shards=1', 'phase1.batch_size=32',
        'phase1.train_epochs=2', 'phase2.workers=4', 'phase2.batch_size=32',
        'phase2.train_epochs=0.5', 'phase2.lr=0.24', 'phase2.schedule.end=1',
        'phase2.average.decay=0', 'statistics.images=200', 'statistics.batch_size=100',
    ]  # fmt: skip
    hyp = override(swap94.hyp, settings)
    _, _, statistics, *sets = swap94.load_sets('digits')
    options = {'device': 'cpu', 'dtype': torch.float32, **statistics}
    averages = []
    workers = []
    for seed in range(5):
        loaders = swap94.make_loaders(*sets, hyp, **options)
        _, record = swap94.train(*loaders, hyp, seed)
        accuracies = [worker['val_acc'] for worker in record['workers']]
        averages.append(record['val_acc'])
        workers.append(sum(accuracies) / len(accuracies))
    test = scipy.stats.ttest_rel(averages, workers, alternative='greater')
    assert test.pvalue < 0.05, (averages, workers)
