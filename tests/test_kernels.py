"""The kernels against plain torch, their properties, what they refuse, and when recipes use them.

Without a GPU, Triton's interpreter runs them on the CPU.
"""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_loaders
from hypothesis import given, settings
from hypothesis import strategies as st

import airbench94
from kernels import bench, fast_path, faster_augment, flip_crop, lookahead, mean, weight_average
from kernels.flip_crop import flip_crop_ref, triton
from kernels.weight_average import (
    BLOCK,
    Launcher,
    lookahead_ref,
    make_table,
    mean_ref,
    prepare_lookahead,
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
POISON = -77.0  # fills memory that nothing may write to
few = settings(max_examples=20, deadline=None, derandomize=True)


#### flip_crop #####################################################################################


def draw(n, side, batch, seed, translate=None):
    """Images and arguments of augment, with shifts up to translate, or as large as allowed."""
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
    """A unit in the last place of the largest operand; without operands, of the larger result."""
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
def test_flip_crop_gives_the_bits_of_augment(side, batch, cutout, seed):
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
    if dtype == torch.bfloat16:  # the interpreter rounds it towards zero
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
def test_flip_crop_writes_only_its_batch(side, monkeypatch):
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


def random_tensors(forms, seed):
    """Tensors with these (shape, dtype); filters are channels_last, as in a network."""
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
    averages = random_tensors(forms, seed)
    weights = random_tensors(forms, seed + 500)
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


def refuse_to_be_called(*args):
    raise AssertionError('a prepared step calls this')


def test_prepared_steps_give_the_bits_of_lookahead_without_its_checks(monkeypatch):
    forms = [((8,), torch.float32), ((3, 5), torch.float16), ((BLOCK + 1,), torch.bfloat16)]
    averages = random_tensors(forms, seed=0)
    weights = random_tensors(forms, seed=10)
    expected = copies(averages)
    step = prepare_lookahead(iter(averages), iter(weights))
    for decay in (0.9, 0.3, 1.0, 0):
        for i, weight in enumerate(weights):  # as an optimizer would, in place
            weight.copy_(random_tensors(forms, seed=20)[i])
        lookahead(expected, copies(weights), decay)
        with monkeypatch.context() as patch:
            patch.setattr(weight_average, 'check', refuse_to_be_called)
            patch.setattr(weight_average, 'make_table', refuse_to_be_called)
            step(decay)
        for average, weight, other in zip(averages, weights, expected):
            assert torch.equal(average, other)
            assert torch.equal(weight, other)


def test_a_prepared_step_writes_only_where_its_tensors_were():
    average = torch.zeros(8, device=DEVICE)
    weight = torch.nn.Parameter(torch.ones(8, device=DEVICE))
    step = prepare_lookahead([average], [weight])
    weight.data = torch.full((8,), POISON, device=DEVICE)  # frees the memory unless step keeps it
    freed = torch.full((8,), POISON, device=DEVICE)
    step(0.5)
    assert (average == 0.5).all()
    assert (weight == POISON).all()
    assert (freed == POISON).all()


def mean_tolerance(weights):
    """How far two means of these may be apart, or one of them from the exact one.

    Each network but the first adds a step in float32. It rounds a difference, a product (unless
    it is fused into the sum) and a sum. The next steps shrink its error, so that all of them
    together stay below eps of the largest weight, times the number of networks. At the end, each
    mean is rounded to its dtype.
    """
    largest = torch.stack(weights).abs().amax(0).double()
    steps = len(weights) * torch.finfo(torch.float32).eps
    return largest * (steps + torch.finfo(weights[0].dtype).eps)


@few
@given(forms=some_forms, n=st.integers(1, 9), seed=st.integers(0, 999))
def test_mean_equals_its_reference(forms, n, seed):
    networks = [random_tensors(forms, seed + 10 * i) for i in range(n)]
    averages = [torch.full_like(weight, POISON) for weight in networks[0]]
    expected = copies(averages)
    mean(averages, networks)
    mean_ref(expected, networks)
    for average, reference, *weights in zip(averages, expected, *networks):
        exact = torch.stack(weights).double().mean(0)
        tolerance = mean_tolerance(weights)
        assert ((average.double() - reference.double()).abs() <= tolerance).all()
        assert ((average.double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize('n', [3, 5, 7, 11, 13, 25, 49])
def test_a_share_is_the_nearest_number_to_1_over_n(n):
    """On a GPU, a rough division would show here for some n."""
    networks = [[torch.zeros(8, device=DEVICE)] for _ in range(n - 1)]
    networks.append([torch.ones(8, device=DEVICE)])
    average = torch.empty(8, device=DEVICE)
    mean([average], networks)
    assert torch.equal(average, torch.full_like(average, 1 / n))


def test_torch_never_copies_lists_of_mixed_dtypes(monkeypatch):
    """torch 2.9 and 2.10 copy them wrongly."""
    calls = []
    copy_lists = torch._foreach_copy_

    def checked_copy(targets, sources):
        calls.append(([tensor.dtype for tensor in targets], [tensor.dtype for tensor in sources]))
        copy_lists(targets, sources)

    monkeypatch.setattr(torch, '_foreach_copy_', checked_copy)
    forms = [((3,), dtype) for dtype in (torch.float16, torch.float32, torch.float16)]
    networks = [random_tensors(forms, seed) for seed in (0, 10)]
    averages = [torch.zeros_like(weight) for weight in networks[0]]
    mean_ref(averages, networks)
    for average, *weights in zip(averages, *networks):
        torch.testing.assert_close(average, torch.stack(weights).mean(0))
    lookahead_ref(averages, networks[0], 0.5)
    assert len(calls) == 4
    for targets, sources in calls:
        assert len(set(targets)) == len(set(sources)) == 1


@few
@given(forms=some_forms, n=st.integers(1, 9))
def test_the_mean_of_equal_networks_is_that_network(forms, n):
    network = random_tensors(forms, seed=n)
    averages = [torch.full_like(weight, POISON) for weight in network]
    mean(averages, (iter(network) for _ in range(n)))  # they need to be readable only once
    for average, weight in zip(averages, network):
        assert torch.equal(average, weight)


# Also tensors that do not start, or do not end, at a multiple of 16 bytes.
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    ('first', 'n'), [(16, 8), (16, 11), (3, 8), (16, BLOCK), (16, BLOCK + 3), (1, BLOCK + 8)]
)
def test_averaging_writes_only_its_tensors(first, n, dtype):
    size = first + n + 100
    poisons = (-77, -99)  # two, since the average of equal numbers is the same number
    memories = [torch.full((size,), poison, dtype=dtype, device=DEVICE) for poison in poisons]
    average, weight = (memory[first : first + n] for memory in memories)
    average.fill_(1.0)
    weight.fill_(3.0)
    lookahead([average], [weight], 0.5)
    mean([average], [[average], [weight]])
    for memory, poison in zip(memories, poisons):
        assert (memory[:first] == poison).all()
        assert (memory[first : first + n] == 2).all()
        assert (memory[first + n :] == poison).all()


class FakeKernel:
    """Launched like a kernel, it only keeps its options."""

    def __getitem__(self, grid):
        return self.run

    def run(self, table, **options):
        self.options = options


@pytest.mark.parametrize(
    ('first', 'n', 'is_aligned'), [(16, 8, True), (16, 11, False), (3, 8, False)]
)
def test_kernels_take_memory_for_aligned_only_if_it_is(first, n, is_aligned):
    """The interpreter would not notice otherwise, but a GPU would fail or read other memory."""
    kernel = FakeKernel()
    aligned = torch.zeros(8, device=DEVICE)
    tensor = torch.zeros(first + n, device=DEVICE)[first:]
    launch = Launcher(kernel, [[aligned, tensor], [aligned, tensor]])
    launch()
    assert kernel.options['ALIGNED'] == is_aligned


def lookahead_half(averages, weights):
    lookahead(averages, weights, 0.5)


def mean_of_two(averages, weights):
    mean(averages, [averages, weights])


each_average = pytest.mark.parametrize('average', [lookahead_half, mean_of_two])


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


@each_average
def test_no_tensors_are_refused(average):
    with pytest.raises(ValueError, match='no tensor to average'):
        average([], [])


def test_a_table_is_made_once_for_the_same_tensors_and_anew_for_others():
    make_table.cache_clear()
    averages = random_tensors([((8,), torch.float32)], seed=0)
    weights = random_tensors([((8,), torch.float32)], seed=1)
    for _ in range(3):
        lookahead(averages, weights, 0.5)
    assert make_table.cache_info().misses == 1
    others = random_tensors([((8,), torch.float32)], seed=2)
    expected = copies(others)
    lookahead(averages, others, 0.0)
    assert make_table.cache_info().misses == 2
    assert torch.equal(averages[0], expected[0])


def average_twice(averages, weights, networks):
    lookahead(averages, weights, 0.25)
    mean(weights, networks)


def test_a_compiled_function_can_call_the_averages():
    """torch.compile leaves them as they are."""
    forms = [((8,), torch.float32), ((3, 5), torch.float16)]
    averages = random_tensors(forms, seed=0)
    weights = random_tensors(forms, seed=1)
    networks = [random_tensors(forms, seed=2), random_tensors(forms, seed=3)]
    expected_averages = copies(averages)
    expected_weights = copies(weights)
    torch.compile(average_twice, backend='aot_eager')(averages, weights, networks)
    average_twice(expected_averages, expected_weights, networks)
    for got, expected in zip(averages + weights, expected_averages + expected_weights):
        assert torch.equal(got, expected)
    torch._dynamo.reset()


#### Where the kernels run #########################################################################


def test_tensors_where_the_kernels_do_not_run_are_refused():
    """Addresses on another device must reach neither the interpreter nor a GPU."""
    elsewhere = [values.to('meta') for values in draw(4, 8, 3, seed=0)]
    with pytest.raises(RuntimeError, match='flip_crop needs Triton and a GPU'):
        flip_crop(*elsewhere, **NORMALIZE)
    weights = [torch.zeros(8, device='meta')]
    for average in (lookahead_half, mean_of_two):
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
print(kernels.fast_path.why_not_here(torch.device('cpu')))
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


#### With a recipe #################################################################################


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_a_recipe_uses_flip_crop_if_it_gives_the_bits_of_augment(dtype, capsys):
    loader, _ = make_loaders(DEVICE, dtype, aug={'flip': True, 'translate': 4, 'cutout': 12})
    assert faster_augment(loader) is flip_crop
    assert loader.epoch == 0 and capsys.readouterr().out == ''


def edited_augment(images, *args, **options):
    return airbench94.augment(255 - images, *args, **options)


def test_a_recipe_keeps_an_augment_that_was_edited(capsys):
    loader, _ = make_loaders(DEVICE)
    loader.augment = edited_augment
    assert faster_augment(loader) is edited_augment
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith('flip_crop, the Triton kernel, is not used: its batch differs')


def refuse_to_compile(*args, **options):
    raise RuntimeError('Failed to find a C compiler.\nPlease specify it')


def too_old(device):
    return 'this GPU is too old'


@pytest.mark.parametrize(
    ('name', 'value', 'reason'),
    [
        ('triton', None, 'Triton is not installed'),
        ('why_not_here', too_old, 'this GPU is too old'),
        ('flip_crop', refuse_to_compile, 'Failed to find a C compiler. Please specify it'),
    ],
)
def test_a_recipe_keeps_its_augment_if_the_kernel_cannot_run(
    name, value, reason, monkeypatch, capsys
):
    monkeypatch.setattr(fast_path, name, value)
    loader, _ = make_loaders(DEVICE)
    assert faster_augment(loader) is airbench94.augment
    assert capsys.readouterr().out == f'flip_crop, the Triton kernel, is not used: {reason}\n'


def test_a_dtype_that_the_kernel_does_not_have_is_named(capsys):
    loader, _ = make_loaders(DEVICE, torch.float64)
    assert faster_augment(loader) is airbench94.augment
    assert 'dtype=torch.float64: must be' in capsys.readouterr().out


def test_training_with_the_kernels_equals_training_with_torch(narrow):
    narrow['opt'].update(train_epochs=1, batch_size=16)
    narrow['opt']['lookahead']['every'] = 2
    narrow['aug']['cutout'] = 8
    options = {'device': DEVICE, 'batch_size': 16, 'aug': narrow['aug']}
    plain, test = make_loaders(**options)
    with_kernel, _ = make_loaders(**options)
    with_kernel.augment = flip_crop
    for loader in (plain, with_kernel):  # four steps are enough
        loader.images = loader.images[:64]
        loader.labels = loader.labels[:64]
    for (inputs, _), (same_inputs, _) in zip(plain, with_kernel):
        assert torch.equal(inputs, same_inputs)
    net, record = airbench94.train(plain, test, narrow, 0)
    same_net, same_record = airbench94.train(with_kernel, test, narrow, 0, lookahead=lookahead)
    loss = record['epochs'][0]['train_loss']
    assert same_record['epochs'][0]['train_loss'] == pytest.approx(loss, rel=1e-4)
    if DEVICE.type == 'cpu':  # a GPU's sums differ from call to call
        weights = net.state_dict()
        for name, weight in same_net.state_dict().items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)


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
    assert rows.count('prepared') == (0 if DEVICE.type == 'cpu' else 1)


def test_what_an_epoch_moves_is_counted():
    a = torch.zeros(100, dtype=torch.float16, device=DEVICE)
    index = torch.arange(10, device=DEVICE)
    with bench.Traffic() as traffic:
        b = a + 1  # reads 200 bytes, writes 200
        b.view(10, 10).mul_(2)  # the same; a view is no launch
        torch.empty(1000)  # nothing
        b[index]  # reads 80 bytes of index and 20, writes 20
        b.index_select(0, index)  # the same
        b[index] = a[:10]  # reads 80 and 20, writes 20
    assert traffic.launches == 5
    assert traffic.bytes == 400 + 400 + 3 * 120


def test_what_cuda_writes_for_two_indices_is_counted():
    a = torch.zeros(10, 10, dtype=torch.float16, device=DEVICE)
    index = torch.arange(10, device=DEVICE)
    with bench.Traffic() as traffic:
        a[index[:, None], index]
    assert traffic.launches == 1 + 2
    written_out = 2 * (80 + 800)  # each index is read as it is, and written for every element
    assert traffic.bytes == written_out + 2 * 800 + 200 + 200


#### Counting launches #############################################################################


def operators_that_launch_nothing():
    a = torch.empty(2, 3, device='meta')
    a.view(6).unsqueeze(0).expand(4, 6).detach()
    a.resize_(6).t_()
    a.set_(torch.empty_like(a))
    torch.ops.aten._unsafe_view(a, (3, 2))
    torch.ops.aten._reshape_alias(a, (3, 2), (2, 1))
    a.new_empty(3)
    with torch.profiler.record_function('a mark'):
        pass


def test_operators_that_launch_nothing_are_not_counted():
    assert bench.count_launches(operators_that_launch_nothing) == 0


@torch.inference_mode()
def reshape_and_convert():
    a = torch.empty(2, 3, device='meta')
    a.reshape(6).reshape(2, 3)  # views
    a.t().reshape(6)  # a copy
    a.to(torch.float32)  # nothing
    a.to(torch.float16)  # a copy


def test_an_operator_with_a_mask_and_an_index_is_counted():
    values = torch.zeros(3, 4)
    mask = torch.tensor([True, False, True])
    index = torch.tensor([1, 2])

    def choose():
        return values[mask, index]

    assert bench.count_launches(choose) == 1


def test_what_inference_mode_calls_a_view_is_counted_if_it_copies():
    assert bench.count_launches(reshape_and_convert) == 2


def test_an_operator_with_a_kernel_of_its_own_is_counted_once():
    """torch could also take them apart: silu's gradient and BatchNorm."""
    inputs = torch.zeros(4, 3, 2, 2, device='meta', requires_grad=True)
    ones = torch.ones(3, device='meta')

    def train():
        outputs = F.silu(F.batch_norm(inputs, ones, ones, training=True))
        torch.autograd.grad(outputs, inputs, torch.empty_like(outputs))

    def infer():
        with torch.inference_mode():
            F.silu(F.batch_norm(inputs.detach(), ones, ones))

    assert bench.count_launches(train) == 4
    assert bench.count_launches(infer) == 2


def meta_tensors(n, shape=(4, 3, 2, 2), dtype=torch.float32):
    return [torch.empty(shape, dtype=dtype, device='meta') for _ in range(n)]


def channels_last(tensors):
    return [tensor.to(memory_format=torch.channels_last) for tensor in tensors]


HALVES = meta_tensors(5, dtype=torch.float16)
SINGLES = meta_tensors(5)
LARGE = meta_tensors(2, (160, 65536))  # 160 blocks each, and 320 fit into a launch
LARGER = meta_tensors(2, (161, 65536))


@pytest.mark.parametrize(
    ('averages', 'weights', 'launches'),
    [
        (meta_tensors(64), meta_tensors(64), 1),
        (meta_tensors(65), meta_tensors(65), 2),
        (meta_tensors(65) + meta_tensors(9, (0,)), meta_tensors(65) + meta_tensors(9, (0,)), 2),
        (HALVES + SINGLES, HALVES + SINGLES, 10),
        (channels_last(SINGLES), channels_last(SINGLES), 1),
        (channels_last(SINGLES), SINGLES, 5),
        ([tensor[..., 0] for tensor in SINGLES], [tensor[..., 0] for tensor in SINGLES], 5),
        (LARGE, LARGE, 1),
        (LARGER, LARGER, 2),
        (LARGER + SINGLES, LARGER + SINGLES, 2),
    ],
)
def test_lists_are_counted_as_cuda_takes_them(averages, weights, launches):
    def lerp():
        torch._foreach_lerp_(averages, weights, 0.5)

    assert bench.count_launches(lerp) == launches


def test_a_list_is_copied_to_another_dtype_in_one_launch():
    def copy():
        torch._foreach_copy_(HALVES, SINGLES)

    assert bench.count_launches(copy) == 1


def test_a_new_list_takes_room_in_a_launch_too():
    def add():
        torch._foreach_add(meta_tensors(49), meta_tensors(49))

    assert bench.count_launches(add) == 2  # 48 tensors for three lists


@pytest.mark.parametrize(
    ('options', 'launches'),
    [
        ({'foreach': False}, 4 * 33),  # decay, momentum, gradient, step
        ({'foreach': True}, 4 * 2),  # the same for each dtype
        ({'fused': True}, 2),
    ],
)
def test_the_optimizer_is_counted_in_all_its_forms(options, launches):
    weights = bench.airbench94_tensors(torch.device('cpu'))
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1, **options)
    optimizer.step()
    assert bench.count_launches(optimizer.step) == launches


def test_what_lookahead_launches_is_what_the_readme_says():
    averages = bench.airbench94_tensors(torch.device('cpu'))
    weights = copies(averages)
    for function, launches in ((bench.lookahead_loop, 66), (lookahead_ref, 4)):
        assert bench.count_launches(partial(function, averages, weights, 0.5)) == launches
