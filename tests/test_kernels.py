"""The kernels against plain torch, their properties, and what they refuse.

Without a GPU, Triton's interpreter runs them, on the CPU.
"""

import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import airbench94
import kernels
from kernels import bench, flip_crop, lookahead, mean, require, running_mean
from kernels.flip_crop import flip_crop_ref, triton
from kernels.weight_average import (
    BLOCK,
    _lerp_lists,
    _mean_lists,
    launch,
    lookahead_ref,
    make_table,
    mean_ref,
    running_mean_ref,
)

pytestmark = pytest.mark.skipif(triton is None, reason='needs Triton')

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
PIXEL_MEAN = torch.tensor([125.3, 123.0, 113.9], device=DEVICE)
PIXEL_SCALE = 1 / torch.tensor([63.0, 62.1, 66.7], device=DEVICE)
NORMALIZE = {'mean': PIXEL_MEAN, 'scale': PIXEL_SCALE, 'dtype': torch.float32}
AS_PIXELS = {  # leaves the pixels as they are
    'mean': torch.zeros(3, device=DEVICE),
    'scale': torch.ones(3, device=DEVICE),
    'dtype': torch.float32,
}
POISON = -77.0  # in memory that nothing may write to
few = settings(max_examples=20, deadline=None, derandomize=True)


#### flip_crop #####################################################################################


def draw(n, side, batch, seed, translate=None):
    """Images and the arguments of augment, with shifts up to translate, or up to all allowed."""
    g = torch.Generator().manual_seed(seed)
    if translate is None:
        translate = side - 1
    images = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=g)
    index = torch.randint(0, n, (batch,), generator=g)
    flip = torch.rand(batch, generator=g) < 0.5
    shift = torch.randint(-translate, translate + 1, (batch, 2), generator=g)
    corner = torch.randint(0, side, (batch, 2), generator=g)
    return [values.to(DEVICE) for values in (images, index, flip, shift, corner)]


def assert_within_a_unit(got, expected, *operands):
    """In the last place of the largest operand, or of the largest of the two themselves."""
    operands = operands or (got, expected)
    largest = torch.stack([operand.abs() for operand in operands]).amax(0)
    unit = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
    assert ((got - expected).abs() <= unit).all()


@few
@given(
    side=st.integers(1, 9),
    batch=st.integers(0, 5),
    cutout=st.integers(0, 9),
    seed=st.integers(0, 999),
)
def test_flip_crop_equals_the_scripts_augment_to_the_bit(side, batch, cutout, seed):
    arguments = draw(4, side, batch, seed)
    got = flip_crop(*arguments, size=cutout, **NORMALIZE)
    for plain in (airbench94.augment, flip_crop_ref):
        expected = plain(*arguments, size=cutout, **NORMALIZE)
        assert got.shape == expected.shape == (batch, 3, side, side)
        assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('side', 'cutout'), [(32, 0), (32, 12), (33, 5), (64, 0)])
def test_flip_crop_at_real_sizes(side, cutout, dtype):
    arguments = draw(9, side, 5, seed=side, translate=4)
    options = NORMALIZE | {'dtype': dtype}
    got = flip_crop(*arguments, size=cutout, **options)
    expected = airbench94.augment(*arguments, size=cutout, **options)
    assert got.dtype == dtype
    if dtype == torch.bfloat16:  # which the interpreter rounds towards zero
        assert_within_a_unit(got, expected)
    else:
        assert torch.equal(got, expected)


@few
@given(side=st.integers(1, 9), seed=st.integers(0, 999))
def test_flipping_twice_is_the_identity(side, seed):
    images, _, flip, shift, _ = draw(5, side, 5, seed)
    index = torch.arange(5, device=DEVICE)
    still = torch.zeros_like(shift)
    once = flip_crop(images, index, flip, still, **AS_PIXELS)
    once = once.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    twice = flip_crop(once, index, flip, still, **AS_PIXELS)
    assert torch.equal(twice, images.permute(0, 3, 1, 2).float())


@few
@given(side=st.integers(1, 9), seed=st.integers(0, 999))
def test_without_flip_and_shift_it_is_a_pure_copy(side, seed):
    images, index, flip, shift, _ = draw(5, side, 4, seed)
    no_flip = torch.zeros_like(flip)
    still = torch.zeros_like(shift)
    got = flip_crop(images, index, no_flip, still, **AS_PIXELS)
    assert torch.equal(got, images[index].permute(0, 3, 1, 2).float())


@pytest.mark.parametrize('side', [5, 11, 32])
def test_flip_crop_writes_its_batch_alone(side, monkeypatch):
    arguments = draw(4, side, 3, seed=1)
    size = 3 * side * side * 3
    memory = torch.full((200 + size + 200,), POISON, device=DEVICE)
    inside = memory[200 : 200 + size]

    def empty_inside(*shape, **options):
        return inside.view(shape)

    monkeypatch.setattr(torch, 'empty', empty_inside)
    flip_crop(*arguments, **NORMALIZE)
    monkeypatch.undo()
    assert (memory[:200] == POISON).all()
    assert (memory[200 + size :] == POISON).all()
    assert (inside != POISON).all()


IMAGES_LAST = torch.zeros(4, 3, 8, 8, dtype=torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ('change', 'complaint'),
    [
        ({'dtype': torch.float64}, 'dtype=torch.float64: must be'),
        ({'images': torch.zeros(4, 8, 8, dtype=torch.uint8)}, 'images: must have the shape'),
        ({'images': torch.zeros(4, 8, 8, 3)}, 'images: must be a torch.uint8'),
        ({'images': IMAGES_LAST}, 'images: must be contiguous'),
        ({'index': torch.zeros(3, dtype=torch.int32)}, 'index: must be a torch.int64'),
        ({'index': torch.tensor(0)}, r'index: must be a torch.int64 tensor of shape \(1,\)'),
        ({'flip': torch.zeros(2, dtype=torch.bool)}, r'flip: must be .* of shape \(3,\)'),
        ({'shift': torch.zeros(3, 2, dtype=torch.int64, device='meta')}, 'shift: must be'),
        ({'size': 3}, 'corner: must be'),
        ({'size': -1}, 'size=-1: must not be negative'),
        ({'mean': torch.zeros(1)}, r'mean: must be a torch.float32 tensor of shape \(3,\)'),
        ({'scale': torch.ones(3, dtype=torch.float64)}, 'scale: must be a torch.float32'),
    ],
)
def test_flip_crop_refuses_what_it_would_misread(change, complaint):
    images, index, flip, shift, _ = draw(4, 8, 3, seed=0)
    arguments = {'images': images, 'index': index, 'flip': flip, 'shift': shift} | NORMALIZE
    for name, value in change.items():
        if isinstance(value, torch.Tensor) and value.device.type == 'cpu':
            value = value.to(DEVICE)
        arguments[name] = value
    with pytest.raises(ValueError, match=complaint):
        flip_crop(**arguments)


#### weight_average ################################################################################

SHAPES = [(1,), (8,), (3, 5), (24, 3, 2, 2), (BLOCK + 1,), (2, BLOCK), (0,)]
a_form = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))
some_forms = st.lists(a_form, min_size=1, max_size=3)


def made_up(forms, seed):
    """Tensors of those (shape, dtype); filters are channels_last, as a network's."""
    tensors = []
    for i, (shape, dtype) in enumerate(forms):
        g = torch.Generator().manual_seed(seed + i)
        tensor = torch.randn(shape, generator=g).to(DEVICE, dtype)
        if len(shape) == 4:
            tensor = tensor.to(memory_format=torch.channels_last)
        tensors.append(tensor)
    return tensors


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


@few
@given(forms=some_forms, decay=st.sampled_from([0.0, 0.3, 0.77, 1.0]), seed=st.integers(0, 999))
def test_lookahead_equals_its_reference(forms, decay, seed):
    averages = made_up(forms, seed)
    weights = made_up(forms, seed + 500)
    old_averages = copies(averages)
    old_weights = copies(weights)
    expected = copies(averages)
    lookahead(averages, weights, decay)
    lookahead_ref(expected, copies(old_weights), decay)
    for i in range(len(forms)):
        assert_within_a_unit(averages[i], expected[i], old_averages[i], old_weights[i])
        assert torch.equal(averages[i], weights[i])
        if decay == 1:
            assert torch.equal(averages[i], old_averages[i])


@few
@given(forms=some_forms, n=st.integers(1, 9), seed=st.integers(0, 999))
def test_mean_equals_its_reference(forms, n, seed):
    networks = [made_up(forms, seed + 10 * i) for i in range(n)]
    averages = [torch.full_like(weight, POISON) for weight in networks[0]]
    expected = copies(averages)
    mean(averages, networks)
    mean_ref(expected, networks)
    for average, reference, *weights in zip(averages, expected, *networks):
        assert_within_a_unit(average, reference, *weights)
        stack = torch.stack(weights).double()
        error = (average - stack.mean(0)).abs()
        assert (error <= torch.finfo(average.dtype).eps * stack.abs().amax(0)).all()


@few
@given(forms=some_forms, n=st.integers(0, 9), seed=st.integers(0, 999))
def test_running_mean_equals_its_reference(forms, n, seed):
    averages = made_up(forms, seed)
    weights = made_up(forms, seed + 500)
    old_averages = copies(averages)
    old_weights = copies(weights)
    expected = copies(averages)
    running_mean(averages, weights, n)
    running_mean_ref(expected, old_weights, n)
    for i in range(len(forms)):
        assert_within_a_unit(averages[i], expected[i], old_averages[i], weights[i])
        assert torch.equal(weights[i], old_weights[i])


@few
@given(forms=some_forms, n=st.integers(1, 9))
def test_the_mean_of_equal_networks_is_that_network(forms, n):
    network = made_up(forms, seed=n)
    averages = [torch.full_like(weight, POISON) for weight in network]
    mean(averages, (iter(network) for _ in range(n)))  # what can be read once is enough
    for average, weight in zip(averages, network):
        assert torch.equal(average, weight)


# Also where a tensor does not begin at a multiple of 16 bytes, or ends inside one.
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    ('first', 'n'), [(16, 8), (16, 11), (3, 8), (16, BLOCK), (16, BLOCK + 3), (1, BLOCK + 8)]
)
def test_averaging_writes_its_tensors_alone(first, n, dtype):
    size = first + n + 100
    poisons = (-77, -99)  # not one: the average of equal numbers would be that number again
    memories = [torch.full((size,), poison, dtype=dtype, device=DEVICE) for poison in poisons]
    average, weight = (memory[first : first + n] for memory in memories)
    average.fill_(1.0)
    weight.fill_(3.0)
    lookahead([average], [weight], 0.5)
    mean([average], [[average], [weight]])
    running_mean([average], [weight], 1)
    for memory, poison in zip(memories, poisons):
        assert (memory[:first] == poison).all()
        assert (memory[first : first + n] == 2).all()
        assert (memory[first + n :] == poison).all()


class FakeKernel:
    """Takes a launch as a kernel does, and keeps its options."""

    def __getitem__(self, grid):
        return self.run

    def run(self, table, **options):
        self.options = options


@pytest.mark.parametrize(
    ('first', 'n', 'is_aligned'), [(16, 8, True), (16, 11, False), (3, 8, False)]
)
def test_kernels_are_told_that_memory_is_aligned_only_where_it_is(first, n, is_aligned):
    """The interpreter would not notice, and a GPU would fail or read another place."""
    kernel = FakeKernel()
    aligned = torch.zeros(8, device=DEVICE)
    tensor = torch.zeros(first + n, device=DEVICE)[first:]
    launch(kernel, [[aligned, tensor], [aligned, tensor]])
    assert kernel.options['ALIGNED'] == is_aligned


def lookahead_half(averages, weights):
    lookahead(averages, weights, 0.5)


def mean_of_two(averages, weights):
    mean(averages, [averages, weights])


def running_mean_of_two(averages, weights):
    running_mean(averages, weights, 1)


each_average = pytest.mark.parametrize(
    'average', [lookahead_half, mean_of_two, running_mean_of_two]
)


FILTERS = torch.zeros(2, 3, 4, 4, device=DEVICE)


@each_average
@pytest.mark.parametrize(
    ('tensor', 'complaint'),
    [
        (FILTERS[:1], 'shapes .* differ'),
        (FILTERS.double(), 'torch.float32 and torch.float64; must be equal'),
        (FILTERS.to('meta'), 'on .* and meta'),
        (FILTERS.to(memory_format=torch.channels_last), 'both must be contiguous'),
        (FILTERS.transpose(2, 3), 'both must be contiguous'),
    ],
)
def test_tensors_that_do_not_match_are_named(average, tensor, complaint):
    bias = torch.zeros(4, device=DEVICE)
    with pytest.raises(ValueError, match=f'tensor 1: {complaint}'):
        average([bias, FILTERS], [bias, tensor])


@each_average
def test_lists_of_other_lengths_are_refused(average):
    a = torch.zeros(4, device=DEVICE)
    with pytest.raises(ValueError, match='lists of 2 and 1 tensors'):
        average([a, a], [a])


def test_the_mean_of_no_network_is_refused():
    with pytest.raises(ValueError, match='no network'):
        mean([torch.zeros(4, device=DEVICE)], [])


def test_a_table_is_made_once_for_the_same_tensors_and_anew_for_others():
    make_table.cache_clear()
    averages = made_up([((8,), torch.float32)], seed=0)
    weights = made_up([((8,), torch.float32)], seed=1)
    for _ in range(3):
        lookahead(averages, weights, 0.5)
    assert make_table.cache_info().misses == 1
    others = made_up([((8,), torch.float32)], seed=2)
    expected = copies(others)
    lookahead(averages, others, 0.0)
    assert make_table.cache_info().misses == 2
    assert torch.equal(averages[0], expected[0])


def average_thrice(averages, weights, networks):
    lookahead(averages, weights, 0.25)
    running_mean(averages, weights, 2)
    mean(weights, networks)


def test_dynamo_traces_the_averages_whole():
    forms = [((8,), torch.float32), ((3, 5), torch.float16)]
    averages = made_up(forms, seed=0)
    weights = made_up(forms, seed=1)
    networks = [made_up(forms, seed=2), made_up(forms, seed=3)]
    expected_averages = copies(averages)
    expected_weights = copies(weights)
    traced = torch.compile(average_thrice, backend='aot_eager', fullgraph=True)
    traced(averages, weights, networks)
    average_thrice(expected_averages, expected_weights, networks)
    for got, expected in zip(averages + weights, expected_averages + expected_weights):
        assert torch.equal(got, expected)
    torch._dynamo.reset()


def test_the_operators_keep_what_they_promise_to_torch():
    forms = [((8,), torch.float32), ((3, 5), torch.float32)]
    averages = made_up(forms, seed=0)
    first = made_up(forms, seed=1)
    second = made_up(forms, seed=2)
    torch.library.opcheck(_lerp_lists, (averages, first, 0.5, True))
    torch.library.opcheck(_mean_lists, (averages, first + second))


#### Where the kernels run #########################################################################


def test_tensors_where_the_kernels_do_not_run_are_refused():
    """Addresses on another device must reach neither the interpreter nor a GPU."""
    elsewhere = [values.to('meta') for values in draw(4, 8, 3, seed=0)]
    with pytest.raises(RuntimeError, match='flip_crop needs Triton and a GPU'):
        flip_crop(*elsewhere, **NORMALIZE)
    weights = [torch.zeros(8, device='meta')]
    for average in (lookahead_half, mean_of_two, running_mean_of_two):
        with pytest.raises(RuntimeError, match='averaging needs Triton and a GPU'):
            average(weights, weights)


PROGRAM = """
import sys
import torch
sys.modules['{absent}'] = None
import kernels

def report(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except RuntimeError as error:
        print(error)

zero = torch.zeros(1)
report(kernels.require, torch.device('cpu'))
report(kernels.lookahead, [zero], [zero], 0.5)
report(kernels.flip_crop, zero, zero, zero, zero, mean=zero, scale=zero, dtype=torch.float32)
"""


@pytest.mark.parametrize(
    ('absent', 'reason'),
    [
        ('triton', 'Triton is not installed'),
        ('nothing', 'the device is cpu; TRITON_INTERPRET=1 runs the kernels on a CPU'),
    ],
)
def test_kernels_can_be_imported_without_triton_and_without_a_gpu(absent, reason):
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    command = [sys.executable, '-c', PROGRAM.format(absent=absent)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        reason,
        'averaging needs Triton and a GPU, or TRITON_INTERPRET=1 at its import',
        'flip_crop needs Triton and a GPU, or TRITON_INTERPRET=1 at its import',
    ], done.stderr


def one_pixel_off(images, *arguments, **options):
    batch = flip_crop(images, *arguments, **options)
    batch[-1, -1, -1, -1] += 1
    return batch


def wrong_in_fp16(averages, weights, decay):
    lookahead(averages, weights, decay)
    averages[0][-1] += 1


def changes_the_weights(averages, weights, n):
    running_mean(averages, weights, n)
    weights[1][0] += 1


@pytest.mark.parametrize(
    ('name', 'wrong', 'complaint'),
    [
        ('flip_crop', one_pixel_off, 'flip_crop does not do .*: torch.float16, size=0'),
        ('lookahead', wrong_in_fp16, 'lookahead does not do .*: torch.float16'),
        ('running_mean', changes_the_weights, 'running_mean does not do .*: torch.float32'),
    ],
)
def test_require_notices_a_wrong_kernel(name, wrong, complaint, monkeypatch):
    require(DEVICE)  # finds nothing wrong
    monkeypatch.setattr(kernels, name, wrong)
    with pytest.raises(RuntimeError, match=complaint):
        require(DEVICE)


def edited_augment(images, *arguments, **options):
    return airbench94.augment(255 - images, *arguments, **options)


def edited_lookahead(averages, weights, decay):
    airbench94.lookahead(averages, weights, decay / 2)


def test_require_notices_that_a_script_was_edited():
    require(DEVICE, airbench94.augment, airbench94.lookahead)
    with pytest.raises(RuntimeError, match='flip_crop does not do'):
        require(DEVICE, edited_augment, airbench94.lookahead)
    with pytest.raises(RuntimeError, match='lookahead does not do'):
        require(DEVICE, airbench94.augment, edited_lookahead)


#### With the scripts ##############################################################################

TORCH = (airbench94.augment, {})
TRITON = (flip_crop, {'lookahead': lookahead})


def test_training_through_the_kernels_equals_training_through_torch(loaders, narrow):
    narrow['opt'].update(train_epochs=1, batch_size=16)
    narrow['opt']['lookahead']['every'] = 2
    narrow['aug']['cutout'] = 8
    options = {'batch_size': 16, 'aug': narrow['aug'], 'device': DEVICE}
    plain, test = loaders(**options)
    by_kernels, _ = loaders(**options, augment=flip_crop)
    for loader in (plain, by_kernels):  # four steps are enough
        loader.images = loader.images[:64]
        loader.labels = loader.labels[:64]
    for (inputs, _), (same_inputs, _) in zip(plain, by_kernels):
        assert torch.equal(inputs, same_inputs)
    net, record = airbench94.train(plain, test, narrow, 0)
    same_net, same_record = airbench94.train(by_kernels, test, narrow, 0, lookahead=lookahead)
    loss = record['epochs'][0]['train_loss']
    assert same_record['epochs'][0]['train_loss'] == pytest.approx(loss, rel=1e-4)
    if DEVICE.type == 'cpu':  # a GPU's sums differ from call to call
        weights = net.state_dict()
        for name, weight in same_net.state_dict().items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(('choice', 'device'), [('off', 'cuda'), ('auto', 'cpu'), ('auto', 'mps')])
def test_the_scripts_use_torch_where_they_are_told_to_and_without_cuda(choice, device):
    assert airbench94.load_kernels(choice, torch.device(device)) == TORCH


def works_everywhere(device, augment, lookahead):
    """Takes the place of require."""


def test_the_scripts_use_the_kernels_where_they_work(monkeypatch):
    assert airbench94.load_kernels('on', DEVICE) == TRITON
    monkeypatch.setattr(kernels, 'require', works_everywhere)
    assert airbench94.load_kernels('auto', torch.device('cuda')) == TRITON


@pytest.mark.parametrize('package', [None, types.ModuleType('kernels')])
def test_without_the_folder_the_scripts_use_torch(package, monkeypatch):
    """It is not there, or another package of that name is installed."""
    monkeypatch.setitem(sys.modules, 'kernels', package)
    assert airbench94.load_kernels('auto', torch.device('cuda')) == TORCH
    with pytest.raises(airbench94.UserError, match='--kernels on needs kernels/'):
        airbench94.load_kernels('on', torch.device('cuda'))


#### Benchmark #####################################################################################


def test_the_benchmark_runs(monkeypatch, capsys):
    for name, value in (('IMAGES', 2100), ('EPOCHS', 4), ('ROUNDS', 4), ('NETWORKS', 2)):
        monkeypatch.setattr(bench, name, value)
    bench.main([])
    lines = capsys.readouterr().out.splitlines()
    rows = [line[:14].strip() for line in lines]
    for name, tables in (('published', 2), ('torch path', 4), ('loop', 2), ('copy', 3)):
        assert rows.count(name) == tables
    assert rows.count('kernel') == (1 if DEVICE.type == 'cpu' else 4)


def test_what_an_epoch_moves_is_counted():
    a = torch.zeros(100, dtype=torch.float16, device=DEVICE)
    index = torch.arange(10, device=DEVICE)
    with bench.Traffic() as traffic:
        b = a + 1  # reads 200 bytes, writes 200
        b.view(10, 10).mul_(2)  # the same; the view is no launch
        torch.empty(1000)  # nothing
        b[index]  # reads 80 bytes of index and 20, writes 20
        b.index_select(0, index)  # the same
        b[index] = a[:10]  # reads 80 and 20, writes 20
    assert traffic.launches == 5
    assert traffic.bytes == 400 + 400 + 3 * 120


def test_what_cuda_writes_of_two_indices_is_counted():
    a = torch.zeros(10, 10, dtype=torch.float16, device=DEVICE)
    index = torch.arange(10, device=DEVICE)
    with bench.Traffic() as traffic:
        a[index[:, None], index]
    assert traffic.launches == 1 + 2
    written_out = 2 * (80 + 800)  # each index is read as it is, and written for every element
    assert traffic.bytes == written_out + 2 * 800 + 200 + 200
