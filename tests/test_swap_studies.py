"""SWAP's studies: planes, networks and averages against what is known or made by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import airbench94
import swap94
from studies import common, cosine, landscape, networks, plane, swa, swap, swap_tables

CPU = {'device': 'cpu', 'dtype': torch.float32}


def make_place(folder, net='airbench', **settings):
    loaders = [airbench94.CifarLoader('digits', train, 100, **CPU) for train in (True, False)]
    smoke = swap.SETTINGS[net]['smoke'] | {'net': net, 'files': []} | settings
    return common.Place(smoke, folder, *loaders)


#### Settings and the network ####


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
    hyp = swap.hyp_of(swap.SETTINGS['resnet9']['paper'], method, classes)
    own = hyp[phase]
    assert (own['batch_size'], own['lr'], own['train_epochs'], own['tau']) == (
        batch_size, lr, epochs, tau,
    )  # fmt: skip
    rates = [swap94.learning_rate_share(step, epochs, own['schedule']) for step in range(epochs)]
    assert rates.index(max(rates)) == warm_up and max(rates) == 1
    assert hyp['opt']['momentum'] == 0.9 and hyp['opt']['weight_decay'] == 5e-4


def test_the_recipes_of_swap94_are_the_paper_scale_of_its_network():
    settings = swap.SETTINGS['airbench']['paper']
    assert swap.hyp_of(settings, 'swap', 10) == swap94.hyp
    large = swap94.override(swap94.hyp, swap94.METHODS['large-batch'])
    assert swap.hyp_of(settings, 'large-batch', 100) == large


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
    hyp = swap.hyp_of(swap.SETTINGS['resnet9']['smoke'], 'large-batch', 10)
    hyp = swap94.phase_settings(hyp, 'phase1')
    net = networks.make_resnet9(8, device='meta', dtype=dtype)
    optimizer, _ = swap.make_sgd(net, hyp, total_steps=2)
    inputs = torch.empty(8, 3, 32, 32, device='meta', dtype=dtype)
    labels = torch.empty(8, dtype=torch.int64, device='meta')
    shards = [(inputs, labels), (inputs, labels)]
    if dtype == torch.bfloat16:
        net.autocast = False  # torch.autocast has no meta device
        shards = [(x.float(), y) for x, y in shards]
    totals, losses = swap94.train_step(net, optimizer, shards, 0.0, swap94.Team())
    assert totals.device.type == losses.device.type == 'meta'


def test_a_step_of_resnet9_is_sgds_on_the_mean_loss():
    settings = swap.hyp_of(swap.SETTINGS['resnet9']['smoke'], 'small-batch', 10)
    hyp = swap94.phase_settings(settings, 'phase1')
    options = {'device': 'cpu', 'dtype': torch.float64}
    torch.manual_seed(0)
    inputs, labels = torch.randn(40, 3, 32, 32, dtype=torch.float64), torch.arange(40) % 10
    ours, theirs = [networks.make_resnet9(4, seed=1, **options) for _ in range(2)]
    optimizer, scheduler = swap.make_sgd(ours, hyp, total_steps=10)
    lr, decay = hyp['opt']['lr'], 5e-4
    sgd = torch.optim.SGD(theirs.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=decay)
    for step in range(2):
        swap94.train_step(ours, optimizer, [(inputs, labels)], 0.0, swap94.Team())
        scheduler.step()
        for group in sgd.param_groups:
            group['lr'] = lr * (1 - step / 10)
        sgd.zero_grad()
        F.cross_entropy(theirs(inputs), labels).backward()
        sgd.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-9)


def test_resnet9_is_trained_by_every_method_and_swap94_is_as_before(tmp_path):
    place = make_place(tmp_path, 'resnet9')
    before = swap94.make_net, swap94.make_optimizer, swap94.init_whitening_conv
    for method in swap_tables.METHODS:
        record = swap_tables.train({'method': method}, 0, place)
        assert 0 < record['val_acc'] < 1 and record['pflop'] > 0
        assert len(record['workers']) == (3 if method == 'swap' else 0)
    assert (swap94.make_net, swap94.make_optimizer, swap94.init_whitening_conv) == before


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
    swap_tables.print_table(accuracies, swap_tables.costs_of(records), swap_tables.PUBLISHED[10])
    output = capsys.readouterr().out
    assert '93.67' in output and '95.23' in output and '+5.75' in output


#### SWA ####


def test_every_way_averages_as_many_networks(tmp_path):
    place = make_place(tmp_path)
    counts = {}
    for name in swa.WAYS:
        record = swa.train({'way': name}, 0, place)
        counts[name] = len(record['networks'])
    assert counts.pop('swap-longer') == 6
    assert set(counts.values()) == {3}


def test_swa_of_one_cycle_each_is_swap(tmp_path):
    place = make_place(tmp_path)
    record = swa.train({'way': 'swap'}, 0, place)
    theirs = swap_tables.train({'method': 'swap'}, 0, place)
    assert record['networks'] == theirs['workers']
    assert record['val_acc'] == pytest.approx(theirs['val_acc'], abs=0.004)  # rounding of the mean


def test_large_batch_swa_keeps_to_large_batches():
    settings = swap.SETTINGS['airbench']['small']
    hyp = swa.hyp_of_way(settings, swa.WAYS['large-batch-swa'], 10)
    assert hyp['phase2']['batch_size'] == hyp['phase1']['batch_size'] == 1000
    hyp = swa.hyp_of_way(settings, swa.WAYS['swap-longer'], 10)
    assert hyp['phase2']['batch_size'] == 125 and hyp['phase2']['train_epochs'] == 6
    epochs, rates = swa.rates(hyp, cycles=2)
    assert epochs[-1] == 8 + 6 + 6 and rates[101] == rates[202] == 0.06


#### Planes ####


def vectors(*rows):
    return [torch.tensor(row) for row in rows]


def test_the_planes_basis_is_orthonormal():
    of_plane = plane.Plane(vectors([1.0, 0, 0, 0], [4.0, 0, 0, 0], [3.0, 5.0, 0, 0]))
    assert of_plane.u.tolist() == [1, 0, 0, 0] and of_plane.v.tolist() == [0, 1, 0, 0]
    assert of_plane.coordinates(torch.tensor([3.0, 5.0, 7.0, 0])) == [2, 5]
    assert of_plane.point(2, 5).tolist() == [3, 5, 0, 0]
    alphas, betas = of_plane.axes(3)
    assert alphas == pytest.approx([-1.2, 1.5, 4.2]) and betas == pytest.approx([-2, 2.5, 7])

    torch.manual_seed(0)
    of_plane = plane.Plane(list(torch.randn(3, 1000)))
    for vector in of_plane.vectors:
        again = of_plane.point(*of_plane.coordinates(vector))
        assert torch.allclose(again, vector.double(), atol=1e-9)
    assert abs(of_plane.u.dot(of_plane.v)) < 1e-12


@pytest.mark.parametrize('third', [[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
def test_networks_on_a_line_span_no_plane(third):
    with pytest.raises(common.UserError, match='lie on a line'):
        plane.Plane(vectors([1.0, 1.0], [2.0, 2.0], third))
    with pytest.raises(common.UserError, match='lie on a line'):
        plane.Plane(vectors([1.0, 1.0], [1.0, 1.0], third))


def test_a_barrier_is_above_both_ends():
    assert landscape.barrier([5.0, 9.0, 7.0]) == 2
    assert landscape.barrier([5.0, 6.0, 7.0]) == 0


def test_a_point_has_its_own_statistics(tmp_path):
    place = make_place(tmp_path)
    found = landscape.Networks(0, place)
    middle = torch.lerp(found.vectors['SGD1'], found.vectors['OTHER'], 0.5)
    found.measure(middle)
    ours = {name: value.clone() for name, value in found.net.named_buffers()}
    assert torch.equal(swap94.flatten(found.net.parameters()), middle)
    loader = swap.loader_of(place, found.hyp)
    batches = [loader.normalize(images) for images in loader.images.split(160)]
    torch.optim.swa_utils.update_bn(batches, found.net)
    for name, value in found.net.named_buffers():
        assert torch.allclose(ours[name].float(), value.float(), atol=1e-5), name


def save(path, seed):
    hyp = swap94.override(swap94.hyp, swap.NARROW)
    loader = airbench94.CifarLoader('digits', True, 100, **CPU)
    loader.set_statistics(3 * [0.25], 3 * [0.5])
    net = swap94.make_net(hyp, 10, seed=seed, **CPU)
    swap94.save_network(path, net, hyp, loader)
    return str(path)


def test_three_saved_networks_have_a_plane(tmp_path, monkeypatch):
    files = [save(tmp_path / f'{seed}.pt', seed) for seed in range(3)]
    seen = []

    def measure(self, vector):
        seen.extend(loader.mean for loader in self.loaders)
        return {'train_acc': 0.5, 'val_acc': 0.05 * len(seen) % 1}

    monkeypatch.setattr(landscape.Networks, 'measure', measure)
    call = [*files, '--scale', 'smoke', '--data', 'digits', '--out', str(tmp_path / 'out')]
    assert common.run_study(landscape.STUDY, [*call, '--device', 'cpu']) == 0
    assert (tmp_path / 'out' / 'plane-given.png').stat().st_size > 10_000
    records = common.read_cells(tmp_path / 'out')
    marks = common.in_cell(records, part='networks')[0]['networks']
    assert marks['A']['given'] == [0, 0] and marks['B']['given'][1] == pytest.approx(0, abs=1e-6)
    assert len(common.in_cell(records, part='given')) == 4
    assert all(mean == [0.25, 0.25, 0.25] for mean in seen)  # the images are normalized as saved


def test_mistakes_with_networks_are_told_in_one_line(tmp_path, capsys):
    def says(*files):
        call = [*files, '--scale', 'smoke', '--data', 'digits', '--device', 'cpu']
        out = tmp_path / f'out{len(list(tmp_path.iterdir()))}'
        assert common.run_study(landscape.STUDY, [*call, '--out', str(out)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith('studies.landscape: ')
        return error

    first, second = [save(tmp_path / f'{seed}.pt', seed) for seed in range(2)]
    assert 'give all of A, B, C' in says(first, second)
    assert 'lie on a line' in says(first, second, first)
    assert 'no such file' in says(first, second, str(tmp_path / 'missing.pt'))


#### Cosine ####


def test_the_cosine_of_a_way_down_the_gradient_is_one():
    hyp = swap94.override(swap94.hyp, swap.NARROW)
    net = swap94.make_net(hyp, 10, seed=0, **CPU)
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


def test_the_workers_are_watched_on_the_way_that_they_went(tmp_path):
    record = cosine.train({'method': 'swap'}, 0, make_place(tmp_path))
    theirs = swap_tables.train({'method': 'swap'}, 0, make_place(tmp_path))
    assert record['workers'] == theirs['workers'] and record['val_acc'] == theirs['val_acc']
    assert np.array(record['cosines']).shape == (3, 4)
    assert np.isfinite(record['cosines']).all()
