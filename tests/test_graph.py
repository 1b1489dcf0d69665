"""Graphed steps train as eager ones do. Without a GPU, a "graph" calls the function again."""

from contextlib import contextmanager
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from conftest import NARROW, TEST_SET, TRAIN_SET
from torch.optim import sgd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import airbench94
import swap94
from kernels import GraphedStep, compiled, flip_crop, graph, mean
from lab.options import override
from lab.training import is_kernel
from records import record94

FLOAT64 = {'device': torch.device('cpu'), 'dtype': torch.float64}
CLOSE = {'rtol': 1e-9, 'atol': 1e-9}
SETTINGS = {
    airbench94: [*NARROW, 'opt.train_epochs=1.5', 'opt.whiten_bias_epochs=1', 'net.tta_level=0'],
    record94: [*NARROW, 'opt.train_epochs=2', 'growth.until=0.5', 'net.tta_level=0'],
}
each_recipe = pytest.mark.parametrize('recipe', SETTINGS, ids=['airbench94', 'record94'])


class Capture:
    """Stands in for CUDA graphs: it warms up, and a replay calls the function again."""

    def __init__(self):
        self.count = 0

    def __call__(self, function):
        self.count += 1
        for _ in range(graph.WARM_UP_STEPS):
            function()
        return function


class StaleCapture(Capture):
    """A replay returns what the last warm-up step did, and changes nothing."""

    def __call__(self, function):
        super().__call__(function)
        results = function()

        def replay():
            return results

        return replay


def copy_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


class Trainings:
    """Runs of a recipe with a narrow network in float64, eager or graphed."""

    def __init__(self, recipe, capture):
        self.recipe = recipe
        self.hyp = override(recipe.hyp, SETTINGS[recipe])
        self.loaders = recipe.make_loaders(TRAIN_SET, TEST_SET, self.hyp, **FLOAT64)
        net = recipe.make_net(self.hyp, 10, **FLOAT64)
        step = GraphedStep(recipe.train_step, recipe.make_optimizer, capture)
        self.graphed = {'net': net, 'fused': True, 'train_step': step}
        self.graphed['make_optimizer'] = step.make_optimizer

    def run(self, seed, faster):
        net, record = self.recipe.train(*self.loaders, self.hyp, seed, **faster)
        return copy_of(net), [row['train_loss'] for row in record['epochs']]

    def assert_equal(self, seed):
        torch.testing.assert_close(self.run(seed, self.graphed), self.run(seed, {}), **CLOSE)


@each_recipe
def test_graphed_training_is_the_eager_one_run_after_run(recipe):
    """Also where a graph is recorded in the middle of a run, as in the first one here."""
    capture = Capture()
    trainings = Trainings(recipe, capture)
    trainings.assert_equal(seed=0)
    assert capture.count == 2  # the whitening bias is trained, and it is not
    for seed in (1, 0):
        trainings.assert_equal(seed)
    assert capture.count == 2


@each_recipe
def test_the_warm_up_records_all_that_a_run_needs(recipe):
    capture = Capture()
    trainings = Trainings(recipe, capture)
    recipe.warm_up(*trainings.loaders, trainings.hyp, trainings.graphed)
    assert capture.count == 2
    trainings.run(0, trainings.graphed)
    assert capture.count == 2


def test_a_graph_of_a_compiled_step_trains_its_own_variant():
    """torch 2.11 would go on training a bias that is frozen by now, without our setting."""
    torch._dynamo.reset()
    trainings = Trainings(airbench94, Capture())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
        trainings.graphed['compute_loss'] = compiled(airbench94.compute_loss)
    trainings.assert_equal(seed=0)


@each_recipe
def test_a_graph_that_does_nothing_is_noticed(recipe):
    trainings = Trainings(recipe, StaleCapture())
    with pytest.raises(AssertionError):
        trainings.assert_equal(seed=0)


def test_other_settings_and_other_networks_are_recorded_anew():
    capture = Capture()
    trainings = Trainings(airbench94, capture)
    trainings.assert_equal(seed=0)
    trainings.hyp['opt']['weight_decay'] *= 100
    trainings.assert_equal(seed=0)
    trainings.hyp['opt']['label_smoothing'] = 0.0
    trainings.assert_equal(seed=0)
    trainings.graphed['net'] = airbench94.make_net(trainings.hyp, 10, **FLOAT64)
    trainings.assert_equal(seed=0)
    assert capture.count == 4 * 2


def test_a_graph_is_no_triton_kernel():
    """Otherwise `lab run --compile --kernels off` would go without it."""
    step = GraphedStep(airbench94.train_step, airbench94.make_optimizer, Capture())
    assert not is_kernel(step) and not is_kernel(step.make_optimizer)
    assert is_kernel(flip_crop) and is_kernel(mean)


def test_results_stay_as_they_are():
    """The next replay must not overwrite a loss that training still needs."""
    results = [torch.zeros(1)]

    def count(net, value):
        results[0] += value
        return results

    step = GraphedStep(count, capture=Capture())
    net = torch.nn.Linear(1, 1)
    first, second = (step(net, torch.ones(1)) for _ in range(2))
    assert second[0] - first[0] == 1


def test_what_a_graph_cannot_change_is_another_variant():
    capture = Capture()
    net = torch.nn.BatchNorm2d(3)

    def normalize(net, inputs):
        return [net(inputs).detach()]

    step = GraphedStep(normalize, capture=capture)
    inputs = torch.randn(4, 3, 8, 8)
    step(net, inputs)
    net.eval()
    [normalized] = step(net, inputs)
    assert torch.equal(normalized, net(inputs))
    net.weight.data = 2 * net.weight.data  # in another place
    [doubled] = step(net, inputs)
    assert torch.equal(doubled, net(inputs)) and capture.count == 3


def test_a_bias_may_be_frozen_in_one_run_and_train_in_the_next():
    trainings = Trainings(airbench94, Capture())
    for epochs in (0, 1, 2):
        trainings.hyp['opt']['whiten_bias_epochs'] = epochs
        trainings.assert_equal(seed=0)


def test_parameters_that_train_again_get_another_optimizer():
    net = airbench94.make_net(override(airbench94.hyp, NARROW), **FLOAT64)
    step = GraphedStep(airbench94.train_step, airbench94.make_optimizer, Capture())
    head = net[7].weight
    counts = []
    for trains in (True, False, True):
        head.requires_grad = trains
        optimizer, _ = step.make_optimizer(net, airbench94.hyp, 10)
        counts.append(sum(len(group['params']) for group in optimizer.param_groups))
    assert counts[0] == counts[2] == counts[1] + 1
    assert len(step.optimizers) == 2


@each_recipe
def test_a_network_whose_run_was_interrupted_trains_its_whitening_bias(recipe):
    trainings = Trainings(recipe, Capture())
    net = trainings.graphed['net']
    net[0].bias.requires_grad = False
    expected = trainings.run(0, {})
    torch.testing.assert_close(trainings.run(0, {'net': net}), expected, rtol=0, atol=0)


def test_a_capture_that_fails_changes_no_weights():
    net = airbench94.make_net(override(airbench94.hyp, NARROW), **FLOAT64)
    before = copy_of(net)

    def fail(function):
        function()
        raise KeyboardInterrupt

    step = GraphedStep(airbench94.train_step, airbench94.make_optimizer, fail)
    optimizer, _ = step.make_optimizer(net, airbench94.hyp, 10)
    inputs = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(KeyboardInterrupt):
        step(net, optimizer, inputs, torch.zeros(8, dtype=torch.int64), 0.2)
    torch.testing.assert_close(copy_of(net), before, rtol=0, atol=0)


def test_graphed_swap_is_the_eager_one():
    settings = [
        'net.widths.block1=8', 'net.widths.block2=16', 'net.widths.block3=16',
        'phase1.train_epochs=2', 'phase1.batch_size=48', 'phase1.shards=2',
        'phase1.growth.until=0.5', 'phase2.workers=2', 'phase2.train_epochs=2',
        'phase2.batch_size=32', 'statistics.batch_size=64',
    ]  # fmt: skip
    hyp = override(swap94.hyp, settings)
    loaders = swap94.make_loaders(TRAIN_SET, TEST_SET, hyp, **FLOAT64)
    capture = Capture()
    graphed = {
        'net': swap94.make_net(hyp, 10, **FLOAT64),
        'compute_gradient': GraphedStep(swap94.compute_gradient, capture=capture),
    }
    graphed['net'][0].bias.requires_grad = False  # as if a run had been interrupted
    for seed in (0, 1):
        expected, _ = swap94.train(*loaders, hyp, seed)
        net, _ = swap94.train(*loaders, hyp, seed, **graphed)
        torch.testing.assert_close(copy_of(net), copy_of(expected), **CLOSE)
    assert capture.count == 3  # two sizes of images in phase 1, one in phase 2


#### As on a GPU ###################################################################################


class Devices(TorchDispatchMode):
    """Collects the devices of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.found.add(value.device.type)
        return result


def nothing(*args, **kwargs):
    """What fused SGD computes on the meta device, where tensors have no contents."""


@pytest.fixture(scope='module')
def fused_sgd_on_meta():
    """Let the meta device take fused SGD, but only with learning rates that are tensors."""
    library = torch.library.Library('aten', 'IMPL')
    library.impl('_fused_sgd_.tensor_lr', nothing, 'Meta')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sgd, '_device_dtype_check_for_fused', nothing)
        yield
    library._destroy()


def make_batch(device):
    inputs = torch.empty(8, 32, 32, 3, dtype=torch.float16, device=device).permute(0, 3, 1, 2)
    return inputs, torch.zeros(8, dtype=torch.int64, device=device)


@pytest.mark.parametrize(
    ('recipe', 'args', 'shapes'),
    [
        (airbench94, [0.2], [(), (8, 10)]),
        (record94, [20, 0.2], [(), (8, 10), (8,)]),
        (record94, [32, 0.2], [(), (8, 10), (8,)]),
    ],
)
def test_a_graphed_step_in_fp16_stays_on_its_device(recipe, args, shapes, fused_sgd_on_meta):
    """On the meta device, which raises an error if a step needs a value, as .item() does."""
    net = recipe.make_net(device='meta', dtype=torch.float16)
    step = GraphedStep(recipe.train_step, recipe.make_optimizer, Capture())
    optimizer, scheduler = step.make_optimizer(net, recipe.hyp, 10, fused=True)
    with Devices() as devices:
        results = step(net, optimizer, *make_batch('meta'), *args)
        scheduler.step()
    assert [tuple(result.shape) for result in results] == shapes
    assert devices.found == {'meta'}


def test_swaps_graphed_gradient_in_fp16_stays_on_its_device():
    net = swap94.make_net(device='meta', dtype=torch.float16)
    step = GraphedStep(swap94.compute_gradient, capture=Capture())
    with Devices() as devices:
        gradient, totals, losses = step(net, *make_batch('meta'), 20, 0.2)
    assert gradient.numel() == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert totals.shape == (2,) and losses.shape == (8,)
    assert devices.found == {'meta'}


@pytest.mark.skipif(torch.cuda.is_available(), reason='pretends that there is a GPU')
@pytest.mark.parametrize('recipe', [airbench94, record94, swap94])
def test_on_a_gpu_the_fast_path_has_graphs(recipe, monkeypatch):
    monkeypatch.setattr(graph, 'CudaGraphs', Mock())
    net = recipe.make_net(device='meta', dtype=torch.float16)
    monkeypatch.setattr(recipe, 'make_net', Mock(return_value=net))
    loader = Mock(device=torch.device('cuda'), dtype=torch.float16, augment=recipe.augment)
    faster = recipe.fast_path(loader, recipe.hyp)
    assert faster['net'] is net and faster['fused']
    if recipe is swap94:
        assert faster['compute_gradient'].train_step is swap94.compute_gradient
    else:
        assert faster['train_step'].train_step is recipe.train_step
        assert faster['make_optimizer'] == faster['train_step'].make_optimizer


def test_learning_rates_on_the_device_are_the_schedulers():
    net = airbench94.make_net(**FLOAT64)
    optimizer, scheduler = airbench94.make_optimizer(net, airbench94.hyp, 7)
    step = GraphedStep(airbench94.train_step, airbench94.make_optimizer, Capture())
    for _ in range(2):
        graphed, rates = step.make_optimizer(net, airbench94.hyp, 7)
        optimizer, scheduler = airbench94.make_optimizer(net, airbench94.hyp, 7)
        for _ in range(7):
            for group, expected in zip(graphed.param_groups, optimizer.param_groups, strict=True):
                assert group['lr'].shape == () and group['lr'].item() == expected['lr']
            rates.step()
            optimizer.step()
            scheduler.step()


class FakeCuda:
    """Stands in for torch.cuda, and writes down what is called, in which stream."""

    def __init__(self):
        self.calls = []
        self.where = 'outside'

    def note(self, *call):
        self.calls.append((self.where, *call))

    def step(self):
        self.note('step')
        return ['loss']

    @contextmanager
    def stream(self, stream):
        self.where = stream.name
        yield
        self.where = 'outside'

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.note('capture', graph, pool)
        with self.stream(stream):
            yield


class FakeStream:
    def __init__(self, name, cuda):
        self.name = name
        self.cuda = cuda

    def wait_stream(self, other):
        self.cuda.note(f'{self.name} waits for {other.name}')


def test_a_capture_is_warmed_up_in_its_stream_and_all_share_one_pool(monkeypatch):
    cuda = FakeCuda()
    outside = FakeStream('outside', cuda)
    graphs = [Mock(), Mock()]
    names = {
        'Stream': Mock(return_value=FakeStream('side', cuda)),
        'current_stream': Mock(return_value=outside),
        'graph_pool_handle': Mock(side_effect=['pool', 'another pool']),
        'CUDAGraph': Mock(side_effect=graphs),
        'stream': cuda.stream,
        'graph': cuda.graph,
    }
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = graph.CudaGraphs()
    replays = [recorder.capture(cuda.step) for _ in graphs]
    once = [('outside', 'side waits for outside')]
    once += 3 * [('side', 'step')]
    once += [('outside', 'outside waits for side')]
    expected = []
    for recorded in graphs:
        expected += [*once, ('outside', 'capture', recorded, 'pool'), ('side', 'step')]
    assert cuda.calls == expected
    assert replays[1]() == ['loss']
    assert [recorded.replay.call_count for recorded in graphs] == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@each_recipe
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_cuda_graphs_train_as_eager_mode_does(recipe, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    hyp = override(recipe.hyp, SETTINGS[recipe])
    loaders = recipe.make_loaders(TRAIN_SET, TEST_SET, hyp, device='cuda', dtype=dtype)
    step = GraphedStep(recipe.train_step, recipe.make_optimizer)
    graphed = {'net': recipe.make_net(hyp, 10, device='cuda', dtype=dtype), 'fused': True}
    graphed |= {'train_step': step, 'make_optimizer': step.make_optimizer}
    recipe.warm_up(*loaders, hyp, graphed)
    variants = len(step.variants)
    assert variants == 2
    for seed in (0, 1, 0):
        _, eager = recipe.train(*loaders, hyp, seed, fused=True)
        _, record = recipe.train(*loaders, hyp, seed, **graphed)
        for row, expected in zip(record['epochs'], eager['epochs'], strict=True):
            tolerance = 0.05 if dtype == torch.float16 else 0.01
            assert row['train_loss'] == pytest.approx(expected['train_loss'], rel=tolerance)
    assert len(step.variants) == variants
