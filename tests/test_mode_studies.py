"""Curves, SVCCA, warmup and distillation, compared with what is known or done by hand."""

import numpy as np
import pytest
import smoke
import torch
import torch.nn.functional as F
from sklearn.cross_decomposition import CCA
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import airbench94
from lab.data import load_set
from lab.errors import UserError
from lab.networks import save_network
from lab.options import override
from studies import (
    common,
    connectivity,
    curves,
    distill,
    networks,
    restarts,
    sgd,
    similarity,
    svcca,
    warmup,
)

CPU = {'device': 'cpu', 'dtype': torch.float32}
DIGITS = load_set('digits', airbench94)


def make_place(folder, study, net):
    return common.Place(smoke.settings_of(study.STUDY.name, net), folder, DIGITS, **CPU)


def digits(train=True, n=100):
    """A loader of n digits, in batches of 20."""
    images, labels = DIGITS.train if train else DIGITS.test
    options = {'train': train, 'mean': DIGITS.mean, 'std': DIGITS.std} | CPU
    return airbench94.CifarLoader(images[:n], labels[:n], 20, **options)


#### Networks ####


def settings_of(net, share, dropout=0.0):
    return {'net': net, 'share': share, 'dropout': dropout}


@pytest.mark.parametrize(
    'name, layers, parameters',  # layers with those of the shortcuts
    [('vgg16', 16, 15_245_130), ('vgg16-bn', 16, 15_253_578), ('vgg11', 11, 9_750_922),
     ('resnet18', 21, 11_173_962), ('resnet32', 34, 466_906)],
)  # fmt: skip
def test_networks_are_like_the_papers(name, layers, parameters):
    net = networks.make_network(settings_of(name, 1.0), digits(), seed=0)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(similarity.layers_of(net)) == layers
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_initial_weights_have_the_given_variance():
    for variance in (2.0, 6.0):
        net = networks.make_vgg(16, share=0.5, variance=variance, seed=0, **CPU)
        layer = net[0][10]
        assert layer.weight.var().item() * layer.weight[0].numel() == pytest.approx(
            variance, rel=0.05
        )
        assert not layer.bias.any()
    again = networks.make_vgg(16, share=0.5, variance=6.0, seed=0, **CPU)
    assert torch.equal(again[0][10].weight, layer.weight)


def test_vgg_drops_inputs_of_its_first_two_linear_layers():
    net, plain = [networks.make_vgg(16, dropout=p, share=0.125, seed=0, **CPU) for p in (0.5, 0)]
    kinds = [type(layer).__name__ for layer in list(net)[2:]]
    assert kinds == ['Dropout', 'Linear', 'ReLU', 'Dropout', 'Linear', 'ReLU', 'Linear']
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters()))


def test_dropout_draws_from_the_loaders_seed():
    trained = []
    for _ in range(2):
        net = networks.make_vgg(11, dropout=0.5, share=0.0625, seed=0, **CPU)
        sgd.train_by_steps(net, digits(), 0.01, 1)
        trained.append(net)
    first, again = [list(net.parameters()) for net in trained]
    assert all(torch.equal(p, q) for p, q in zip(first, again))


def test_airbenchs_network_gets_whitened():
    loader = digits()
    net = networks.make_network(settings_of('airbench', 0.125), loader, seed=0)
    first = net[0].weight
    assert torch.equal(first[:12], -first[12:]) and not first.requires_grad


@pytest.mark.parametrize('share', [0.0625, 0.125])
def test_narrow_resnets_train_without_harm(share):
    net = networks.make_resnet(32, share=share, seed=0, **CPU)
    images = torch.randn(20, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        net(images).sum().backward()


#### Training ####


def test_rates_of_step_decay_and_of_restarts():
    share = sgd.step_decay(10, 20)
    rates = [share(step) for step in range(200)]
    assert rates[59] == 1 and rates[60] == 0.2
    assert rates[120] == pytest.approx(0.04) and rates[199] == pytest.approx(0.008)

    settings = {'first_period': 10, 'drops': [60, 150]}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.05)
    scheduler = restarts.make_scheduler('sgdr', optimizer, settings, steps=4)
    rates = []
    for _ in range(155 * 4):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    peaks = [i / 4 for i, rate in enumerate(rates) if rate == 0.05]
    assert peaks == [0, 10, 30, 70, 150]
    assert rates[50 * 4] == pytest.approx((0.05 + 1e-6) / 2) and rates[-21] < 1e-4


def test_training_that_diverges_is_a_mistake():
    net = networks.make_vgg(11, share=0.0625, seed=0, **CPU)
    optimizer = torch.optim.SGD(net.parameters(), 1e12)
    with pytest.raises(UserError, match='diverges: the loss is nan'):
        sgd.train(net, digits(), optimizer, LambdaLR(optimizer, lambda step: 1), 2)


def train_vgg(looks):
    """The weights of a VGG-11; looks: a list for the steps after which we evaluate it, or None."""
    net = networks.make_vgg(11, batchnorm=True, dropout=0.5, share=0.0625, seed=0, **CPU)
    optimizer = sgd.make_sgd(net, 0.01)

    def look(step):
        net.eval()
        looks.append(step)

    on_step = None if looks is None else look
    scheduler = LambdaLR(optimizer, lambda step: 1)
    sgd.train(net, digits(), optimizer, scheduler, 2, on_step=on_step)
    return net.state_dict()


def test_looking_after_each_step_changes_nothing():
    looks = []
    plain, looked_at = train_vgg(None), train_vgg(looks)
    assert looks == list(range(1, 11))
    assert all(torch.equal(plain[name], looked_at[name]) for name in plain)


#### Curves ####


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 10))


def two_ends():
    nets = [small_net(), small_net()]
    nn.init.normal_(nets[1][1].weight, std=0.1)
    return nets[0], [curves.parameters_of(net) for net in nets]


@pytest.mark.parametrize('kind', curves.KINDS)
def test_a_curves_ends_are_its_networks_and_a_middle_bend_is_the_segment(kind):
    net, (first, last) = two_ends()
    curve = curves.new_curve(first, last, net, kind)
    for t in (0, 0.2, 0.5, 0.9, 1):
        for name, value in curve.weights(t).items():
            expected = (1 - t) * first[name] + t * last[name]
            assert torch.allclose(value, expected, atol=1e-6)
    for name in curve.bend:
        curve.bend[name] = curve.bend[name] + 1
    for t, end in ((0, first), (1, last)):
        assert all(torch.equal(value, end[name]) for name, value in curve.weights(t).items())
    # At t = 0.5 a chain is its bend, and a Bezier curve half of it.
    share = 1.0 if kind == 'chain' else 0.5
    middle = curve.weights(0.5)['1.weight'] - (first['1.weight'] + last['1.weight']) / 2
    assert torch.allclose(middle, torch.full_like(middle, share), atol=1e-6)


@pytest.mark.parametrize('kind, strength', [('chain', 3), ('bezier', 7.5)])
def test_weight_decay_at_points_is_weaker_than_at_bends(kind, strength):
    bend = {'a': torch.ones(5, requires_grad=True)}
    curve = curves.Curve({'a': torch.zeros(5)}, {'a': torch.zeros(5)}, bend, kind)
    places = np.linspace(0, 1, 1001)
    sum(curves.decay(curve.weights(t)) for t in places).backward()
    at_bend = sgd.WEIGHT_DECAY * bend['a'].detach()
    assert torch.allclose(bend['a'].grad / len(places) * strength, at_bend, rtol=0.01)


@pytest.mark.parametrize('kind', curves.KINDS)
def test_training_a_curve_lowers_its_barrier_and_leaves_its_ends(kind):
    loader = digits(n=200)
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
    sgd.train(net, loader, optimizer, LambdaLR(optimizer, sgd.step_decay(10, 60)), 60)
    # The same network, with its hidden units in another order.
    first = curves.parameters_of(net)
    last = {name: p.roll(3, dims=0) for name, p in first.items()}
    last['3.weight'] = first['3.weight'].roll(3, dims=1)
    last['3.bias'] = first['3.bias']
    ends = [first, last]
    curve = curves.new_curve(*ends, net, kind)
    tests = digits(train=False)
    before = curves.measure_curve(curve, net, (loader, tests), 9)
    curves.train_curve(curve, net, loader, lr=0.02, epochs=40)
    after = curves.measure_curve(curve, net, (loader, tests), 9)
    barriers = [
        curves.barrier(curves.values_of(points, 'train_loss')) for points in (before, after)
    ]
    assert barriers[0] > 1 and barriers[1] < 0.3 * barriers[0]
    for at in (0, -1):
        assert before[at]['train_loss'] == pytest.approx(after[at]['train_loss'], rel=1e-5)


def test_a_point_is_measured_with_its_own_statistics(tmp_path):
    place = make_place(tmp_path, connectivity, 'vgg16-bn')
    loaders = sgd.loaders_of(place, 20)
    net = networks.make_network(place.settings, loaders[0], seed=0)
    weights = curves.parameters_of(net)
    before = curves.measure(net, weights, *loaders)
    with torch.no_grad():
        for name, value in net.named_buffers():
            if 'running' in name:
                value.fill_(7.0)
    assert curves.measure(net, weights, *loaders) == before


def test_given_networks_are_joined(tmp_path, folder, capsys):
    hyp = override(airbench94.hyp, [f'net.widths.block{i}=8' for i in (1, 2, 3)])
    files = []
    for seed in (0, 1):
        net = airbench94.make_net(hyp, 10, seed=seed, **CPU)
        files.append(str(tmp_path / f'{seed}.pt'))
        save_network(tmp_path / f'{seed}.pt', net, airbench94, hyp, DIGITS)
    out = tmp_path / 'out'
    call = [*files, '--scale', 'smoke', '--data', 'digits', '--device', 'cpu', '--out', str(out)]
    assert common.run_study(smoke.study_of('connectivity'), call) == 0
    curves = common.in_cell(common.read_cells(out), part='curve')
    assert {record['cell']['pair'] for record in curves} == {'AB'} and len(curves) == 2
    assert common.run_study(smoke.study_of('svcca'), [*call[:-1], str(tmp_path / 'alike')]) == 0
    assert (tmp_path / 'alike' / 'svcca.png').stat().st_size > 10_000
    assert 'two networks  noise\n' in capsys.readouterr().out
    [record] = common.read_cells(tmp_path / 'alike')
    similar, noise = [np.array(record[key]['two networks']) for key in ('similarities', 'noise')]
    assert similar.shape == noise.shape and (noise > 0).all() and (noise < 0.5).all()
    call = ['--out', str(tmp_path / 'other'), '--data', str(folder), '--device', 'cpu', *files]
    assert common.run_study(smoke.study_of('connectivity'), call) == 2
    assert 'its classes are not those of the set' in capsys.readouterr().err
    assert common.run_study(smoke.study_of('connectivity'), call[:-1]) == 2
    assert '1 networks: give all of A, B, or none' in capsys.readouterr().err


def test_barriers_are_means_of_each_seeds_pairs():
    def curve(pair, seed, height):
        points = [{'val_acc': acc, 'train_loss': 0} for acc in (0.9, 0.8 - height, 0.8)]
        cell = {'part': 'curve', 'pair': pair, 'kind': 'chain'}
        return {'cell': cell, 'seed': seed, 'curves': [points]}

    records = [curve('GB', 1, 0.5), curve('GA', 1, 0.3), curve('GA', 0, 0.1)]
    found = connectivity.mean_barriers(records, 'val_acc', 0, 'chain')
    assert found == pytest.approx([10, 40])


#### SVCCA ####


def alike(x, y):
    return similarity.similarity(similarity.layer_of(x), similarity.layer_of(y))


def test_svcca_does_not_see_rotations_and_scales():
    torch.manual_seed(0)
    x = torch.randn(300, 12) @ torch.randn(12, 12)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12))
    assert alike(x, x @ rotation) == pytest.approx(1)
    assert alike(x, 3 * x + 5) == pytest.approx(1)
    maps = torch.randn(100, 6, 5, 5)
    mixed = torch.einsum('nchw,cd->ndhw', maps, rotation[:6, :6])
    assert alike(maps, maps[:, torch.randperm(6)] * 2) == pytest.approx(1)
    assert alike(maps, mixed) == pytest.approx(1)
    assert alike(maps, maps.roll((1, 2), (2, 3))) == pytest.approx(1)  # a shift turns phases alone


def test_svcca_of_noise_is_at_chance():
    torch.manual_seed(1)
    n, k = 4000, 10
    x, y = torch.randn(n, k), torch.randn(n, k)
    # The squares of the correlations have the mean k / n.
    found = similarity.correlations(similarity.principal(x, 1.0), similarity.principal(y, 1.0))
    assert (found**2).mean().item() == pytest.approx(k / n, rel=0.3)
    assert alike(torch.randn(1000, 4, 6, 6), torch.randn(1000, 4, 6, 6)) < 0.15


def test_correlations_are_scikit_learns():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((400, 5))
    y = x @ rng.standard_normal((5, 3)) + 2 * rng.standard_normal((400, 3))
    cca = CCA(3, max_iter=5000, tol=1e-10).fit(x, y)
    theirs = [np.corrcoef(a, b)[0, 1] for a, b in zip(*(part.T for part in cca.transform(x, y)))]
    parts = [similarity.principal(torch.from_numpy(part), 1.0) for part in (x, y)]
    assert similarity.correlations(*parts)[:3].tolist() == pytest.approx(theirs, abs=1e-6)


def test_directions_have_99_percent_of_the_variance():
    torch.manual_seed(3)
    x = torch.randn(5000, 3) * torch.tensor([10.0, 1.2, 0.1])  # shares of 98.6%, 1.4%, 0.01%
    directions, needed = similarity.principal(x)
    assert needed == 2 and not directions[:, 2].any()
    assert torch.allclose(directions[:, :2].T @ directions[:, :2], torch.eye(2), atol=1e-4)


@pytest.mark.parametrize('size', [1, 2, 4, 5, 8])
def test_frequencies_of_small_maps_are_among_those_of_large_ones(size):
    found = similarity.frequencies(size)
    assert set(found) <= set(similarity.frequencies(2 * size)) & set(
        similarity.frequencies(2 * size + 1)
    )
    # With their conjugates, these are all frequencies.
    every = {(a % size, b % size) for a, b in found} | {(-a % size, -b % size) for a, b in found}
    assert len(every) == size**2


def test_layers_of_different_sizes_are_compared_by_their_lowest_frequencies():
    torch.manual_seed(4)
    wide = torch.zeros(200, 4, 8, 8, dtype=torch.complex128)
    small = torch.fft.fft2(torch.randn(200, 4, 3, 3).double())
    for a, b in [(a, b) for a in (0, 1, -1) for b in (0, 1, -1)]:
        wide[:, :, a, b] = small[:, :, a, b]
    maps = torch.fft.ifft2(wide).real
    assert alike(torch.fft.ifft2(small).real, maps) == pytest.approx(1, abs=1e-6)
    means = maps.mean((2, 3))
    assert alike(means, maps) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize('n, features, expected', [(2000, 64, 0.15), (2000, 512, 0.43)])
def test_the_noise_floor_is_the_similarity_of_independent_noise(n, features, expected):
    torch.manual_seed(6)
    first, second = [similarity.layer_of(torch.randn(n, features)) for _ in range(2)]
    found = similarity.noise_floors({'a': first}, {'b': second}, 0)
    assert found == [[pytest.approx(expected, abs=0.01)]]
    assert similarity.similarity(first, second) == pytest.approx(expected, abs=0.01)
    assert found == similarity.noise_floors({'a': first}, {'b': second}, 0)
    assert found != similarity.noise_floors({'a': first}, {'b': second}, 1)


def test_the_noise_floor_is_that_of_the_directions_that_a_layer_has():
    torch.manual_seed(7)
    narrow = similarity.layer_of(torch.randn(1000, 4) @ torch.randn(4, 100))
    maps = similarity.layer_of(torch.randn(1000, 4, 5, 5))
    layers = {'narrow': narrow, 'maps': maps}
    found = similarity.noise_floors(layers, layers, 0)
    assert narrow.needed.tolist() == [4] and set(maps.needed.tolist()) == {4}
    assert np.array(found) == pytest.approx(0.054, abs=0.02)


def test_a_constant_layer_has_no_directions():
    torch.manual_seed(8)
    n = 200
    constants = torch.randn(64), torch.randn(6, 5, 5), torch.randn(6, 5, 5), torch.randn(6, 8, 8)
    same = [similarity.layer_of(values.expand(n, *values.shape).clone()) for values in constants]
    assert not any(layer.needed.any() for layer in same)
    layers = dict(enumerate([*same, similarity.layer_of(torch.randn(n, 6, 5, 5))]))
    found = np.array(similarity.similarities(layers, layers))
    assert found[-1, -1] == pytest.approx(1)
    found[-1, -1] = 0
    assert not found.any()
    # Maps that are the same everywhere only have the frequency 0.
    flat = similarity.layer_of(torch.randn(n, 6, 1, 1).expand(n, 6, 5, 5).clone())
    assert flat.needed[0] == 6 and not flat.needed[1:].any()


def test_svcca_refuses_few_images():
    torch.manual_seed(9)
    for shape in ((360, 512), (20, 64), (1, 64), (20, 64, 4, 4)):
        with pytest.raises(UserError, match='too few for SVCCA'):
            similarity.layer_of(torch.randn(shape))
    x = torch.randn(20, 10)
    vary_alike, _ = torch.linalg.qr(x - x.mean(0))  # in all of their 10 directions
    assert similarity.layer_of(vary_alike).needed.tolist() == [10]
    with pytest.raises(UserError, match='a layer has 10 directions, and there are 19 test images'):
        similarity.layer_of(vary_alike[:19])


def test_the_layer_with_too_few_images_is_named():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 30 * 30, 30))
    line = r'layer 2 \(2\) has 2\d directions, and there are 40 test images, too few for SVCCA'
    with pytest.raises(UserError, match=line):
        similarity.observe(net, torch.randn(40, 3, 32, 32))


@pytest.mark.parametrize(
    'study, cell',
    [(svcca, {'part': 'pair'}), (warmup, {'training': 'lb'}), (distill, {'part': 'students'}),
     (restarts, {'part': 'training', 'schedule': 'sgdr'})],
)  # fmt: skip
def test_too_few_images_are_refused_before_training(study, cell, tmp_path, monkeypatch):
    def step(*args, **options):
        raise AssertionError('it trains')

    monkeypatch.setattr(torch.optim.SGD, 'step', step)
    place = make_place(tmp_path, study, next(iter(study.STUDY.scales)))
    place.settings['compared'] = 3
    with pytest.raises(UserError, match='3 test images, too few for SVCCA'):
        study.STUDY.train(cell, 0, place)


def test_convolutions_are_compared_before_their_relu():
    net = networks.make_vgg(16, share=0.0625, seed=0, **CPU)  # its ReLUs overwrite their inputs
    assert net[0][1].inplace
    x = torch.randn(100, 3, 32, 32)
    layers = similarity.observe(net, x)
    with torch.no_grad():
        for name, module in net[0].named_children():
            x = module(x)
            if isinstance(module, nn.Conv2d):
                expected = similarity.layer_of(x.clone())
                assert torch.equal(layers[f'0.{name}'].directions, expected.directions)


#### Warmup ####


def test_the_rate_rises_and_drops():
    settings = {'warm_up': 2, 'drops': [4, 6]}
    share = warmup.rate_share(settings, steps=10, has_warmup=True)
    assert share(0) == 0.05 and share(9) == 0.5 and share(19) == share(39) == 1
    assert share(40) == 0.1 and share(60) == pytest.approx(0.01)
    assert warmup.rate_share(settings, 10, has_warmup=False)(0) == 1


@pytest.mark.parametrize('name, expected', [('sb', [0, 2, 10]), ('lb', [0, 2, 4])])
def test_small_batches_are_compared_after_as_many_steps(name, expected, tmp_path, monkeypatch):
    place = make_place(tmp_path, warmup, 'vgg11-bn')  # 2 large batches an epoch, or 5 small ones
    seen, steps = [], [0]

    def pretend_to_train(net, loader, optimizer, scheduler, epochs, on_step, on_epoch):
        for step in range(1, epochs * len(loader) + 1):
            steps.append(step)
            on_step(step)

    monkeypatch.setattr(sgd, 'train', pretend_to_train)
    monkeypatch.setattr(warmup, 'observe', lambda net, images: seen.append(steps[-1]) or {})
    warmup.train({'training': name}, 0, place)
    assert seen == expected


@pytest.mark.parametrize('net', ['vgg11', 'resnet18'])
def test_a_frozen_head_stays_and_then_learns(net, tmp_path, monkeypatch):
    place = make_place(tmp_path, warmup, net)
    heads = []
    train_as_ever = sgd.train

    def train(net, loader, optimizer, scheduler, epochs, on_step, on_epoch):
        def look(epoch):
            heads.append([p.detach().clone() for p in warmup.head_of(net)])
            on_epoch(epoch)

        look(0)
        train_as_ever(net, loader, optimizer, scheduler, epochs, on_step=on_step, on_epoch=look)

    monkeypatch.setattr(sgd, 'train', train)
    record = warmup.train({'training': 'lb-frozen'}, 0, place)
    assert [moved == 0 for moved in record['moved']] == record['is_head']
    start, warm, end = heads
    assert len(start) == (6 if net == 'vgg11' else 2)
    assert all(torch.equal(a, b) for a, b in zip(start, warm))
    assert not any(torch.equal(a, b) for a, b in zip(warm, end))


#### Distillation ####


def test_distillations_gradient_does_not_shrink_with_the_temperature():
    torch.manual_seed(5)
    inputs = torch.randn(200, 10)
    noise = 0.01 * torch.randn(200, 10)

    def teacher(x):
        return x + noise

    gradients = []
    for temperature in (20.0, 40.0):
        logits = inputs.clone().requires_grad_()
        loss = distill.distillation(teacher, temperature)(nn.Identity(), logits, None)
        loss.backward()
        gradients.append(logits.grad)
    # At high temperatures it is (logits - teacher's logits) / (images * classes).
    centred = noise - noise.mean(1, keepdim=True)
    assert torch.allclose(gradients[1], -centred / (200 * 10), rtol=0.2, atol=1e-6)
    norms = [gradient.norm().item() for gradient in gradients]
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_a_student_like_its_teacher_has_no_loss_and_a_sure_teacher_is_like_labels():
    logits, labels = torch.randn(30, 10), torch.arange(30) % 10
    loss = distill.distillation(nn.Identity(), 5.0)
    assert loss(nn.Identity(), logits, labels).item() == pytest.approx(0, abs=1e-6)

    def sure_teacher(inputs):
        return 1e4 * F.one_hot(labels, 10).float()

    # With a teacher that is sure, at temperature 1, it is the labels' cross-entropy.
    loss = distill.distillation(sure_teacher, 1.0)
    expected = F.cross_entropy(logits, labels).item()
    assert loss(nn.Identity(), logits, labels).item() == pytest.approx(expected, rel=1e-4)


def test_students_can_see_plain_images_and_their_training_accuracy_is_measured(
    tmp_path, monkeypatch
):
    place = make_place(tmp_path, distill, 'vgg16-bn')
    place.settings['student_augmented'] = False
    shifts = []

    def train_by_steps(net, loader, *args):
        shifts.append(loader.aug['translate'])

    monkeypatch.setattr(sgd, 'train_by_steps', train_by_steps)
    record = distill.train({'part': 'students'}, 0, place)
    assert shifts == [4, 0, 0]
    student = networks.make_student(10, share=place.settings['student_share'], seed=0, **CPU)
    images = place.training_loader(20)
    accuracy = airbench94.evaluate(student, images)
    assert record['labels']['train_acc'] == record['teacher']['train_acc'] == accuracy
