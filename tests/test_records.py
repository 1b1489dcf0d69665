"""The records: Muon, Winograd, growing images, the hardest images, shortcuts, and whole runs."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NARROW, TEST_SET, TRAIN_SET
from PIL import Image
from record_trajectories import FOLDER, RECORDS, trajectory
from torch._dynamo.utils import counters

from kernels.bench import count_launches
from lab.options import override
from records import record94, record95

FLOAT64 = {'device': torch.device('cpu'), 'dtype': torch.float64}
CLOSE = {'rtol': 1e-9, 'atol': 1e-9}


@pytest.fixture
def narrow():
    """The record's hyp with a narrow network, batches of 32 and three epochs."""
    return override(record94.hyp, [*NARROW, 'opt.train_epochs=3'])


def make_loaders(hyp, device='cpu', dtype=torch.float32):
    return record94.make_loaders(TRAIN_SET, TEST_SET, hyp, device=device, dtype=dtype)


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
        [orthogonal] = record94.orthogonalize(matrix[None], steps)
        result = u.mT @ orthogonal @ vh.mT
        expected = values / values.norm()
        a, b, c = record94.NEWTON_SCHULZ
        for _ in range(steps):
            expected = a * expected + b * expected**3 + c * expected**5
        torch.testing.assert_close(result, torch.diag(expected), rtol=1e-6, atol=1e-6)
    assert expected.min() > 0.6 and expected.max() < 1.3  # all near 1


def test_the_matrices_of_a_stack_are_orthogonalized_separately():
    matrices = gaussian(3, 4, 10)
    stacked = record94.orthogonalize(matrices, 3)
    alone = torch.cat([record94.orthogonalize(matrix[None], 3) for matrix in matrices])
    torch.testing.assert_close(stacked, alone, **CLOSE)


def test_muon_is_its_definition_written_out(narrow):
    """Three steps, filter by filter, with singular value decompositions and torch's own SGD."""
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
    """The outputs, and a random loss's gradients with respect to the maps and the filters."""
    x = x.clone().requires_grad_()
    filters = filters.clone().requires_grad_()
    outputs = conv(x, filters, padding=padding)
    gradient = gaussian(*outputs.shape, seed=2).to(outputs)
    return outputs, *torch.autograd.grad(outputs, (x, filters), gradient)


# The recipe's and others.
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


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_resized_in_fp32(dtype):
    """torch has no antialiasing in bfloat16 on a CPU."""
    images = gaussian(2, 3, 32, 32).to(dtype)
    small = record94.resize(images, 16)
    assert small.dtype == dtype
    assert torch.equal(small, record94.resize(images.float(), 16).to(dtype))


def test_the_hardest_images_keep_their_order():
    losses = gaussian(200).float()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    hard = set(losses.topk(80).indices.tolist())
    expected = [place for place in order.tolist() if place in hard]
    assert record94.hardest(order, losses, 80).tolist() == expected
    assert torch.equal(record94.hardest(order, losses, 200), order)


def test_training_leaves_out_images_that_the_network_knows(narrow):
    """It knows those with small losses, without smoothing, when it last saw them."""
    narrow['selection'] = {'from': 0.3, 'keep': 0.5}
    train_loader, test_loader = make_loaders(narrow)
    train_loader.labels = torch.arange(200)  # so that we recognize the images
    narrow['opt']['label_smoothing'] = 0.4
    served, losses = [], []

    def recording_loss(net, inputs, labels, label_smoothing):
        assert label_smoothing == 0.4
        loss, outputs = record94.compute_loss(net, inputs, labels % 10, label_smoothing)
        outputs = torch.cat((outputs, torch.zeros(len(outputs), 190)), 1)
        served.append(labels)
        losses.append(F.cross_entropy(outputs, labels, reduction='none'))
        return loss, outputs

    record94.train(train_loader, test_loader, narrow, compute_loss=recording_loss)
    assert [len(labels) for labels in served] == 12 * [32]  # 6, 3 and 3 steps
    last_seen = torch.full((200,), torch.inf)
    for first, end in ((0, 6), (6, 9)):
        last_seen[torch.cat(served[first:end])] = torch.cat(losses[first:end])
        hard = last_seen.topk(100).indices
        assert set(torch.cat(served[end : end + 3]).tolist()) < set(hard.tolist())


def test_epochs_and_image_sizes_are_what_hyp_says(narrow):
    narrow['opt'] |= {'train_epochs': 3.5, 'batch_size': 100}
    narrow['selection'] = {'from': 0.5, 'keep': 0.3}
    assert record94.plan_epochs(1000, narrow) == [(1000, 10), (1000, 10), (300, 3), (300, 2)]
    narrow['selection']['keep'] = 0.0  # at least a batch
    assert record94.plan_epochs(1000, narrow)[-1] == (100, 1)
    sizes = [record94.image_size(step, 10, {'size': 16, 'until': 0.3}) for step in range(10)]
    assert sizes == [16] * 3 + [32] * 7


def test_only_uncertain_images_get_more_views(narrow):
    _, loader = make_loaders(narrow, dtype=torch.float64)
    net = record94.make_net(narrow, **FLOAT64)
    one_view = record94.infer(net, loader)
    six_views = record94.infer(net, loader, 2)
    largest = one_view.topk(2).values
    lead = largest[:, 0] - largest[:, 1]
    margin = lead.median().item()
    logits, views = record94.infer_with_tta_where_uncertain(net, loader, 2, margin)
    is_uncertain = lead < margin
    assert 0 < is_uncertain.sum() < 60 and views == 60 + 6 * 500
    torch.testing.assert_close(logits, torch.where(is_uncertain[:, None], six_views, one_view))
    logits, views = record94.infer_with_tta_where_uncertain(net, loader, 0, margin)
    assert torch.equal(logits, one_view) and views == 60
    logits, views = record94.infer_with_tta_where_uncertain(net, loader, 2, 0.0)
    assert torch.equal(logits, one_view) and views == 60


def test_a_run_learns_is_recorded_and_repeats_to_the_last_bit(narrow):
    narrow['opt']['train_epochs'] = 8.5
    rows = []
    net, record = record94.train(*make_loaders(narrow), narrow, 3, rows.append)
    assert record['seed'] == 3 and 'failed' not in record
    assert min(record['tta_val_acc'], record['mirror_val_acc'], record['val_acc']) > 0.3
    assert record['views'] in (60, 60 + 6 * 500)  # in batches of 500
    assert rows == record['epochs'] and [row['epoch'] for row in rows] == list(range(1, 10))
    again, _ = record94.train(*make_loaders(narrow), narrow, 3, net=net)
    assert again is net
    other, _ = record94.train(*make_loaders(narrow), narrow, 3)
    for key, value in other.state_dict().items():
        assert torch.equal(net.state_dict()[key], value)


@pytest.mark.parametrize('recipe', RECORDS.values(), ids=RECORDS)
def test_a_run_in_bfloat16_on_a_cpu(recipe):
    narrow = override(recipe.hyp, [*NARROW, 'opt.train_epochs=1'])
    train_loader, test_loader = make_loaders(narrow, dtype=torch.bfloat16)
    train_loader.images, train_loader.labels = [v[:64] for v in TRAIN_SET]
    net, record = recipe.train(train_loader, test_loader, narrow)
    assert 'failed' not in record and record['views'] >= 60
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_a_network_that_has_seen_no_mirrored_images_is_tested_without_them(narrow):
    narrow['aug']['flip'] = False
    narrow['opt']['train_epochs'] = 1
    _, record = record94.train(*make_loaders(narrow), narrow)
    assert record['val_acc'] == record['mirror_val_acc'] == record['tta_val_acc']
    assert record['views'] == 60


def test_a_loss_that_is_not_finite_ends_the_run(narrow):
    narrow['opt']['lr_head'] = 1e30
    _, record = record94.train(*make_loaders(narrow), narrow)
    assert record['failed'].startswith('the loss is nan at step ')
    assert record['tta_val_acc'] is None and record['epochs'] == []


def test_images_that_do_not_fill_a_batch_are_an_error(narrow):
    narrow['opt']['batch_size'] = 201
    with pytest.raises(ValueError, match='200 images are less than a batch of 201'):
        record94.train(*make_loaders(narrow), narrow)


@pytest.mark.parametrize('recipe', RECORDS.values(), ids=RECORDS)
def test_fp16_training_step_leaves_nothing_on_the_cpu(recipe):
    hyp = override(recipe.hyp, ['opt.batch_size=32'])
    options = {'device': 'meta', 'dtype': torch.float16}
    train_loader, test_loader = make_loaders(hyp, **options)
    draws = train_loader.next_draws()
    draws['order'] = recipe.hardest(draws['order'], torch.zeros(200, device='meta'), 100)
    inputs, labels = next(train_loader.batches(draws))
    net = recipe.make_net(hyp, **options)
    optimizer, scheduler = recipe.make_optimizer(net, hyp, total_steps=10)
    for size in (16, 32):
        small = recipe.resize(inputs, size)
        assert small.dtype == torch.float16 and small.shape == (32, 3, size, size)
        loss, outputs, losses = recipe.train_step(net, optimizer, inputs, labels, size, 0.2)
        scheduler.step()
    assert outputs.shape == (32, 10) and outputs.dtype == torch.float16
    assert losses.shape == (32,) and losses.device.type == 'meta'
    assert loss.dtype == torch.float32 and loss.device.type == 'meta'
    weights = [value for value in net.state_dict().values() if value.is_floating_point()]
    recipe.update_averages([weight.clone() for weight in weights], weights, 0.8)
    assert recipe.infer(net, test_loader, tta_level=2).shape == (60, 10)


def test_a_step_launches_what_the_readme_says():
    """With torch 2.14; other versions may need a few launches more or less."""
    options = {'device': 'meta', 'dtype': torch.float16}
    net = record94.make_net(**options)
    optimizer, _ = record94.make_optimizer(net, record94.hyp, total_steps=10)
    for group in optimizer.param_groups:
        group['foreach'] = True  # the default on CUDA
    inputs = torch.empty(8, 32, 32, 3, dtype=torch.float16, device='meta').permute(0, 3, 1, 2)
    labels = torch.empty(8, dtype=torch.int64, device='meta')
    step = functools.partial(record94.train_step, net, optimizer, inputs, labels, 20, 0.2)
    step()  # which makes the momenta
    assert count_launches(step) == pytest.approx(199, abs=6)
    assert count_launches(optimizer.step) == pytest.approx(115, abs=5)


def test_the_average_moves_in_lists_of_one_dtype(monkeypatch):
    """torch is slow on mixed lists."""
    calls = []
    lerp_lists = torch._foreach_lerp_

    def checked_lerp(averages, weights, share):
        calls.append({tensor.dtype for tensor in [*averages, *weights]})
        lerp_lists(averages, weights, share)

    monkeypatch.setattr(torch, '_foreach_lerp_', checked_lerp)
    dtypes = [torch.float16, torch.float32, torch.float16]
    weights = [torch.full((3,), i + 1, dtype=dtype) for i, dtype in enumerate(dtypes)]
    averages = [torch.zeros_like(weight) for weight in weights]
    record94.update_averages(averages, weights, decay=0.75)
    assert [average[0].item() for average in averages] == [0.25, 0.5, 0.75]
    assert [weight[0].item() for weight in weights] == [1, 2, 3]
    assert calls == [{torch.float16}, {torch.float32}]


def test_a_compiled_run_is_the_eager_one_with_a_graph_per_size(narrow, monkeypatch):
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager'))
    torch._dynamo.reset()
    counters.clear()
    loaders = make_loaders(narrow, dtype=torch.float64)
    faster = record94.fast_path(loaders[0], narrow)
    record94.warm_up(*loaders, narrow, faster)
    graphs = counters['stats']['unique_graphs']
    net, record = record94.train(*loaders, narrow, **faster)
    assert counters['stats']['unique_graphs'] == graphs == 2 + 2  # training and test sizes
    assert not counters['graph_break']
    eager_net, eager_record = record94.train(*loaders, narrow)
    for key, value in eager_net.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, **CLOSE)
    assert record['tta_val_acc'] == eager_record['tta_val_acc']


def test_a_shortcut_skips_all_but_the_first_convolution():
    net = record95.make_net(override(record95.hyp, NARROW), **FLOAT64)
    whiten, gelu, block, *_ = net
    first, activ, residual, _ = block
    maps = gelu(whiten(gaussian(4, 3, 32, 32)))
    skipped = activ(first(maps))
    convs = [layer.conv for layer in residual if not isinstance(layer, torch.nn.SiLU)]
    assert len(convs) == 2 and not torch.allclose(block(maps), F.silu(skipped))
    for conv in convs:
        conv.weight.data.zero_()
    torch.testing.assert_close(block(maps), F.silu(skipped), **CLOSE)


@pytest.mark.parametrize(('depth', 'residual'), [(2, True), (3, False), (4, True)])
def test_a_block_is_as_deep_as_hyp_says_with_or_without_a_shortcut(depth, residual):
    changes = [*NARROW, f'net.depth={depth}', f'net.residual={residual}']
    net = record95.make_net(override(record95.hyp, changes), **FLOAT64)
    for block in list(net)[2:5]:
        assert sum(isinstance(module, torch.nn.Conv2d) for module in block.modules()) == depth
        assert any(isinstance(module, record95.Residual) for module in block) == residual


@pytest.mark.parametrize('name', RECORDS)
def test_the_recipe_is_the_one_of_the_golden_trajectory(name):
    golden = json.loads((FOLDER / f'{name}.json').read_text())
    del golden['torch']
    assert len(golden['losses']) > 20
    now = trajectory(RECORDS[name])
    assert now.keys() == golden.keys()
    for name, values in golden.items():
        if name != 'logits':
            torch.testing.assert_close(as_float64(now[name]), as_float64(values), **CLOSE)
    for level, logits in golden['logits'].items():
        torch.testing.assert_close(as_float64(now['logits'][level]), as_float64(logits), **CLOSE)
