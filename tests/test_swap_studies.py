"""SWAP's studies: their settings, ResNet-9, averages, planes and cosines."""

import dataclasses

import numpy as np
import pytest
import smoke
import torch
import torch.nn.functional as F
from torch import nn

import airbench94
import swap94
from lab.data import load_set
from lab.errors import UserError
from lab.networks import save_network
from lab.options import override
from studies import (
    common,
    cosine,
    curves,
    landscape,
    networks,
    plane,
    progress,
    swa,
    swap,
    swap_tables,
)

CPU = {'device': 'cpu', 'dtype': torch.float32}


@pytest.fixture(scope='session')
def digits():
    return load_set('digits', airbench94)


@pytest.fixture
def place(digits, tmp_path):
    """A place for swap94's own network, at smoke scale."""
    settings = smoke.settings_of('landscape') | {'watched': None, 'points': 3}
    return common.Place(settings, tmp_path, digits, **CPU)


@pytest.fixture
def resnet9(place):
    """The same for ResNet-9."""
    settings = smoke.settings_of('landscape', 'resnet9')
    return dataclasses.replace(place, settings=settings)


#### Settings and ResNet-9 ####


@pytest.mark.parametrize(
    'classes, method, phase, batch_size, lr, epochs, warm_up, tau',  # Tables 5 and 6
    [
        (10, 'small-batch', 'phase1', 512, 0.3, 100, 30, 1),
        (10, 'large-batch', 'phase1', 4096, 1.2, 150, 30, 1),
        (10, 'swap', 'phase1', 4096, 1.2, 150, 30, 0.98),
        (10, 'swap', 'phase2', 512, 0.12, 30, 0, 1),
        (100, 'small-batch', 'phase1', 128, 0.2, 150, 60, 1),
        (100, 'large-batch', 'phase1', 2048, 1.2, 150, 45, 1),
        (100, 'swap', 'phase1', 2048, 1.2, 150, 45, 0.9),
        (100, 'swap', 'phase2', 128, 0.05, 10, 0, 1),
    ],
)
def test_the_papers_settings(classes, method, phase, batch_size, lr, epochs, warm_up, tau):
    settings = swap.SETTINGS['resnet9']['paper']
    hyp = override(swap94.hyp, swap.assignments_of(settings, method, classes))
    own = hyp[phase]
    assert (own['batch_size'], own['lr'], own['train_epochs'], own['tau']) == (
        batch_size, lr, epochs, tau,
    )  # fmt: skip
    rates = [swap94.learning_rate_share(step, epochs, own['schedule']) for step in range(epochs)]
    assert rates.index(max(rates)) == warm_up and max(rates) == 1
    assert hyp['opt']['momentum'] == 0.9 and hyp['opt']['weight_decay'] == 5e-4


def test_only_swap_has_workers():
    for of_net in swap.SETTINGS.values():
        for settings in of_net.values():
            for method in swap.METHODS:
                hyp = override(swap94.hyp, swap.assignments_of(settings, method, 100))
                assert hyp['phase2']['workers'] == (8 if method == 'swap' else 0)


def test_resnet9_is_dawnbenchs():
    net = networks.make_resnet9(seed=3, **CPU)
    # Those of the original, and the first layer's biases.
    assert sum(p.numel() for p in net.parameters()) == 6_573_120 + 64
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 8
    images = torch.randn(4, 3, 32, 32)
    assert net(images).shape == (4, 10)
    again = networks.make_resnet9(seed=3, **CPU)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_resnet9_trains_in_half_precision_on_its_device(dtype):
    hyp = swap94.phase_settings(
        override(swap94.hyp, smoke.SWAP_HYP['resnet9']['large-batch']), 'phase1'
    )
    net = networks.make_resnet9(8, device='meta', dtype=dtype)
    optimizer, _ = swap.make_sgd(net, hyp, total_steps=2)
    inputs = torch.empty(8, 3, 32, 32, device='meta', dtype=dtype)
    labels = torch.empty(8, dtype=torch.int64, device='meta')
    shards = [(inputs, labels), (inputs, labels)]
    if dtype == torch.bfloat16:
        net.autocast = False  # torch.autocast has no meta device
        shards = [(x.float(), y) for x, y in shards]
    totals, losses = swap94.train_step(net, optimizer, shards, 32, 0.0, swap94.Ranks())
    assert totals.device.type == losses.device.type == 'meta'


def test_a_step_of_resnet9_is_sgds_on_the_mean_loss():
    hyp = swap94.phase_settings(
        override(swap94.hyp, smoke.SWAP_HYP['resnet9']['small-batch']), 'phase1'
    )
    options = {'device': 'cpu', 'dtype': torch.float64}
    torch.manual_seed(0)
    inputs, labels = torch.randn(40, 3, 32, 32, dtype=torch.float64), torch.arange(40) % 10
    ours, theirs = [networks.make_resnet9(4, seed=1, **options) for _ in range(2)]
    optimizer, scheduler = swap.make_sgd(ours, hyp, total_steps=10)
    lr, decay = hyp['opt']['lr'], 5e-4
    sgd = torch.optim.SGD(theirs.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=decay)
    for step in range(2):
        swap94.train_step(ours, optimizer, [(inputs, labels)], 32, 0.0, swap94.Ranks())
        scheduler.step()
        for group in sgd.param_groups:
            group['lr'] = lr * (1 - step / 10)
        sgd.zero_grad()
        F.cross_entropy(theirs(inputs), labels).backward()
        sgd.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-9)


def test_a_study_trains_resnet9(resnet9):
    for method in ('small-batch', 'swap'):
        record = swap_tables.train({'method': method}, 0, resnet9)
        assert 0 < record['val_acc'] < 1 and record['pflop'] > 0
        assert len(record['workers']) == (3 if method == 'swap' else 0)
    net, _ = swap.train_phase1(resnet9, swap.hyp_of(resnet9, 'small-batch'), 0)
    assert net.state_dict().keys() == networks.make_resnet9(8, **CPU).state_dict().keys()


@pytest.mark.parametrize('phase', ['phase1', 'phase2'])
def test_a_network_that_diverges_ends_the_study(phase, resnet9):
    own = [*smoke.SWAP_HYP['resnet9']['swap'], f'{phase}.lr=1e9', 'phase2.workers=1']
    with pytest.raises(UserError, match=f'seed 7 diverges: .* of {phase}'):
        swap.train_swap(resnet9, override(swap94.hyp, own), 7)


def test_a_study_goes_on_with_the_networks_that_it_has(place, monkeypatch):
    hyp = swap.hyp_of(place, 'swap')
    net, record, _, workers = swap.train_swap(place, hyp, 3)
    assert len(workers) == 3 and record['val_acc'] > 0
    for name, p in net.named_parameters():
        mean = torch.stack([worker['weights'][name] for worker in workers]).mean(0)
        assert torch.allclose(p, mean, atol=1e-6)
    (place.folder / 'networks' / '3' / 'worker1.pt').unlink()
    trained = []
    fit = swap94.fit

    def counted(*args, **options):
        trained.append(args[3])
        return fit(*args, **options)

    monkeypatch.setattr(swap94, 'fit', counted)
    again, *_ = swap.train_swap(place, hyp, 3)
    assert trained == ['phase2']
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))


#### Tables ####


def test_the_table_tells_before_and_after_averaging(capsys):
    records = []
    for seed in range(3):
        for method, accuracy in zip(swap_tables.METHODS, (0.90, 0.88, 0.92)):
            cost = {'training_seconds': 2.0, 'pflop': 0.5, 'all_reduces': 8}
            workers = [0.87, 0.89 - 0.001 * seed**2] if method == 'swap' else []
            cell = {'cell': {'method': method}, 'seed': seed, 'workers': workers}
            records.append(cell | cost | {'val_acc': accuracy + 0.01 * seed**2})
    accuracies = swap_tables.accuracies_of(records)
    assert accuracies['SWAP, before averaging'] == pytest.approx([88, 87.95, 87.8])
    assert accuracies['SWAP, after averaging'] == pytest.approx([92, 93, 96])
    swap_tables.print_methods(records, accuracies, swap_tables.PUBLISHED[10])
    swap_tables.print_gains(accuracies)
    output = capsys.readouterr().out
    assert '93.67' in output and '95.23' in output and '+5.75' in output


#### Progress ####


def test_the_accuracies_on_the_way_are_those_of_shorter_trainings(place):
    """At the first point and at the last, they are those of phase 1 and of the whole run."""
    record = progress.train({'method': 'swap'}, 0, place)
    theirs = swap_tables.train({'method': 'swap'}, 0, place)
    assert record['steps'] == {'phase1': [0, 2, 4], 'phase2': [0, 2, 4]}
    assert [values[-1] for values in record['workers']] == theirs['workers']
    assert record['average'][-1] == pytest.approx(theirs['val_acc'], abs=0.004)
    assert np.array(record['workers']).shape == (3, 3) and len(record['phase1']) == 3
    assert record['phase1'][0] < record['phase1'][-1]
    rates = record['learning_rates']
    assert rates['phase1'][0] == 0.27 and rates['phase2'][0] == 0.06 and len(rates['phase2']) == 4


def test_a_phase_that_tau_ends_has_fewer_steps(place):
    hyp = place.settings['hyp']
    early = [*hyp['swap'], 'phase1.train_epochs=6', 'phase1.tau=0.01']
    place.settings = place.settings | {'hyp': hyp | {'swap': early}, 'points': 5}
    record = progress.train({'method': 'swap'}, 0, place)
    steps, rates = record['steps'], record['learning_rates']
    assert steps['phase1'] == [0, 2] and len(record['phase1']) == 2 and len(rates['phase1']) == 2
    assert steps['phase2'] == [0, 1, 2, 3, 4] and len(record['average']) == 5
    progress.show({}, [record | {'cell': {}, 'seed': seed} for seed in (0, 1)], place.folder)
    assert (place.folder / 'progress.png').stat().st_size > 10_000


def test_weights_are_copied_before_their_step():
    net = nn.Linear(2, 2)
    copies = []
    loss = progress.watched([1, 2], 2, copies)
    for call in range(6):  # three steps of two shards
        with torch.no_grad():
            net.weight.fill_(call)
        loss(net, torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), 0.0)
    assert [weights['weight'][0, 0].item() for weights in copies] == [2, 4]


def test_the_table_says_how_often_the_average_is_best(capsys):
    cell = {'steps': {'phase2': [0, 5, 9]}, 'workers': [[0.5, 0.6, 0.7], [0.5, 0.62, 0.68]]}
    progress.print_accuracies([cell | {'average': [0.5, 0.61, 0.72]}])
    output = capsys.readouterr().out
    assert 'better than every worker at 1 of 2 steps' in output
    assert '69.00' in output and '70.00' in output and '72.00' in output and 'nan' not in output


#### SWA ####


SEQUENCE = {0: 'phase1', 1: 0, 2: 1}


@pytest.mark.parametrize(
    'way, starts, seconds',
    [
        ('large-batch-swa', SEQUENCE, 13),
        ('large-then-small-swa', SEQUENCE, 13),
        ('small-batch-swa', SEQUENCE, 13),
        ('swap', dict.fromkeys(range(3), 'phase1'), 11),
        ('swap-longer', {0: 'phase1', 1: 0, 2: 'phase1', 3: 2, 4: 'phase1', 5: 4}, 12),
    ],
)
def test_each_cycle_starts_where_it_should(way, starts, seconds, place, monkeypatch):
    found = {}

    def train_phase1(*args):
        record = {'seconds': 10, 'steps': 4}
        return nn.Linear(2, 2), {'name': 'phase1', 'losses': torch.zeros(3), 'record': record}

    def train_worker(place, hyp, seed, worker, net, before):
        found[worker] = before['name']
        return {'name': worker, 'losses': torch.zeros(3), 'record': {'seconds': 1}}

    def measure(*args):
        return 0.5

    for function in (train_phase1, train_worker, measure):
        monkeypatch.setattr(swa, function.__name__, function)
    record = swa.train({'way': way}, 0, place)
    assert found == starts and len(record['networks']) == len(starts)
    assert record['training_seconds'] == seconds


def test_swa_of_one_cycle_each_is_swap(place):
    record = swa.train({'way': 'swap'}, 0, place)
    theirs = swap_tables.train({'method': 'swap'}, 0, place)
    assert record['networks'] == theirs['workers']
    assert record['val_acc'] == pytest.approx(theirs['val_acc'], abs=0.004)  # rounding of the mean


def test_large_batch_swa_keeps_to_large_batches():
    hyps = {name: override(swap94.hyp, own) for name, own in swap.AIRBENCH_SMALL.items()}
    hyp = swa.with_cycles(hyps, swa.WAYS['large-batch-swa'])
    assert hyp['phase2']['batch_size'] == hyp['phase1']['batch_size'] == 1000
    assert hyp['phase2']['workers'] == 8
    hyp = swa.with_cycles(hyps, swa.WAYS['swap-longer'])
    assert hyp['phase2']['batch_size'] == 125 and hyp['phase2']['train_epochs'] == 6
    epochs, rates = swa.rates(hyp, cycles=2)
    assert epochs[-1] == 8 + 6 + 6 and rates[101] == rates[202] == 0.06


def test_full_scale_compares_two_ways(tmp_path, capsys):
    settings = swa.SCALES['airbench']['full'] | {'net': 'airbench', 'runs': 2}
    accuracies = {'large-then-small-swa': 0.8, 'swap': 0.77}
    records = []
    for cell, seed in swa.plan(settings, []):
        accuracy = accuracies[cell['way']] + seed / 100
        record = {'val_acc': accuracy, 'networks': 2 * [accuracy - 0.01 - seed / 1000]}
        records.append({'cell': cell, 'seed': seed, 'training_seconds': 1, 'pflop': 2} | record)
    assert len(records) == 4
    swa.show({'settings': settings, 'data': {'classes': 10}}, records, tmp_path)
    output = capsys.readouterr().out
    assert 'small-batch-swa' not in output and '80.50 +-0.71' in output
    assert '-3.00' in output and 'swap ' not in output.partition('SWAP over SWA')[2]
    assert (tmp_path / 'swa.png').exists()


#### Planes ####


def vectors(*rows):
    return [torch.tensor(row) for row in rows]


def test_the_planes_basis_is_orthonormal():
    of_plane = plane.Plane(vectors([1.0, 0, 0, 0], [4.0, 0, 0, 0], [3.0, 5.0, 0, 0]))
    assert of_plane.u.tolist() == [1, 0, 0, 0] and of_plane.v.tolist() == [0, 1, 0, 0]
    assert of_plane.coordinates(torch.tensor([3.0, 5.0, 7.0, 0])) == [2, 5]
    assert of_plane.point(2, 5).tolist() == [3, 5, 0, 0]
    alphas, betas = of_plane.axes(3)
    assert alphas == pytest.approx([-2, 1.5, 5]) and betas == pytest.approx([-2, 2.5, 7])

    torch.manual_seed(0)
    of_plane = plane.Plane(list(torch.randn(3, 1000)))
    for vector in of_plane.vectors:
        again = of_plane.point(*of_plane.coordinates(vector))
        assert torch.allclose(again, vector.double(), atol=1e-9)
    assert abs(of_plane.u.dot(of_plane.v)) < 1e-12


@pytest.mark.parametrize('third', [[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
def test_networks_on_a_line_span_no_plane(third):
    with pytest.raises(UserError, match='on a line'):
        plane.Plane(vectors([1.0, 1.0], [2.0, 2.0], third))
    with pytest.raises(UserError, match='on a line'):
        plane.Plane(vectors([1.0, 1.0], [1.0, 1.0], third))


def test_a_barrier_is_above_both_ends():
    assert curves.barrier([5.0, 9.0, 7.0]) == 2
    assert curves.barrier([5.0, 6.0, 7.0]) == 0


def test_a_point_has_its_own_statistics(place):
    landscape.make_networks({'part': 'networks'}, 0, place)
    found = landscape.Networks(place, 0)
    middle = torch.lerp(found.vector('SGD1'), found.vector('OTHER'), 0.5)
    found.measure(middle)
    ours = {name: value.clone() for name, value in found.net.named_buffers()}
    assert torch.equal(swap94.flatten(found.net.parameters()), middle)
    loader = swap.loader_of(place, found.hyp)
    batches = [loader.normalize(images) for images in loader.images.split(160)]
    torch.optim.swa_utils.update_bn(batches, found.net)
    for name, value in found.net.named_buffers():
        assert torch.allclose(ours[name].float(), value.float(), atol=1e-5), name


@pytest.fixture
def saved(digits, tmp_path):
    """Networks that --save wrote, with an unusual mean of the pixels. The last one is wider."""
    image_set = dataclasses.replace(digits, mean=(0.25, 0.25, 0.25))
    files = [tmp_path / f'{seed}.pt' for seed in range(4)]
    for seed, file in enumerate(files):
        hyp = override(swap94.hyp, [*swap.NARROW, f'net.widths.block1={8 + seed // 3}'])
        save_network(file, swap94.make_net(hyp, 10, seed=seed, **CPU), swap94, hyp, image_set)
    return [str(file) for file in files]


def test_three_saved_networks_have_a_plane(saved, tmp_path, monkeypatch):
    seen = []

    def measure(self, vector):
        seen.extend(loader.mean.tolist() for loader in self.loaders)
        return {'train_acc': 0.5, 'val_acc': 0.05 * len(seen) % 1}

    monkeypatch.setattr(landscape.Networks, 'measure', measure)
    call = [*saved[:3], '--scale', 'smoke', '--data', 'digits', '--out', str(tmp_path / 'out')]
    assert common.run_study(smoke.study_of('landscape'), [*call, '--device', 'cpu']) == 0
    assert (tmp_path / 'out' / 'plane-given.png').stat().st_size > 10_000
    records = common.read_cells(tmp_path / 'out')
    marks = common.in_cell(records, part='networks')[0]['networks']
    assert marks['A']['given'] == [0, 0] and marks['B']['given'][1] == pytest.approx(0, abs=1e-6)
    assert len(common.in_cell(records, part='given')) == 4
    assert all(mean == 3 * [255 / 4] for mean in seen)  # normalized as when they were trained


def test_a_mistake_with_networks_is_one_line(saved, tmp_path, capsys):
    def says(*files):
        call = [*files, '--scale', 'smoke', '--data', 'digits', '--device', 'cpu']
        out = tmp_path / f'out{len(list(tmp_path.iterdir()))}'
        assert common.run_study(smoke.study_of('landscape'), [*call, '--out', str(out)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith('studies.landscape: ')
        return error

    first, second, _, wider = saved
    assert 'give all of A, B, C' in says(first, second)
    assert 'on a line' in says(first, second, first)
    assert 'network C and the first are of different kinds' in says(first, second, wider)
    assert 'there is no such file' in says(first, second, str(tmp_path / 'missing.pt'))


#### Cosine ####


def test_the_cosine_of_a_way_down_the_gradient_is_one():
    net = swap94.make_net(override(swap94.hyp, swap.NARROW), 10, seed=0, **CPU)
    inputs, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
    loss, _ = swap94.compute_loss(net, inputs, labels, 0.0)
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named])
    down = {name: (p - g).detach() for (name, p), g in zip(named, gradients)}
    up = {name: (p + g).detach() for (name, p), g in zip(named, gradients)}
    cosines = []
    for target in (down, up):
        cosine.watched(target, cosines)(net, inputs, labels, 0.0)
    assert cosines == pytest.approx([1, -1], abs=1e-4)


def test_the_workers_are_watched_on_the_way_that_they_went(place):
    record = cosine.train({'method': 'swap'}, 0, place)
    theirs = swap_tables.train({'method': 'swap'}, 0, place)
    assert record['workers'] == theirs['workers'] and record['val_acc'] == theirs['val_acc']
    assert np.array(record['cosines']).shape == (3, 4)
    assert np.isfinite(record['cosines']).all()
