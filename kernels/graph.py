"""Training steps as CUDA graphs: the GPU gets a whole step in one launch.

    step = GraphedStep(train_step, make_optimizer)
    optimizer, scheduler = step.make_optimizer(net, hyp, total_steps, fused=True)
    loss, outputs = step(net, optimizer, inputs, labels, label_smoothing)
    scheduler.step()

Why: a step of airbench94 launches at least 88 kernels, one of records/record94.py at least 199
(counted by `count_launches` in bench.py). Many of them take less time than their launch, so that a
fast GPU waits for the CPU. A CUDA graph is a list of launches that was recorded once. To replay it
takes one launch.

A graph always reads and writes the same addresses. So the network and the optimizer must be the
same in all runs; a new run loads weights into the one, and zeroes the state of the other. What
changes from step to step, batch and learning rates, is copied to where the graph reads it. Each
variant of the step, for example with and without the whitening bias, has a graph of its own. All of
them share one pool of memory.
"""

import warnings
from functools import partial

import torch

WARM_UP_STEPS = 3  # PyTorch's advice before a capture; they also compile and choose algorithms


class CudaGraphs:
    """Turns functions into CUDA graphs, which share their memory."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = None  # the first capture makes it, on the network's device

    def capture(self, function):
        """Warm up a function without arguments, and record it.

        Returns `replay`, a function that returns what `function` does. The tensors in it are always
        the same; the next replay of any graph overwrites them.
        """
        if self.stream is None:
            self.stream = torch.cuda.Stream()  # the default stream cannot be captured
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP_STEPS):
                function()
        outside.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # By default, a capture fails if any other thread calls CUDA, and NCCL's threads do.
        options = {'capture_error_mode': 'thread_local'}
        with torch.cuda.graph(graph, self.pool, self.stream, **options):
            results = function()

        def replay():
            graph.replay()
            return results

        return replay


def state_of(args):
    """The tensors that a step may change, of each network and optimizer among its arguments."""
    tensors = []
    for arg in args:
        if isinstance(arg, torch.nn.Module):
            tensors += [*arg.parameters(), *arg.buffers()]
        if isinstance(arg, torch.optim.Optimizer):
            for state in arg.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return tensors


def variant_of(net, args):
    """What a graph cannot change: shapes, strides, constants, and how the network is at the moment.

    That is whether it trains, which of its parameters do, and where they are in memory.
    """
    forms = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            arg = (arg.shape, arg.stride(), arg.dtype)
        forms.append(arg)
    parameters = [(p.requires_grad, p.data_ptr()) for p in net.parameters()]
    return net, net.training, *forms, *parameters


def constants_of(optimizer):
    """What a graph keeps of an optimizer's groups: all but the learning rates."""
    changing = ('params', 'lr', 'initial_lr')
    constants = []
    for group in optimizer.param_groups:
        constants.append(tuple(group['params']))
        constants += [(name, value) for name, value in group.items() if name not in changing]
    return tuple(constants)


def make_momenta(optimizer):
    """Make the momenta of SGD, which it would make in the first step.

    If a bias is frozen then and trains later, fused SGD would find only some momenta, and fail.
    """
    for group in optimizer.param_groups:
        if group.get('momentum'):
            for p in group['params']:
                optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)


def list_rates(scheduler, total_steps):
    """The learning rates before each step, and after the last: a list with one per group."""
    rates = [scheduler.get_last_lr()]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch warns that the optimizer takes no steps here
        for _ in range(total_steps):
            scheduler.step()
            rates.append(scheduler.get_last_lr())
    return rates


class RatesOnDevice:
    """Used like a scheduler, it copies a row of a table into the learning rates after each step.

    Args:
        rates: (groups,), of which the optimizer's groups have views.
        table: (total steps + 1, groups), on the same device.
    """

    def __init__(self, rates, table):
        self.rates = rates
        self.table = table
        self.step_count = 0
        self.rates.copy_(table[0])

    def step(self):
        self.step_count += 1
        self.rates.copy_(self.table[self.step_count])


class GraphedStep:
    """A train_step that is recorded once for each variant, and then replayed.

    Args:
        train_step: a function of a network and other arguments. Those that are tensors may change
            from call to call. All others, such as the size of images, must be hashable, and make a
            variant. It must not wait for the GPU, and returns a sequence of tensors.
        make_optimizer: the recipe's.
        capture: see CudaGraphs.capture, the default.
    """

    def __init__(self, train_step, make_optimizer=None, capture=None):
        self.train_step = train_step
        self.make_new_optimizer = make_optimizer
        self.capture = capture or CudaGraphs().capture
        self.optimizers = {}  # and their learning rates
        self.variants = {}

    def make_optimizer(self, net, hyp, total_steps, fused=None):
        """The recipe's make_optimizer, except that the same optimizer serves all runs.

        It starts each run afresh. `fused` must be true on a GPU: only then can the learning rates
        stay there. With other settings than before, or for another network, we make another one.
        """
        new, scheduler = self.make_new_optimizer(net, hyp, total_steps, fused)
        device = next(net.parameters()).device
        # On a GPU, fused SGD reads a rate as fp32, whatever the weights are.
        dtype = torch.float64 if device.type == 'cpu' else torch.float32
        table = torch.tensor(list_rates(scheduler, total_steps), dtype=dtype, device=device)
        key = net, constants_of(new)
        if key not in self.optimizers:
            rates = table[0].clone()
            for group, rate in zip(new.param_groups, rates):
                group['lr'] = rate
            make_momenta(new)
            self.optimizers[key] = new, rates
        optimizer, rates = self.optimizers[key]
        for tensor in state_of([optimizer]):
            tensor.zero_()
        return optimizer, RatesOnDevice(rates, table)

    def __call__(self, net, *args):
        """What train_step(net, *args) does and returns."""
        variant = variant_of(net, args)
        if variant not in self.variants:
            self.variants[variant] = self.make_variant(net, args)
        kept, replay = self.variants[variant]
        for place, arg in zip(kept, args):
            if isinstance(arg, torch.Tensor):
                place.copy_(arg)
        return [result.clone() for result in replay()]

    @torch.no_grad()
    def make_variant(self, net, args):
        """(arguments that the graph reads, replay). The warm-up does not change the training."""
        kept = []
        for arg in args:
            kept.append(arg.clone() if isinstance(arg, torch.Tensor) else arg)
        before = {id(tensor): tensor.clone() for tensor in state_of([net, *args])}
        try:
            with torch.enable_grad(), torch.cuda.device_of(next(net.parameters())):
                replay = self.capture(partial(self.train_step, net, *kept))
        finally:
            for tensor in state_of([net, *args]):
                if id(tensor) in before:
                    tensor.copy_(before[id(tensor)])
                else:
                    tensor.zero_()  # a momentum that the first step has made
        return kept, replay
