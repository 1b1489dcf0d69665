"""Accelerators: they train as the CPU does, and nothing stays on the CPU."""

import pytest
import torch
from conftest import make_loaders

import airbench94
import airbench95
import airbench96
from airbench94 import hyp, make_net, make_optimizer, train, train_step
from kernels import GraphedStep, faster_augment

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')


def state_of(net):
    """What Lookahead averages."""
    return [value for value in net.state_dict().values() if value.is_floating_point()]


def meta_step(loader, recipe=airbench94):
    """A whole fp16 step on the meta device, which raises an error if a CPU tensor takes part."""
    hyp = recipe.hyp
    inputs, labels = next(iter(loader))
    net = recipe.make_net(hyp, device='meta', dtype=torch.float16)
    optimizer, scheduler = recipe.make_optimizer(net, hyp, total_steps=10)
    averages = [value.clone() for value in state_of(net)]
    step = recipe.train_step(net, optimizer, inputs, labels, hyp['opt']['label_smoothing'])
    scheduler.step()
    recipe.lookahead(averages, state_of(net), decay=0.5)
    return net, inputs, *step


@pytest.mark.parametrize('recipe', [airbench94, airbench95, airbench96], ids=['94', '95', '96'])
def test_fp16_training_step_and_tta_leave_nothing_on_the_cpu(recipe):
    options = {'device': 'meta', 'dtype': torch.float16, 'aug': recipe.hyp['aug']}
    train_loader, test_loader = make_loaders(**options)
    net, inputs, loss, outputs = meta_step(train_loader, recipe)
    assert inputs.dtype == outputs.dtype == torch.float16 and outputs.shape == (32, 10)
    assert loss.dtype == torch.float32 and loss.device.type == 'meta'
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    for name, p in net.named_parameters():
        assert p.dtype == (torch.float32 if 'norm' in name else torch.float16)
    logits = recipe.infer(net, test_loader, tta_level=2)
    assert logits.device.type == 'meta' and logits.shape == (60, 10)
    assert logits.dtype == torch.float16


def test_the_meta_device_notices_a_tensor_that_stayed_on_the_cpu():
    train_loader, _ = make_loaders(device='meta', dtype=torch.float16)
    train_loader.images = torch.empty(200, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError):
        meta_step(train_loader)


@needs_cuda
@pytest.mark.parametrize('fast', [False, True])
def test_cuda_batches_equal_the_cpus(fast):
    on_cpu, _ = make_loaders(dtype=torch.float16)
    on_gpu, _ = make_loaders(dtype=torch.float16, device='cuda')
    if fast:
        on_gpu.augment = faster_augment(on_gpu)
    for (inputs, labels), (gpu_inputs, gpu_labels) in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(inputs, gpu_inputs.cpu()) and torch.equal(labels, gpu_labels.cpu())


@needs_cuda
def test_cuda_trains_as_the_cpu_does(narrow, monkeypatch):
    """From the CPU's whitening, since random patches have eigenvalues that are nearly equal."""
    narrow['opt']['train_epochs'] = 1.0
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    whitened = make_net(narrow, device='cpu', dtype=torch.float32)[0]
    loaders = make_loaders()
    images = loaders[0].normalize(loaders[0].images)
    airbench94.init_whitening_conv(whitened, images, narrow['net']['whiten_eps'])

    def copy_filters(layer, images, eps):
        layer.weight.data.copy_(whitened.weight)

    net, record = train(*loaders, narrow, init_whitening_conv=copy_filters)
    on_cuda = make_loaders(device='cuda')
    gpu_net, gpu_record = train(*on_cuda, narrow, init_whitening_conv=copy_filters)
    loss, gpu_loss = (r['epochs'][0]['train_loss'] for r in (record, gpu_record))
    assert gpu_loss == pytest.approx(loss, rel=1e-3)
    for key, value in net.state_dict().items():
        on_gpu = gpu_net.state_dict()[key].cpu()
        torch.testing.assert_close(on_gpu, value, rtol=1e-2, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize('graphed', [False, True])
def test_no_step_waits_for_cuda(graphed):
    loader, _ = make_loaders(device='cuda', dtype=torch.float16)
    loader.augment = faster_augment(loader)
    batches = iter(loader)
    net = make_net(hyp, device='cuda', dtype=torch.float16)
    step, prepare = train_step, make_optimizer
    if graphed:
        step = GraphedStep(train_step, make_optimizer)
        prepare = step.make_optimizer
    optimizer, scheduler = prepare(net, hyp, total_steps=10, fused=True)
    weights = state_of(net)
    averages = [value.clone() for value in weights]
    smoothing = hyp['opt']['label_smoothing']
    # Before the first step, the epoch's draws are copied to the device, and a graph is recorded.
    step(net, optimizer, *next(batches), smoothing)
    try:
        torch.cuda.set_sync_debug_mode('error')
        for inputs, labels in batches:
            step(net, optimizer, inputs, labels, smoothing)
            scheduler.step()
            airbench94.lookahead(averages, weights, decay=0.5)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@needs_cuda
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_trains_on_cuda(dtype, narrow):
    narrow['opt']['train_epochs'] = 15.5
    _, record = train(*make_loaders(device='cuda', dtype=dtype), narrow)
    assert record['tta_val_acc'] > 0.3
