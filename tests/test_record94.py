"""records/94.py: Muon, growing images, the choice of the hardest, and what a run costs."""

import functools
import json
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NARROW, ONE_THREAD, ROOT, TINY, call, figures, load_log
from PIL import Image
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from trajectory94 import FILE, trajectory

record94 = import_module('records.94')
FLOAT64 = {'device': torch.device('cpu'), 'dtype': torch.float64}
CLOSE = {'rtol': 1e-9, 'atol': 1e-9}


@pytest.fixture
def narrow():
    """The record's hyp with a narrow network, batches of 32 and three epochs."""
    return record94.override(record94.hyp, [*NARROW, 'opt.train_epochs=3'])


def make_loaders(folder, hyp, device='cpu', dtype=torch.float32):
    where = {'device': device, 'dtype': dtype}
    batch_size = hyp['opt']['batch_size']
    train_loader = record94.CifarLoader(folder, True, batch_size, hyp['aug'], **where)
    return train_loader, record94.CifarLoader(folder, False, **where)


def as_float64(values):
    return torch.tensor(values, dtype=torch.float64)


def gaussian(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize('shape', [(6, 6), (4, 30), (30, 4)])
def test_orthogonalize_keeps_the_singular_vectors(shape):
    matrix = gaussian(*shape)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    for steps in (3, 9):
        result = u.mT @ record94.orthogonalize(matrix, steps) @ vh.mT
        expected = values / values.norm()
        a, b, c = record94.NEWTON_SCHULZ
        for _ in range(steps):
            expected = a * expected + b * expected**3 + c * expected**5
        torch.testing.assert_close(result, torch.diag(expected), rtol=1e-6, atol=1e-6)
    assert expected.min() > 0.6 and expected.max() < 1.3  # all near 1


def test_matrices_of_a_stack_are_orthogonalized_each_alone():
    matrices = gaussian(3, 4, 10)
    stacked = record94.orthogonalize(matrices, 3)
    alone = torch.stack([record94.orthogonalize(matrix, 3) for matrix in matrices])
    torch.testing.assert_close(stacked, alone, **CLOSE)


def test_muon_is_its_definition_written_out(narrow):
    """Three steps, filter by filter, with singular value decompositions, and torch's own SGD."""
    narrow['opt']['schedule'] = {'start': 1.0, 'peak_at': 0.0, 'end': 1.0}
    net = record94.make_net(narrow, **FLOAT64)
    twin = record94.make_net(narrow, **FLOAT64)
    optimizer, scheduler = record94.make_optimizer(net, narrow, total_steps=3)
    opt = narrow['opt']
    decay = opt['weight_decay'] * opt['batch_size']
    others = [(p, opt['lr_biases']) for n, p in twin.named_parameters() if n.endswith('bias')]
    others.append((twin[7].weight, opt['lr_head']))
    groups = [{'params': [p], 'lr': lr, 'weight_decay': decay / lr} for p, lr in others]
    sgd = torch.optim.SGD(groups, momentum=opt['momentum'], nesterov=True)
    filters = [p for p in twin.parameters() if p.ndim == 4 and p.requires_grad]
    assert len(filters) == 6
    velocities = [torch.zeros_like(p) for p in filters]
    a, b, c = record94.NEWTON_SCHULZ
    for step in range(3):
        for i, (p, q) in enumerate(zip(net.parameters(), twin.parameters())):
            p.grad = gaussian(*p.shape, seed=100 * step + i)
            q.grad = p.grad.clone()
        optimizer.step()
        scheduler.step()
        sgd.step()
        for p, velocity in zip(filters, velocities):
            velocity.mul_(opt['filter_momentum']).add_(p.grad)
            direction = (p.grad + opt['filter_momentum'] * velocity).flatten(1)
            u, values, vh = torch.linalg.svd(direction, full_matrices=False)
            values = values / values.norm()
            for _ in range(opt['newton_schulz']):
                values = a * values + b * values**3 + c * values**5
            p.data *= len(p) ** 0.5 / p.data.norm()
            p.data -= opt['lr'] * (u @ torch.diag(values) @ vh).view(p.shape)
    for p, q in zip(net.parameters(), twin.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def conv_and_gradients(conv, x, filters, padding):
    """The outputs, and the gradients of a made-up loss: of maps, and of filters."""
    x = x.clone().requires_grad_()
    filters = filters.clone().requires_grad_()
    outputs = conv(x, filters, padding=padding)
    gradient = gaussian(*outputs.shape, seed=2).to(outputs)
    return outputs, *torch.autograd.grad(outputs, (x, filters), gradient)


# Those of the recipe, and others.
@pytest.mark.parametrize('size, taps, padding', [
    (7, 3, 1), (3, 3, 1), (1, 3, 1), (7, 2, 0), (3, 2, 0), (9, 2, 0), (6, 4, 0), (5, 1, 0),
])  # fmt: skip
def test_a_convolution_through_points_is_a_convolution(size, taps, padding):
    x = gaussian(5, 30, size, size)
    filters = gaussian(40, 30, taps, taps, seed=1) / 30
    expected = conv_and_gradients(F.conv2d, x, filters, padding)
    results = conv_and_gradients(record94.winograd_conv, x, filters, padding)
    for result, values in zip(results, expected):
        torch.testing.assert_close(result, values, **CLOSE)
    results = conv_and_gradients(record94.winograd_conv, x.float(), filters.float(), padding)
    for result, values in zip(results, expected):
        assert (result - values).norm() < 1e-4 * values.norm()


def test_only_small_maps_on_a_cpu_go_through_points(monkeypatch):
    sizes = []

    def note_size(x, filters, padding):
        sizes.append(x.shape[-1])
        return F.conv2d(x, filters, padding=padding)

    monkeypatch.setattr(record94, 'winograd_conv', note_size)
    net = record94.make_net(**FLOAT64)
    net(gaussian(2, 3, 32, 32))
    assert sizes == [7, 7, 3]
    sizes.clear()
    net(gaussian(2, 3, 16, 16))
    assert sizes == [7, 7, 3, 3, 1]
    sizes.clear()
    options = {'device': 'cpu', 'dtype': torch.bfloat16}
    record94.make_net(**options)(torch.zeros(2, 3, 16, 16))
    options = {'device': 'meta', 'dtype': torch.float32}
    record94.make_net(**options)(torch.empty(2, 3, 16, 16, device='meta'))
    assert sizes == []


def test_images_are_resized_as_pillow_does():
    images = gaussian(2, 3, 32, 32).float()
    assert record94.resize(images, 32) is images
    for size in (16, 20, 24):
        resized = record94.resize(images, size)
        assert resized.shape == (2, 3, size, size)
        for image, small in zip(images.flatten(0, 1), resized.flatten(0, 1)):
            by_pillow = Image.fromarray(image.numpy()).resize((size, size), Image.BILINEAR)
            np.testing.assert_allclose(small.numpy(), np.asarray(by_pillow), rtol=0, atol=1e-5)


def test_the_loader_serves_the_hardest_in_its_own_order(folder, narrow):
    train_loader, _ = make_loaders(folder, narrow)
    n = len(train_loader.labels)
    losses = gaussian(n).float()
    train_loader.epoch = 1
    draws = train_loader.draw(1)
    hardest = set(losses.topk(80).indices.tolist())
    expected = [place for place in draws['order'].tolist() if place in hardest]
    order = record94.serve_hardest(train_loader, losses, 80)
    assert order.tolist() == expected
    _, labels = next(iter(train_loader))
    assert torch.equal(labels, train_loader.labels[expected[:32]])
    # An epoch later, all draws are those of that epoch again.
    assert train_loader.epoch == 2
    order = record94.serve_hardest(train_loader, losses, n)
    assert torch.equal(order, train_loader.draw(2)['order'])


def test_training_leaves_out_what_it_knows(folder, narrow, monkeypatch):
    """The losses by which images are chosen are those of the outputs that training saw."""
    narrow['selection'] = {'from': 0.3, 'keep': 0.5}
    served = []
    chosen_by = []
    serve_hardest = record94.serve_hardest

    def recording_serve(loader, losses, n):
        chosen_by.append(losses.clone())
        served.append(serve_hardest(loader, losses, n))
        return served[-1]

    seen = []

    def recording_loss(net, inputs, labels, label_smoothing):
        loss, outputs = record94.compute_loss(net, inputs, labels, label_smoothing)
        seen.append(F.cross_entropy(outputs, labels, reduction='none'))
        return loss, outputs

    monkeypatch.setattr(record94, 'serve_hardest', recording_serve)
    train_loader, test_loader = make_loaders(folder, narrow)
    record94.train(train_loader, test_loader, narrow, compute_loss=recording_loss)
    assert [len(order) for order in served] == [200, 100, 100]
    first = torch.full((200,), torch.inf)
    first[served[0][: 6 * 32]] = torch.cat(seen[:6])
    assert torch.equal(chosen_by[1], first)
    assert first[served[1]].min() >= first.median()


def test_epochs_and_sizes_are_what_hyp_says(narrow):
    narrow['opt'] |= {'train_epochs': 3.5, 'batch_size': 100}
    narrow['selection'] = {'from': 0.5, 'keep': 0.3}
    assert record94.plan_epochs(1000, narrow) == [(1000, 10), (1000, 10), (300, 3), (300, 2)]
    narrow['selection']['keep'] = 0.0  # a batch is the least
    assert record94.plan_epochs(1000, narrow)[-1] == (100, 1)
    sizes = [record94.image_size(step, 10, {'size': 16, 'until': 0.3}) for step in range(10)]
    assert sizes == [16] * 3 + [32] * 7


def leave_whitening(layer, images, eps):
    pass


def test_pflop_is_what_torch_counts_in_a_run(folder, narrow, monkeypatch):
    """But for the whitening, which is a hundred-thousandth of a run at full width.

    Convolutions count by their definition.
    """
    monkeypatch.setattr(record94.Conv, 'forward', torch.nn.Conv2d.forward)
    train_loader, test_loader = make_loaders(folder, narrow)
    _, record = record94.train(train_loader, test_loader, narrow)
    assert 2 * 60 < record['views'] == 60 + 6 * 500  # all in doubt, in a batch of 500

    def count_nothing(*args):
        return 0.0  # to count, the script makes steps that are no part of a run

    def validate_nothing(*args, **options):
        return 0.0

    monkeypatch.setattr(record94, 'evaluate', validate_nothing)
    monkeypatch.setattr(record94, 'count_pflop', count_nothing)
    monkeypatch.setattr(record94, 'init_whitening_conv', leave_whitening)
    with FlopCounterMode(display=False) as counter:
        record94.train(train_loader, test_loader, narrow)
    assert record['pflop'] == pytest.approx(1e-15 * counter.get_total_flops(), rel=1e-9)


def test_only_doubtful_images_get_more_views(folder, narrow):
    _, loader = make_loaders(folder, narrow, dtype=torch.float64)
    net = record94.make_net(narrow, **FLOAT64)
    one_view = record94.infer(net, loader)
    six_views = record94.infer(net, loader, 2)
    largest = one_view.topk(2).values
    lead = largest[:, 0] - largest[:, 1]
    margin = lead.median().item()
    logits, views = record94.infer_in_doubt(net, loader, 2, margin)
    is_doubtful = lead < margin
    assert 0 < is_doubtful.sum() < 60 and views == 60 + 6 * 500
    torch.testing.assert_close(logits, torch.where(is_doubtful[:, None], six_views, one_view))
    assert torch.equal(record94.infer_in_doubt(net, loader, 0, margin)[0], one_view)
    logits, views = record94.infer_in_doubt(net, loader, 2, 0.0)
    assert torch.equal(logits, one_view) and views == 60


def test_fp16_training_step_leaves_nothing_on_the_cpu(folder):
    hyp = record94.override(record94.hyp, ['opt.batch_size=32'])
    options = {'device': 'meta', 'dtype': torch.float16}
    train_loader, test_loader = make_loaders(folder, hyp, **options)
    losses = torch.zeros(200, device='meta')
    record94.serve_hardest(train_loader, losses, 200)
    inputs, labels = next(iter(train_loader))
    net = record94.make_net(hyp, **options)
    optimizer, scheduler = record94.make_optimizer(net, hyp, total_steps=10)
    for size in (16, 32):
        small = record94.resize(inputs, size)
        assert small.dtype == torch.float16 and small.shape == (32, 3, size, size)
        loss, outputs = record94.train_step(net, optimizer, small, labels, 0.2)
        scheduler.step()
    assert outputs.shape == (32, 10) and outputs.dtype == torch.float16
    assert loss.dtype == torch.float32 and loss.device.type == 'meta'
    assert record94.infer(net, test_loader, tta_level=2).shape == (60, 10)


class CountLaunches(TorchDispatchMode):
    """Counts the operations that compute: those that are no views of what is there."""

    launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.launches += not function.is_view
        return result


def test_an_optimizer_step_launches_what_the_record_says():
    """295 with torch 2.14; other versions may write a few operations as more or fewer."""
    options = {'device': 'meta', 'dtype': torch.float16}
    net = record94.make_net(**options)
    optimizer, _ = record94.make_optimizer(net, record94.hyp, total_steps=10)
    trained = [p for p in net.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.empty_like(p)
    optimizer.step()
    with CountLaunches() as counter:
        optimizer.step()
    assert counter.launches < 320


def test_a_compiled_run_is_the_eager_one_with_a_graph_a_size(folder, narrow, monkeypatch):
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager'))
    torch._dynamo.reset()
    counters.clear()
    loaders = make_loaders(folder, narrow, dtype=torch.float64)
    faster = record94.compiled(narrow, **FLOAT64)
    record94.warm_up(*loaders, narrow, faster)
    graphs = counters['stats']['unique_graphs']
    net, record = record94.train(*loaders, narrow, **faster)
    assert counters['stats']['unique_graphs'] == graphs == 2 + 2  # sizes, and tests
    assert not counters['graph_break']
    eager_net, eager_record = record94.train(*loaders, narrow)
    for key, value in eager_net.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, **CLOSE)
    assert record['tta_val_acc'] == eager_record['tta_val_acc']


def test_the_recipe_is_the_one_of_the_golden_trajectory():
    golden = json.loads(FILE.read_text())
    del golden['torch']
    assert len(golden['losses']) > 20
    now = trajectory()
    assert now.keys() == golden.keys()
    for name, values in golden.items():
        if name != 'logits':
            torch.testing.assert_close(as_float64(now[name]), as_float64(values), **CLOSE)
    for level, logits in golden['logits'].items():
        torch.testing.assert_close(as_float64(now['logits'][level]), as_float64(logits), **CLOSE)


def test_two_processes_make_the_runs_of_one(folder, tmp_path):
    args = ['--data', folder, '--runs', 2, *TINY]
    assert call(*args, '--out', tmp_path / 'one', script=record94) == 0
    command = [sys.executable, ROOT / 'records' / '94.py', *args, '--out', tmp_path / 'two']
    command = [str(part) for part in command]
    with subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD) as process:
        assert subprocess.run(command, cwd=tmp_path, env=ONE_THREAD, timeout=200).returncode == 0
        assert process.wait(timeout=200) == 0
    by_one, by_two = load_log(tmp_path / 'one'), load_log(tmp_path / 'two')
    assert [figures(run) for run in by_one['runs']] == [figures(run) for run in by_two['runs']]
    assert all('mirror_val_acc' in run and run['pflop'] > 0 for run in by_one['runs'])
